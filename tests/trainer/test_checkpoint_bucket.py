"""Checkpoints in an object store: a real HTTP server on loopback, and connections that break."""

import math

import pytest
import torch
from object_store import BUCKET, ObjectStore, Proxy

from manta.data.storage import remote_requests
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.backend import ObjectStoreBackend, open_backend
from manta.trainer.checkpoint.catalog import Retention
from manta.trainer.checkpoint.errors import CheckpointError, FencedError, SaveError, UnreachableError
from manta.trainer.checkpoint.manifest import Checkpoint, Progress
from manta.trainer.checkpoint.reader import read_tensors
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.metrics import read_metrics

SHAPES = {"master/embedding.weight": (100, 450), "master/norm.weight": (64,)}
LARGE = SHAPES | {"master/embedding.weight": (1000, 4500)}  # 18 MB: more than one part of an upload


@pytest.fixture(scope="module")
def server():
    with ObjectStore() as server:
        yield server


@pytest.fixture(scope="module")
def before(server):
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def proxy(before, monkeypatch):
    for name, value in before.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_requests, "WAIT", 0.01)
    before.reset()
    return before


@pytest.fixture
def where(proxy, request) -> ObjectStoreBackend:
    del proxy
    found = open_backend(f"s3://{BUCKET}/{request.node.name.translate(str.maketrans('[]', '__'))}")
    assert isinstance(found, ObjectStoreBackend)
    return found


def tensors(step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, TensorViews]:
    random = torch.Generator().manual_seed(step)
    return {key: TensorViews.from_whole(torch.randn(shape, generator=random)) for key, shape in shapes.items()}


def progress(step: int) -> Progress:
    return Progress(step=step, samples_consumed=step, optimizer_steps=step)


def saver(where: ObjectStoreBackend, *, attempt: int = 1, **more) -> CheckpointWriter:
    return CheckpointWriter(where, identity={}, attempt=attempt, **more)


def is_of(where: ObjectStoreBackend, step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> bool:
    filled = {key: TensorViews.from_whole(torch.full(shape, math.nan)) for key, shape in shapes.items()}
    read_tensors(where, catalog.read_manifest(where, f"step-{step:08d}"), filled)
    return all(torch.equal(filled[key].views[0][1], pieces.views[0][1]) for key, pieces in tensors(step, shapes).items())


def objects(where: ObjectStoreBackend) -> list[str]:
    return [file.path.removeprefix(f"{where}/") for file in where.store.list()]


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_saved_is_listed_verified_read_and_kept_as_on_a_disk(where, asynchronous):
    begun = saver(where, retention=Retention(newest=1, best=1, every=4), asynchronous=asynchronous)
    begun.set_fence()
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0)):
        begun.save(tensors(step), progress(step), about={"validation_loss": loss}, wait=not asynchronous)
    begun.finish()
    assert where.names() == ["step-00000005", "step-00000004", "step-00000002"]
    assert catalog.newest_valid(where).progress == progress(5)
    assert all(is_of(where, step) for step in (5, 4, 2))
    assert where.store.read("latest") == b"step-00000005\n"
    assert len(objects(where)) == 3 * 2 + 2, "a file and a manifest each, the fence, and the newest one's name"


