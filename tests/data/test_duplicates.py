"""Duplicates and contamination of validation data, compared with direct counts on small corpora."""

from collections import Counter

import numpy as np
import pytest
from sample_cases import write_stream

from manta.data.prepare import contamination
from manta.data.prepare.contamination import SPAN, find_contamination
from manta.data.prepare.dedup import find_duplicates


def ignore(_: int) -> None:
    pass


def test_all_copies_but_the_first_are_duplicates(tmp_path):
    rng = np.random.default_rng(0)
    pool = [rng.integers(0, 50, rng.integers(1, 40)).tolist() for _ in range(30)]
    chosen = [[pool[at] for at in rng.integers(0, 30, 60)] for _ in range(3)]
    train = [write_stream(tmp_path / "a", chosen[0][:20], chosen[0][20:]), write_stream(tmp_path / "b", chosen[1], dtype=np.int32)]
    validation = [write_stream(tmp_path / "c", chosen[2] + [[1, 2, 3]]), write_stream(tmp_path / "d", [[7] * 90])]
    read = []
    found = find_duplicates(train, validation, max_tokens=10**9, advance=read.append)
    times = Counter(map(tuple, chosen[0] + chosen[1]))
    new = len(set(map(tuple, chosen[0])))
    assert found.documents == (60, 60)
    assert found.repeated == (60 - new, 60 - (len(times) - new))
    assert sum(found.repeated_tokens) == sum((count - 1) * len(document) for document, count in times.items())
    assert [count for count, _ in found.most_frequent] == sorted(times.values(), reverse=True)[:5]
    assert all(times[tuple(ids.tolist())] == count for count, ids in found.most_frequent)
    assert found.validation_in_train == (sum(tuple(document) in times for document in chosen[2]), 0)
    assert sum(read) == sum(int(stream.starts[-1]) for stream in (*train, *validation))


def test_a_large_corpus_is_sampled_by_document_length(tmp_path):
    rng = np.random.default_rng(1)
    pool = [rng.integers(0, 50, length).tolist() for length in range(1, 200)]
    chosen = [pool[at] for at in rng.integers(0, 199, 800)]
    tokens = sum(map(len, chosen))
    found = find_duplicates([write_stream(tmp_path, chosen)], [], max_tokens=tokens // 4, advance=ignore)
    assert 0.1 * tokens < found.tokens[0] < 0.4 * tokens
    compared = {len(ids) for _, ids in found.most_frequent}
    times = Counter(len(document) for document in chosen)  # no two documents of the pool have the same length
    assert [count for count, _ in found.most_frequent] == [times[len(ids)] for _, ids in found.most_frequent]
    assert len(compared) == 5
    assert found.repeated[0] / found.documents[0] == pytest.approx(1 - 199 / 800, abs=0.1)


@pytest.mark.parametrize("chunk", [64, 1 << 16])
def test_validation_spans_that_train_contains_are_found(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(contamination, "_CHUNK", chunk)
    rng = np.random.default_rng(2)
    text = rng.integers(1, 4, 3000)  # with three ids, spans of 50 never repeat by chance and short ones always do
    held_out = rng.integers(1, 4, 2000)
    for at, length in ((0, 49), (100, 50), (300, 51), (500, 120), (800, 49), (1700, 300)):
        start = int(rng.integers(0, 2600))
        held_out[at : at + length] = text[start : start + length]
    spans = {text[at : at + SPAN].tobytes() for at in range(len(text) - SPAN + 1)}
    covered = np.zeros(len(held_out), dtype=bool)
    for at in range(len(held_out) - SPAN + 1):
        if held_out[at : at + SPAN].tobytes() in spans:
            covered[at : at + SPAN] = True
    expected = int(covered.sum())
    assert 521 <= expected < 640
    validation = [write_stream(tmp_path / "validation", [held_out.tolist()])]

    def search(name: str, *shards: list[list[int]]) -> contamination.Contamination:
        return find_contamination([write_stream(tmp_path / name, *shards)], validation, max_tokens=10**9, advance=ignore)

    found = search("one shard", [text.tolist()])
    assert (found.found, found.searched_for, found.searched) == ((expected,), (2000,), 3000)
    assert search("two shards", [text[:700].tolist()], [text[700:].tolist()]).found[0] <= expected, "no span crosses shards"
    assert search("too short", [[1, 2]]).found == (0,)


def test_spans_of_a_single_repeated_token_are_found(tmp_path):
    train = [write_stream(tmp_path / "a", [[5] * 400]), write_stream(tmp_path / "b", [[5] * 30, [6] * 10])]
    validation = [write_stream(tmp_path / "c", [[5] * 70 + [9]]), write_stream(tmp_path / "d", [[6] * 20])]
    assert find_contamination(train, validation, max_tokens=10**9, advance=ignore).found == (70, 0)
