"""ranks.json: what people who watch a run see of its ranks."""

import json
import time

import pytest

from manta.cluster.supervise import rank_list
from manta.cluster.supervise.rank_list import RankList, read_ranks


def ranks(step: int, count: int = 2) -> list[dict]:
    common = {"node": "a", "phase": "step", "step": step, "silent_seconds": 0.25, "has_stepped": True}
    return [{"rank": rank, **common} for rank in range(count)]


def test_the_ranks_are_read_as_they_were_written_at_most_once_a_second(tmp_path):
    written = RankList(tmp_path)
    written.write(ranks(3))
    written.write(ranks(4))
    found = read_ranks(tmp_path)
    assert [(rank.rank, rank.node, rank.phase, rank.step) for rank in found] == [(0, "a", "step", 3), (1, "a", "step", 3)]
    time.sleep(0.3)
    assert 0.55 <= read_ranks(tmp_path)[0].silent_seconds < 5, "the time since then counts"
    time.sleep(0.8)
    written.write(ranks(5))
    assert read_ranks(tmp_path)[0].step == 5
    written.close()
    assert list(tmp_path.iterdir()) == []
    assert read_ranks(tmp_path) == []


def test_many_ranks_are_written_less_often(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(rank_list.time, "monotonic", lambda: now)
    written = RankList(tmp_path)
    written.write(ranks(1, 2000))
    for now, step in ((101.5, 1), (102.0, 2)):  # noqa: B007  the clock
        written.write(ranks(2, 2000))
        assert read_ranks(tmp_path)[-1].step == step


def test_what_cannot_be_written_is_skipped(tmp_path):
    written = RankList(tmp_path / "gone")
    written.write(ranks(1))
    written.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[]", "{", json.dumps({"time": 1.0, "ranks": [{"rank": -1}]}), '{"time": NaN, "ranks": []}'])
def test_a_damaged_file_has_no_ranks(tmp_path, content):
    (tmp_path / "ranks.json").write_text(content)
    assert read_ranks(tmp_path) == []
