"""A process killed before or during any file operation of a save leaves a valid checkpoint to load."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from file_operations import Tracer, traced
from spmd import spmd

from manta.data.storage.atomic import write_atomically
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.manifest import MANIFEST, Checkpoint, Progress
from manta.trainer.checkpoint.reader import read_tensors
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.retention import Retention
from manta.trainer.checkpoint.storage import DirectoryBackend, open_backend
from manta.trainer.checkpoint.writer import CheckpointWriter

SHAPES = {"master/embedding.weight": (300, 1000), "master/norm.weight": (64,), "exp_avg/norm.weight": (64,)}
KEPT = re.compile(r"step-\d{8}|bad-step-\d{8}|fence\.json|latest")


def tensors(step: int) -> dict[str, TensorViews]:
    random = torch.Generator().manual_seed(step)
    return {key: TensorViews.from_whole(torch.randn(shape, generator=random)) for key, shape in SHAPES.items()}


def save(directory: Path, *steps: int, attempt: int) -> None:
    writer = CheckpointWriter(open_backend(directory), identity={}, attempt=attempt, retention=Retention(newest=1))
    writer.set_fence()
    for step in steps:
        writer.save(tensors(step), Progress(step=step, samples_consumed=step, optimizer_steps=step))


def holds_tensors(directory: Path, checkpoint: Checkpoint, seed: int) -> bool:
    loaded = {key: TensorViews.from_whole(torch.zeros(shape)) for key, shape in SHAPES.items()}
    read_tensors(open_backend(directory), checkpoint, loaded)
    return all(torch.equal(loaded[key].views[0][1], pieces.views[0][1]) for key, pieces in tensors(seed).items())


def check(directory: Path, steps: set[int]) -> None:
    """The newest checkpoint is one of these steps, complete, and the next attempt saves and leaves no other files."""
    backend = open_backend(directory)
    for name in backend.names():
        catalog.verify(backend, name)  # no partial checkpoint has a final name
    latest = directory / "latest"
    assert not latest.exists() or latest.read_text().strip() in backend.names()
    newest = catalog.newest_valid(backend)
    assert (0 if newest is None else newest.progress.step) in steps
    assert newest is None or holds_tensors(directory, newest, newest.progress.step)
    save(directory, 12, attempt=3)
    assert catalog.newest_valid(backend).progress.step == 12
    assert [path.name for path in directory.iterdir() if not KEPT.fullmatch(path.name)] == []


def first_save(directory: Path) -> set[int]:
    """Prepare the first save of a run; return the steps that it may leave."""
    del directory
    return {0, 8}


def later_save(directory: Path) -> set[int]:
    """Prepare a save that deletes an older checkpoint."""
    save(directory, 4, attempt=1)
    return {4, 8}


def replacing_save(directory: Path) -> set[int]:
    """Prepare a save over a bad checkpoint of the same name."""
    save(directory, 4, attempt=1)
    shutil.copytree(directory / "step-00000004", directory / "step-00000008")
    (directory / "step-00000008" / MANIFEST).unlink()
    return {4, 8}


def kill_everywhere(folder: Path, prepare: Callable[[Path], set[int]], *, check_names: bool = True) -> list[str]:
    """Kill a save before and during each of its file operations, and check the result. Return the operations."""
    job = partial(save, attempt=2)
    whole = folder / "whole"
    prepare(whole)
    operations = traced(partial(job, whole, 8), whole)
    for number in range(1, len(operations) + 1):
        for halfway in (False, True):
            if halfway and operations[number - 1].split()[0] not in {"write", "fsync"}:
                continue
            directory = folder / f"{number} {halfway}"
            steps = prepare(directory)
            assert traced(partial(job, directory, 8), directory, number, halfway=halfway) is None, "it was not killed"
            if not check_names and (directory / "step-00000008").exists() and not (directory / "step-00000008" / MANIFEST).exists():
                shutil.rmtree(directory / "step-00000008")
            check(directory, steps)
            shutil.rmtree(directory)
    return operations


@pytest.mark.parametrize("prepare", [pytest.param(first_save, marks=pytest.mark.slow), later_save])
def test_a_save_killed_at_any_file_operation_leaves_a_valid_checkpoint(tmp_path, prepare):
    operations = kill_everywhere(tmp_path, prepare)
    kinds = Counter(operation.split()[0] for operation in operations)
    assert kinds.keys() >= {"open", "write", "fsync", "rename", "mkdir"}
    assert len(operations) > 15
    if prepare is later_save:
        assert kinds["remove"] == 2, "the two files of the older checkpoint"
        assert kinds["rmdir"] == 1


@pytest.mark.slow
def test_a_save_killed_while_it_replaces_a_bad_one_leaves_a_valid_one(tmp_path):
    kill_everywhere(tmp_path, replacing_save, check_names=False)


def test_a_save_killed_while_it_replaces_a_valid_one_leaves_a_valid_one(tmp_path):
    """For example after a commit that succeeded, though the disk reported an error: the same step is saved again."""

    def prepare(directory: Path) -> None:
        save(directory, 4, attempt=1)
        another = CheckpointWriter(open_backend(directory), identity={}, attempt=1)
        another.set_fence()
        another.save(tensors(5), Progress(step=8, samples_consumed=8, optimizer_steps=8))

    prepare(tmp_path / "whole")
    job = partial(save, attempt=2)
    operations = traced(partial(job, tmp_path / "whole", 8), tmp_path / "whole")
    assert any("bad-step-00000008" in str(path) for path in (tmp_path / "whole").iterdir())
    for number in range(1, len(operations) + 1):
        directory = tmp_path / str(number)
        prepare(directory)
        assert traced(partial(job, directory, 8), directory, number) is None
        CheckpointWriter(open_backend(directory), identity={}, attempt=3).set_fence()  # as the next attempt does before it searches
        newest = catalog.newest_valid(open_backend(directory))
        assert newest.progress.step == 8, operations[number - 1]
        assert any(holds_tensors(directory, newest, seed) for seed in (5, 8))
        assert [path.name for path in directory.iterdir() if not KEPT.fullmatch(path.name)] == []
        shutil.rmtree(directory)


def test_a_save_without_latest_is_committed(tmp_path, caplog):
    (tmp_path / "latest").mkdir()  # no file can be renamed to it
    save(tmp_path, 8, attempt=1)
    assert catalog.newest_valid(open_backend(tmp_path)).progress.step == 8
    assert "latest: Is a directory; step-00000008 is saved nevertheless" in caplog.text


def test_the_check_detects_a_rename_before_the_manifest(tmp_path, monkeypatch):
    def rename_too_early(self: DirectoryBackend, name: str, token: str, manifest: bytes) -> None:
        (self.path / self._uncommitted(name, token)).rename(self.path / name)
        write_atomically(self.path / name / MANIFEST, manifest)

    monkeypatch.setattr(DirectoryBackend, "commit", rename_too_early)
    with pytest.raises(Exception, match=r"step-00000008/manifest.json: No such file"):
        kill_everywhere(tmp_path, later_save)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
from test_checkpoint_crash import save
save(Path(sys.argv[2]), 8, attempt=2)
"""
CHANGES = {"unlink": "remove", "unlinkat": "remove"}  # names of audit events


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace on this machine")
def test_the_tracer_sees_every_operation_that_strace_sees(tmp_path):
    for name in ("ours", "theirs"):
        later_save(tmp_path / name)
    operations = traced(partial(save, tmp_path / "ours", 8, attempt=2), tmp_path / "ours")
    ours = Counter(operation.split()[0] for operation in operations)
    calls = "openat,mkdir,rename,unlink,unlinkat,rmdir,fsync,write,pwrite64,writev,ftruncate,fdatasync,link,symlink,renameat,renameat2"
    log = tmp_path / "log"
    command = ["strace", "-f", "-y", "-o", log, "-e", f"trace={calls}"]
    command += [sys.executable, "-c", SCRIPT, ":".join(sys.path), str(tmp_path / "theirs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    if "ptrace" in done.stderr:
        pytest.skip(f"strace is not permitted: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    theirs: Counter[str] = Counter()
    buffered = 0
    for line in log.read_text().splitlines():
        found = re.match(r"\d+ +(\w+)\((.*)", line)
        if not found or str(tmp_path / "theirs") not in found[2]:
            continue
        call, arguments = found[1], found[2]
        if call == "openat":
            theirs["open"] += "O_CREAT" in arguments or "O_WRONLY" in arguments or "O_RDWR" in arguments
        elif call == "unlinkat" and "AT_REMOVEDIR" in arguments:
            theirs["rmdir"] += 1
        else:
            theirs[CHANGES.get(call, call)] += 1
            buffered += call == "write" and ".tmp" in arguments
    assert buffered == sum(".tmp" in operation for operation in operations if operation.startswith("fsync"))
    theirs["write"] -= buffered  # counted, and halved, when they are synced
    assert theirs == ours


def save_on_two_ranks(directory: Path, killed: int, kill_at: int) -> None:
    writer = CheckpointWriter(open_backend(directory), identity={}, attempt=2)
    writer.set_fence()
    if int(os.environ["RANK"]) == killed:
        Tracer(directory, kill_at)
    writer.save(tensors(8), Progress(step=8, samples_consumed=8, optimizer_steps=8))


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 4), (0, 2), (0, 4), (0, 9))]


@pytest.mark.parametrize(("killed", "kill_at"), [(1, 2), (0, 7), *SLOW])
def test_a_rank_killed_during_a_save_leaves_the_older_checkpoint(tmp_path, killed, kill_at):
    save(tmp_path, 4, attempt=1)
    with pytest.raises(AssertionError, match=r"died|Error"):
        spmd(save_on_two_ranks, 2, tmp_path, killed, kill_at)
    check(tmp_path, {4})


def fail_on_rank_1(directory: Path) -> str:
    writer = CheckpointWriter(open_backend(directory), identity={}, attempt=2)

    class OddError(Exception):
        """A local class, which cannot be sent to another process."""

    def fail(*_) -> str:
        raise OddError("no")

    if int(os.environ["RANK"]) == 1:
        writer.backend.write = fail
    try:
        writer.save(tensors(8), Progress(step=8, samples_consumed=8, optimizer_steps=8))
    except RuntimeError as error:
        return str(error)
    return ""


def test_any_error_of_one_rank_is_raised_on_all_ranks(tmp_path):
    save(tmp_path, 4, attempt=1)
    assert spmd(fail_on_rank_1, 2, tmp_path, timeout=30) == ["rank 1: OddError: no"] * 2
    check(tmp_path, {4})
