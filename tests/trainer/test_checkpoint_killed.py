"""A process killed before, or in the midst of, any file operation of a save leaves the newest valid checkpoint to load."""

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
from manta.trainer.checkpoint.backend import DirectoryBackend, open_backend
from manta.trainer.checkpoint.catalog import Retention
from manta.trainer.checkpoint.manifest import MANIFEST, Checkpoint, Progress
from manta.trainer.checkpoint.reader import read_tensors
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.writer import CheckpointWriter

SHAPES = {"master/embedding.weight": (300, 1000), "master/norm.weight": (64,), "exp_avg/norm.weight": (64,)}
KEPT = re.compile(r"step-\d{8}|bad-step-\d{8}|fence\.json|latest")


def tensors(step: int) -> dict[str, TensorViews]:
    random = torch.Generator().manual_seed(step)
    return {key: TensorViews.from_whole(torch.randn(shape, generator=random)) for key, shape in SHAPES.items()}


def save(directory: Path, *steps: int, attempt: int) -> None:
    saver = CheckpointWriter(open_backend(directory), identity={}, attempt=attempt, retention=Retention(newest=1))
    saver.set_fence()
    for step in steps:
        saver.save(tensors(step), Progress(step=step, samples_consumed=step, optimizer_steps=step))


def is_of(directory: Path, found: Checkpoint, seed: int) -> bool:
    """Bit by bit."""
    filled = {key: TensorViews.from_whole(torch.zeros(shape)) for key, shape in SHAPES.items()}
    read_tensors(open_backend(directory), found, filled)
    return all(torch.equal(filled[key].views[0][1], pieces.views[0][1]) for key, pieces in tensors(seed).items())


def check(directory: Path, may_be: set[int]) -> None:
    """What is there is one of these, whole, and nothing else; and another attempt goes on, and leaves nothing lying about."""
    where = open_backend(directory)
    for name in where.names():
        catalog.verify(where, name)  # nothing that is half there has the name of a whole one
    latest = directory / "latest"
    assert not latest.exists() or latest.read_text().strip() in where.names()
    newest = catalog.newest_valid(where)
    assert (0 if newest is None else newest.progress.step) in may_be
    assert newest is None or is_of(directory, newest, newest.progress.step)
    save(directory, 12, attempt=3)
    assert catalog.newest_valid(where).progress.step == 12
    assert [path.name for path in directory.iterdir() if not KEPT.fullmatch(path.name)] == []


def first(directory: Path) -> set[int]:
    """The first save of a run."""
    del directory
    return {0, 8}


def later(directory: Path) -> set[int]:
    """After one that will be deleted."""
    save(directory, 4, attempt=1)
    return {4, 8}


def over_another(directory: Path) -> set[int]:
    """Where something has the name already: not of this run, for that would have gone on from it."""
    save(directory, 4, attempt=1)
    shutil.copytree(directory / "step-00000004", directory / "step-00000008")
    (directory / "step-00000008" / MANIFEST).unlink()
    return {4, 8}


def killed_everywhere(folder: Path, begin: Callable[[Path], set[int]], *, check_names: bool = True) -> list[str]:
    """Each operation, and in which half of it: checked after every kill. Gives all of the operations."""
    job = partial(save, attempt=2)
    whole = folder / "whole"
    begin(whole)
    operations = traced(partial(job, whole, 8), whole)
    for number in range(1, len(operations) + 1):
        for halfway in (False, True):
            if halfway and operations[number - 1].split()[0] not in {"write", "fsync"}:
                continue
            directory = folder / f"{number} {halfway}"
            may_be = begin(directory)
            assert traced(partial(job, directory, 8), directory, number, halfway=halfway) is None, "it was not killed"
            if not check_names and (directory / "step-00000008").exists() and not (directory / "step-00000008" / MANIFEST).exists():
                shutil.rmtree(directory / "step-00000008")
            check(directory, may_be)
            shutil.rmtree(directory)
    return operations


@pytest.mark.parametrize("begin", [pytest.param(first, marks=pytest.mark.slow), later])
def test_a_save_killed_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, begin):
    operations = killed_everywhere(tmp_path, begin)
    kinds = Counter(operation.split()[0] for operation in operations)
    assert kinds.keys() >= {"open", "write", "fsync", "rename", "mkdir"}
    assert len(operations) > 15
    if begin is later:
        assert kinds["remove"] == 2, "the older one's two files"
        assert kinds["rmdir"] == 1


@pytest.mark.slow
def test_a_save_killed_as_it_takes_another_s_place_leaves_a_whole_checkpoint(tmp_path):
    killed_everywhere(tmp_path, over_another, check_names=False)


