"""Worker processes: a crash is reported with its file and line, and an error ends all of them at once."""

import multiprocessing
import signal
from pathlib import Path

import pytest
from small_corpora import SMALL, config, documents, write_lines
from split_tasks import DeadlySplit, HangingSplit, first_split, task_of

from manta.data.errors import InputError
from manta.data.prepare import build, prepare
from manta.data.prepare.encode import encode_split
from manta.data.prepare.pool import run_in_processes
from manta.data.shards.manifest import PreparedData


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for part in (3, 4):
        write_lines(folder / f"{part:02d}.jsonl", documents(100, seed=part))
    return folder


@pytest.fixture(scope="module")
def prepared(lines, tmp_path_factory) -> PreparedData:
    return prepare.prepare(config(tmp_path_factory.mktemp("corpora"), lines), SMALL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, None])
def test_a_worker_crash_is_reported_with_file_and_line(lines, prepared, tmp_path, how):
    cause = "exit code 3" if how is None else signal.Signals(how).name
    deadly, whole = DeadlySplit(first_split(lines / "03.jsonl"), how), first_split(lines / "04.jsonl")
    with pytest.raises(RuntimeError, match=rf"near {lines}/03\.jsonl: line 38: a process died \({cause}"):
        list(run_in_processes(encode_split, [task_of(deadly, prepared, tmp_path), task_of(whole, prepared, tmp_path, 1)], 2))
    assert not list(tmp_path.glob("piece-00000*"))
    assert not multiprocessing.active_children()


class TwoPartError(Exception):
    """Pickles, but cannot be unpickled."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def fail_in_two_parts(task, position):
    position.value = 3
    if task.index:
        raise TwoPartError("one", "two")


def test_an_error_that_cannot_be_pickled_keeps_its_message_and_traceback(lines, prepared, tmp_path):
    tasks = [task_of(first_split(lines / "03.jsonl"), prepared, tmp_path, index) for index in range(6)]
    with pytest.raises(RuntimeError, match="TwoPartError: one and two") as caught:
        list(run_in_processes(fail_in_two_parts, tasks, 2))
    assert "fail_in_two_parts" in caught.value.__notes__[0]


def test_an_error_does_not_wait_for_other_workers(prepared, tmp_path):
    lines = write_lines(tmp_path / "x.jsonl", ["x"])
    with lines.open("a") as stream:
        stream.write("{}")
    bad = first_split(lines)
    with pytest.raises(InputError, match=r"line 2: expected a field 'text'"):
        list(run_in_processes(encode_split, [task_of(split, prepared, tmp_path) for split in (HangingSplit(bad), bad)], 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_fails_the_preparation_and_leaves_no_manifest(tmp_path, monkeypatch, workers):
    folder = tmp_path / "source"
    folder.mkdir()
    for part in range(4):
        write_lines(folder / f"{part}.jsonl", documents(100, seed=part))
    with (folder / "2.jsonl").open("a") as stream:
        stream.write('{"text": "cut sho')
    data, tokens = config(tmp_path / "corpora", folder, workers=workers), SMALL.model_copy(update={"train_bytes": 10_000})
    monkeypatch.setattr(build, "_PROOF_BYTES", 10_000)  # a worker finds the bad line, not the sample
    with pytest.raises(InputError) as caught:
        prepare.prepare(data, tokens)
    assert str(caught.value).startswith(f"{folder}/2.jsonl: line 101: expected one JSON object per line, got malformed JSON")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("corpora/*/manifest.json"))