def test_a_damaged_or_missing_object_is_passed_over_and_set_aside(where, caplog):
    begun = saver(where)
    for step in (1, 2, 3):
        begun.save(tensors(step, LARGE), progress(step))
    second, third = (next(name for name in objects(where) if name.startswith(f"step-0000000{n}/a") and "rank" in name) for n in (2, 3))
    content = bytearray(where.store.read(f"{second}"))
    content[len(content) // 2] ^= 1
    where.store.write(f"{second}", bytes(content))
    where.store.delete(f"{third}")
    with pytest.raises(CheckpointError, match=r"step-00000002/a\S+/rank-0000.safetensors: xxh3 of bytes 8388608\.\.\."):
        catalog.verify(where, "step-00000002")
    assert catalog.restore_newest(where, lambda found: read_tensors(where, found, {})).progress.step == 1
    assert caplog.text.count("skipped a bad checkpoint") == 2
    assert where.names() == ["step-00000001"]
    assert where.bad() == ["step-00000002", "step-00000003"]
    saver(where, attempt=2).set_fence()
    assert second in objects(where), "what was set aside stays for whoever wants to look"
    where.delete("step-00000002")
    assert where.bad() == ["step-00000003"]


def test_a_dead_attempt_can_not_commit_and_leaves_nothing(where, monkeypatch):
    dead, live = saver(where, attempt=1), saver(where, attempt=2)
    dead.set_fence()
    with monkeypatch.context() as patch:
        patch.setattr(dead.backend, "commit", lambda *_: 1 / 0)  # it ends before
        patch.setattr(dead.backend, "abandon", lambda *_: None)
        with pytest.raises(ZeroDivisionError):
            dead.save(tensors(1), progress(1))
    assert len(objects(where)) == 2, "the fence, and what nobody will commit"
    live.set_fence()
    assert objects(where) == ["fence.json"]
    with pytest.raises(FencedError, match="attempt 2 has started since"):
        dead.save(tensors(1), progress(1))
    live.save(tensors(2), progress(2))
    assert where.names() == ["step-00000002"]
    assert not [name for name in objects(where) if name.startswith("step-00000001")]


def test_a_dead_attempt_that_thaws_at_the_very_commit_leaves_a_later_one_s_checkpoint_alone(where, monkeypatch):
    """It looked at the fence in time, then froze: no store can tell its manifest from one of a live attempt."""
    dead, live = saver(where, attempt=1), saver(where, attempt=2)
    dead.set_fence()
    write = where.store.write

    def freeze(name: str, content: bytes) -> None:
        if name.endswith("manifest.json") and "/a0001-" in name:
            live.set_fence()
            live.save(tensors(2), progress(2))
            live.save(tensors(3), progress(3))
        write(name, content)

    with monkeypatch.context() as patch:
        patch.setattr(where.store, "write", freeze)
        dead.save(tensors(2), progress(2))
    assert is_of(where, 2), "that of the attempt in the fence"
    saver(where, attempt=3).set_fence()
    assert is_of(where, 2), "that of the later one"
    assert catalog.restore_newest(where, lambda found: read_tensors(where, found, {})).progress.step == 3
    where.delete("step-00000002")
    assert where.names() == ["step-00000003"], "nor does the dead one's come to light"


def test_a_connection_cut_in_mid_upload_is_tried_again(where, proxy):
    proxy.hang_up(at=5_000_000, times=3)
    saver(where).save(tensors(1, LARGE), progress(1))
    assert proxy.hang_up_count == 3
    assert is_of(where, 1, LARGE)


def test_where_every_try_is_cut_nothing_counts_and_the_next_save_works(where, proxy):
    begun = saver(where, asynchronous=True)
    begun.save(tensors(1, LARGE), progress(1))
    proxy.hang_up(at=5_000_000, times=1000)
    begun.save(tensors(2, LARGE), progress(2), wait=False)
    with pytest.raises(SaveError, match=rf"rank 0: s3://\S+/rank-0000.safetensors: {remote_requests.TRIES} tries failed, the last with"):
        begun.finish()
    proxy.hang_up(at=0, times=0)
    assert where.names() == ["step-00000001"]
    assert not [name for name in objects(where) if name.startswith("step-00000002")]
    begun.save(tensors(2, LARGE), progress(2), wait=False)
    begun.finish()
    assert is_of(where, 2, LARGE)


def test_a_store_that_can_not_be_reached_makes_no_checkpoint_bad(where, proxy):
    """To go back to an older one, and set this one aside, because of a network would cost steps that are saved."""
    begun = saver(where)
    for step in (1, 2):
        begun.save(tensors(step), progress(step))
    key = next(f"{where}/{name}" for name in objects(where) if name.startswith("step-00000002/a") and "rank" in name).removeprefix(
        f"s3://{BUCKET}/"
    )

    def take(found: Checkpoint) -> None:
        read_tensors(where, found, {})

    for failing in (key, key.replace("rank-0000.safetensors", "manifest.json")):
        proxy.refuse(failing, status=503, times=1000)
        with pytest.raises(UnreachableError, match=rf"step-00000002/.*{remote_requests.TRIES} tries failed, the last with"):
            catalog.restore_newest(where, take)
        proxy.reset()
        assert where.names() == ["step-00000002", "step-00000001"]
        assert where.bad() == []
    assert catalog.restore_newest(where, take).progress.step == 2


def test_a_store_that_is_down_from_end_to_end_of_a_save_fails_it_and_no_more(where, proxy):
    begun = saver(where)
    begun.save(tensors(1), progress(1))
    proxy.hang_up(at=0, times=1000)
    proxy.refuse("", status=503, times=1000)  # nor can what was half written be looked for
    with pytest.raises(SaveError, match="tries failed"):
        begun.save(tensors(2), progress(2))
    proxy.reset()
    begun.save(tensors(3), progress(3))
    assert where.names() == ["step-00000003", "step-00000001"]


def test_a_place_that_can_not_be_written_is_told_before_a_run_begins(workspace, server):
    for there, wants in ((f"s3://{BUCKET}x/run", "no such bucket"), (str(workspace.config_file), "expected a directory")):
        told = workspace.manta("train", str(workspace.config_file), "run.dir=never", f"checkpoint.directory={there}", **server.environment)
        assert told.returncode == 2
        (line,) = told.stderr.splitlines()
        assert "checkpoint.directory: expected " in line
        assert wants in line
        assert not (workspace.directory / "never").exists()


@pytest.mark.slow
def test_a_run_saves_into_a_bucket_and_goes_on_from_there(workspace, server):
    there = f"checkpoint.directory=s3://{BUCKET}/run"
    for steps, more in ((18, ("checkpoint.keep=2",)), (24, ("parallel.zero=3",))):
        done = workspace.manta(
            "train", str(workspace.config_file), "run.dir=in a bucket", there, f"train.steps={steps}", *more, **server.environment
        )
        assert done.returncode == 0, done.stderr
    lines = read_metrics(workspace.directory / "in a bucket/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert [line["layout"] for line in lines] == ["data 2, ZeRO-1"] * 18 + ["data 2, ZeRO-3"] * 6
    listed = workspace.manta("checkpoint", "list", "in a bucket", **server.environment).stdout
    assert "step-00000024" in listed
    assert "step-00000018" in listed
    assert "step-00000012" not in listed
    verified = workspace.manta("checkpoint", "verify", f"s3://{BUCKET}/run", **server.environment)
    assert verified.returncode == 0
    assert verified.stdout.count("whole") == 2
    assert not (workspace.directory / "in a bucket/checkpoints").exists()
    start = ("run.dir=from a bucket", "train.steps=2", "--weights-only", f"s3://{BUCKET}/run")
    begun = workspace.manta("train", str(workspace.config_file), *start, **server.environment)
    assert begun.returncode == 0, begun.stderr
