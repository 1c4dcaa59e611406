"""A killed preparation resumes and ends in the same bytes; two at once agree."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import MANTA
from small_corpora import SMALL, config, content, write_source
from split_tasks import HangingSplit

from manta.data.prepare import build, prepare
from manta.data.shards.manifest import PreparedData
from manta.data.sources.splits import input_splits


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def undisturbed(lines, tmp_path_factory) -> PreparedData:
    return prepare.prepare(config(tmp_path_factory.mktemp("corpora"), lines), SMALL)


def prepare_and_die(directory: str, lines: str, rename: str) -> None:
    """Prepare, and be killed at this rename, after the new file was written."""
    replace, remaining = Path.replace, [int(rename)]

    def count(path: Path, target: Path) -> Path:
        remaining[0] -= 1
        if not remaining[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = count
    prepare.prepare(config(Path(directory), lines), SMALL)


def prepare_and_hang(directory: str, lines: str) -> None:
    build.input_splits = lambda *args: [*input_splits(*args)[:-1], HangingSplit(input_splits(*args)[-1])]
    prepare.prepare(config(Path(directory), lines, workers=2), SMALL)


def prepare_alone(directory: str, lines: str) -> None:
    prepare.prepare(config(Path(directory), lines), SMALL)


def prepare_with_two(directory: str, lines: str) -> None:
    prepare.prepare(config(Path(directory), lines, workers=2), SMALL)


def start(function: Callable[..., None], *args: object) -> subprocess.Popen[bytes]:
    program = f"import sys, test_prepare_killed; test_prepare_killed.{function.__name__}(*sys.argv[1:])"
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stderr=subprocess.DEVNULL)


def records(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.glob("*/piece-*.json")}


@pytest.mark.parametrize("rename", [1, 2, 5, 8, 46, 87])
def test_a_preparation_killed_at_any_file_resumes_to_the_same_bytes(lines, undisturbed, tmp_path, rename):
    """Renames: the tokenizer's hash, the tokenizer, seven per split (three per shard, one for its record) up to 86; 87 is the manifest."""
    assert start(prepare_and_die, tmp_path, lines, rename).wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("*/manifest.json"))
    assert prepare.find_prepared(config(tmp_path, lines), SMALL) is None
    finished = records(tmp_path)
    assert len(finished) == max(0, rename - 3) // 7
    prepared = prepare.prepare(config(tmp_path, lines), SMALL)
    assert content(prepared) == content(undisturbed)
    assert finished.items() <= records(tmp_path).items()


@pytest.mark.slow
def test_a_preparation_killed_at_random_times_resumes_to_the_same_bytes(lines, undisturbed, tmp_path):
    """Twenty preparations, each killed once between its start and its end, with one worker and with two."""
    started = time.monotonic()
    assert start(prepare_alone, tmp_path / "whole", lines).wait() == 0
    whole, rng = time.monotonic() - started, random.Random(20)
    killed = 0
    for number in range(20):
        directory = tmp_path / str(number)
        process = start(prepare_alone if number % 2 else prepare_with_two, directory, lines)
        time.sleep(rng.uniform(0.3, 1.0) * whole)  # before that Python is still loading
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL)
        assert content(prepare.prepare(config(directory, lines), SMALL)) == content(undisturbed)
    assert killed >= 10


def test_a_killed_preparation_leaves_no_worker_behind(lines, undisturbed, tmp_path):
    process = start(prepare_and_hang, tmp_path, lines)
    while len(records(tmp_path)) < 11:
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not list(tmp_path.glob("*/manifest.json"))
    prepared = prepare.prepare(config(tmp_path, lines), SMALL)
    assert content(prepared) == content(undisturbed)


def test_two_preparations_at_once_agree(lines, undisturbed, tmp_path):
    processes = [start(prepare_alone, tmp_path, lines) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert content(prepare.find_prepared(config(tmp_path, lines), SMALL)) == content(undisturbed)


def test_a_killed_worker_ends_prepare_in_one_line_and_the_command_resumes(lines, undisturbed, tmp_path):
    yaml = (
        f"run: {{dir: run}}\ndata: {{sources: [{lines}], sequence_length: 16, validation: 0.1, workers: 2}}\n"
        "tokenizer: {vocabulary: 400, train_bytes: 100000}\nmodel: {preset: llama-tiny}\n"
        "train: {steps: 2, global_batch: 8, micro_batch: 4}\n"
    )
    (tmp_path / "run.yaml").write_text(yaml)
    command, options = [MANTA, "prepare", "run.yaml"], {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **options)
    while not (workers := [child for child in psutil.Process(process.pid).children() if "spawn_main" in str(child.cmdline())]):
        time.sleep(0.01)
    workers[0].kill()
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("manta: ")
    assert "a process died (SIGKILL, maybe out of memory" in stderr.splitlines()[-1]
    assert not list(tmp_path.glob("corpora/*/manifest.json"))
    again = subprocess.run(command, check=True, **options)
    assert content(undisturbed.model_copy(update={"corpora": (again.stdout.strip(),)})) == content(undisturbed)