def test_a_save_killed_as_it_takes_a_whole_one_s_place_loses_neither(tmp_path):
    """As where the commit itself went well, and then the disk said that it had not: the same step is saved once more."""

    def begin(directory: Path) -> None:
        save(directory, 4, attempt=1)
        another = CheckpointWriter(open_backend(directory), identity={}, attempt=1)
        another.set_fence()
        another.save(tensors(5), Progress(step=8, samples_consumed=8, optimizer_steps=8))

    begin(tmp_path / "whole")
    job = partial(save, attempt=2)
    operations = traced(partial(job, tmp_path / "whole", 8), tmp_path / "whole")
    assert any("bad-step-00000008" in str(path) for path in (tmp_path / "whole").iterdir())
    for number in range(1, len(operations) + 1):
        directory = tmp_path / str(number)
        begin(directory)
        assert traced(partial(job, directory, 8), directory, number) is None
        CheckpointWriter(open_backend(directory), identity={}, attempt=3).set_fence()  # as whoever goes on does before it looks
        newest = catalog.newest_valid(open_backend(directory))
        assert newest.progress.step == 8, operations[number - 1]
        assert any(is_of(directory, newest, seed) for seed in (5, 8))
        assert [path.name for path in directory.iterdir() if not KEPT.fullmatch(path.name)] == []
        shutil.rmtree(directory)


def test_a_save_whose_latest_can_not_be_written_counts(tmp_path, caplog):
    (tmp_path / "latest").mkdir()  # nothing can be renamed over it
    save(tmp_path, 8, attempt=1)
    assert catalog.newest_valid(open_backend(tmp_path)).progress.step == 8
    assert "latest: Is a directory; step-00000008 is saved nevertheless" in caplog.text


def test_the_check_notices_a_rename_before_the_manifest(tmp_path, monkeypatch):
    def too_early(self: DirectoryBackend, name: str, token: str, manifest: bytes) -> None:
        (self.path / self._uncommitted(name, token)).rename(self.path / name)
        write_atomically(self.path / name / MANIFEST, manifest)

    monkeypatch.setattr(DirectoryBackend, "commit", too_early)
    with pytest.raises(Exception, match=r"step-00000008/manifest.json: No such file"):
        killed_everywhere(tmp_path, later)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
from test_checkpoint_killed import save
save(Path(sys.argv[2]), 8, attempt=2)
"""
CHANGES = {"unlink": "remove", "unlinkat": "remove"}  # what an audit event calls otherwise


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace on this machine")
def test_tracing_misses_no_operation_that_the_kernel_sees(tmp_path):
    for name in ("ours", "theirs"):
        later(tmp_path / name)
    operations = traced(partial(save, tmp_path / "ours", 8, attempt=2), tmp_path / "ours")
    ours = Counter(operation.split()[0] for operation in operations)
    calls = "openat,mkdir,rename,unlink,unlinkat,rmdir,fsync,write,pwrite64,writev,ftruncate,fdatasync,link,symlink,renameat,renameat2"
    log = tmp_path / "log"
    command = ["strace", "-f", "-y", "-o", log, "-e", f"trace={calls}"]
    command += [sys.executable, "-c", SCRIPT, ":".join(sys.path), str(tmp_path / "theirs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    theirs: Counter[str] = Counter()
    buffered = 0
    for line in log.read_text().splitlines():
        found = re.match(r"\d+ +(\w+)\((.*)", line)
        if not found or str(tmp_path / "theirs") not in found[2]:
            continue
        call, given = found[1], found[2]
        if call == "openat":
            theirs["open"] += "O_CREAT" in given or "O_WRONLY" in given or "O_RDWR" in given
        elif call == "unlinkat" and "AT_REMOVEDIR" in given:
            theirs["rmdir"] += 1
        else:
            theirs[CHANGES.get(call, call)] += 1
            buffered += call == "write" and ".tmp" in given
    assert buffered == sum(".tmp" in operation for operation in operations if operation.startswith("fsync"))
    theirs["write"] -= buffered  # seen, and cut in half, when they are synced
    assert theirs == ours


def by_two(directory: Path, killed: int, kill_at: int) -> None:
    saver = CheckpointWriter(open_backend(directory), identity={}, attempt=2)
    saver.set_fence()
    if int(os.environ["RANK"]) == killed:
        Tracer(directory, kill_at)
    saver.save(tensors(8), Progress(step=8, samples_consumed=8, optimizer_steps=8))


SLOW = [pytest.param(*where, marks=pytest.mark.slow) for where in ((1, 4), (0, 2), (0, 4), (0, 9))]


@pytest.mark.parametrize(("killed", "kill_at"), [(1, 2), (0, 7), *SLOW])
def test_a_rank_killed_as_it_saves_leaves_the_checkpoint_before(tmp_path, killed, kill_at):
    save(tmp_path, 4, attempt=1)
    with pytest.raises(AssertionError, match=r"died|Error"):
        spmd(by_two, 2, tmp_path, killed, kill_at)
    check(tmp_path, {4})


def refused(directory: Path) -> str:
    saver = CheckpointWriter(open_backend(directory), identity={}, attempt=2)

    class OddError(Exception):
        """Known to this function alone: it can not be sent to another process."""

    def refuse(*_) -> str:
        raise OddError("no")

    if int(os.environ["RANK"]) == 1:
        saver.backend.write = refuse
    try:
        saver.save(tensors(8), Progress(step=8, samples_consumed=8, optimizer_steps=8))
    except RuntimeError as error:
        return str(error)
    return ""


def test_whatever_a_rank_fails_with_all_ranks_hear_of_it(tmp_path):
    save(tmp_path, 4, attempt=1)
    assert spmd(refused, 2, tmp_path, timeout=30) == ["rank 1: OddError: no"] * 2
    check(tmp_path, {4})
