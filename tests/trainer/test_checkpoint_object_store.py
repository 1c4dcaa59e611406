"""Checkpoints in an object store: an S3 server on loopback, and connections that break."""

import math

import pytest
import torch
from object_store import BUCKET, ObjectStore, Proxy

from manta.data.storage import remote_requests
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.errors import CheckpointError, FencedError, SaveError, UnreachableError
from manta.trainer.checkpoint.manifest import Checkpoint, Progress
from manta.trainer.checkpoint.reader import read_tensors
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.retention import Retention
from manta.trainer.checkpoint.storage import ObjectStoreBackend, open_backend
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.metrics import read_metrics

SHAPES = {"master/embedding.weight": (100, 450), "master/norm.weight": (64,)}
LARGE = SHAPES | {"master/embedding.weight": (1000, 4500)}  # 18 MB: more than one part of an upload


@pytest.fixture(scope="module")
def server():
    with ObjectStore() as server:
        yield server


@pytest.fixture(scope="module")
def shared_proxy(server):
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy, monkeypatch):
    for name, value in shared_proxy.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_requests, "WAIT", 0.01)
    shared_proxy.reset()
    return shared_proxy


@pytest.fixture
def backend(proxy, request) -> ObjectStoreBackend:
    del proxy
    backend = open_backend(f"s3://{BUCKET}/{request.node.name.translate(str.maketrans('[]', '__'))}")
    assert isinstance(backend, ObjectStoreBackend)
    return backend


def tensors(step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, TensorViews]:
    random = torch.Generator().manual_seed(step)
    return {key: TensorViews.from_whole(torch.randn(shape, generator=random)) for key, shape in shapes.items()}


def progress(step: int) -> Progress:
    return Progress(step=step, samples_consumed=step, optimizer_steps=step)


def open_writer(backend: ObjectStoreBackend, *, attempt: int = 1, **more) -> CheckpointWriter:
    return CheckpointWriter(backend, identity={}, attempt=attempt, **more)


def holds_step(backend: ObjectStoreBackend, step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> bool:
    loaded = {key: TensorViews.from_whole(torch.full(shape, math.nan)) for key, shape in shapes.items()}
    read_tensors(backend, catalog.read_manifest(backend, f"step-{step:08d}"), loaded)
    return all(torch.equal(loaded[key].views[0][1], pieces.views[0][1]) for key, pieces in tensors(step, shapes).items())


def object_names(backend: ObjectStoreBackend) -> list[str]:
    return [file.path.removeprefix(f"{backend}/") for file in backend.store.list()]


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_checkpoints_are_listed_verified_read_and_kept_as_on_a_disk(backend, asynchronous):
    writer = open_writer(backend, retention=Retention(newest=1, best=1, every=4), asynchronous=asynchronous)
    writer.set_fence()
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0)):
        writer.save(tensors(step), progress(step), about={"validation_loss": loss}, wait=not asynchronous)
    writer.finish()
    assert backend.names() == ["step-00000005", "step-00000004", "step-00000002"]
    assert catalog.newest_valid(backend).progress == progress(5)
    assert all(holds_step(backend, step) for step in (5, 4, 2))
    assert backend.store.read("latest") == b"step-00000005\n"
    assert len(object_names(backend)) == 3 * 2 + 2, "a file and a manifest each, the fence, and `latest`"


def test_a_damaged_or_missing_object_is_skipped_and_set_aside(backend, caplog):
    writer = open_writer(backend)
    for step in (1, 2, 3):
        writer.save(tensors(step, LARGE), progress(step))
    files = [name for name in object_names(backend) if "rank" in name]
    second, third = (next(name for name in files if name.startswith(f"step-0000000{step}/a")) for step in (2, 3))
    content = bytearray(backend.store.read(f"{second}"))
    content[len(content) // 2] ^= 1
    backend.store.write(f"{second}", bytes(content))
    backend.store.delete(f"{third}")
    with pytest.raises(CheckpointError, match=r"step-00000002/a\S+/rank-0000.safetensors: xxh3 of bytes 8388608\.\.\."):
        catalog.verify(backend, "step-00000002")
    assert catalog.restore_newest(backend, lambda found: read_tensors(backend, found, {})).progress.step == 1
    assert caplog.text.count("skipped a bad checkpoint") == 2
    assert backend.names() == ["step-00000001"]
    assert backend.bad() == ["step-00000002", "step-00000003"]
    open_writer(backend, attempt=2).set_fence()
    assert second in object_names(backend), "a checkpoint that was set aside is kept for inspection"
    backend.delete("step-00000002")
    assert backend.bad() == ["step-00000003"]


def test_a_dead_attempt_cannot_commit_and_leaves_nothing(backend, monkeypatch):
    dead, live = open_writer(backend, attempt=1), open_writer(backend, attempt=2)
    dead.set_fence()
    with monkeypatch.context() as patch:
        patch.setattr(dead.backend, "commit", lambda *_: 1 / 0)  # it dies first
        patch.setattr(dead.backend, "abandon", lambda *_: None)
        with pytest.raises(ZeroDivisionError):
            dead.save(tensors(1), progress(1))
    assert len(object_names(backend)) == 2, "the fence, and a file that will not be committed"
    live.set_fence()
    assert object_names(backend) == ["fence.json"]
    with pytest.raises(FencedError, match="attempt 2 has started since"):
        dead.save(tensors(1), progress(1))
    live.save(tensors(2), progress(2))
    assert backend.names() == ["step-00000002"]
    assert not [name for name in object_names(backend) if name.startswith("step-00000001")]


def test_a_late_commit_of_a_dead_attempt_replaces_no_checkpoint(backend, monkeypatch):
    """It froze after it checked the fence: the store cannot distinguish its manifest from a live attempt's."""
    dead, live = open_writer(backend, attempt=1), open_writer(backend, attempt=2)
    dead.set_fence()
    write = backend.store.write

    def write_late(name: str, content: bytes) -> None:
        if name.endswith("manifest.json") and "/a0001-" in name:
            live.set_fence()
            live.save(tensors(2), progress(2))
            live.save(tensors(3), progress(3))
        write(name, content)

    with monkeypatch.context() as patch:
        patch.setattr(backend.store, "write", write_late)
        dead.save(tensors(2), progress(2))
    assert holds_step(backend, 2), "the checkpoint of the attempt in the fence"
    open_writer(backend, attempt=3).set_fence()
    assert holds_step(backend, 2), "the checkpoint of the later attempt"
    assert catalog.restore_newest(backend, lambda found: read_tensors(backend, found, {})).progress.step == 3
    backend.delete("step-00000002")
    assert backend.names() == ["step-00000003"], "the dead attempt's checkpoint is deleted, too"


def test_a_connection_cut_during_an_upload_is_retried(backend, proxy):
    proxy.hang_up(at=5_000_000, times=3)
    open_writer(backend).save(tensors(1, LARGE), progress(1))
    assert proxy.hang_up_count == 3
    assert holds_step(backend, 1, LARGE)


def test_an_upload_that_always_fails_commits_nothing_and_the_next_works(backend, proxy):
    writer = open_writer(backend, asynchronous=True)
    writer.save(tensors(1, LARGE), progress(1))
    proxy.hang_up(at=5_000_000, times=1000)
    writer.save(tensors(2, LARGE), progress(2), wait=False)
    with pytest.raises(SaveError, match=rf"rank 0: s3://\S+/rank-0000.safetensors: {remote_requests.TRIES} tries failed, the last with"):
        writer.finish()
    proxy.hang_up(at=0, times=0)
    assert backend.names() == ["step-00000001"]
    assert not [name for name in object_names(backend) if name.startswith("step-00000002")]
    writer.save(tensors(2, LARGE), progress(2), wait=False)
    writer.finish()
    assert holds_step(backend, 2, LARGE)


def test_an_unreachable_store_makes_no_checkpoint_bad(backend, proxy):
    """To restore an older one because of a network fault would cost steps that are saved."""
    writer = open_writer(backend)
    for step in (1, 2):
        writer.save(tensors(step), progress(step))
    key = next(f"{backend}/{name}" for name in object_names(backend) if name.startswith("step-00000002/a") and "rank" in name).removeprefix(
        f"s3://{BUCKET}/"
    )

    def restore(found: Checkpoint) -> None:
        read_tensors(backend, found, {})

    for failing in (key, key.replace("rank-0000.safetensors", "manifest.json")):
        proxy.refuse(failing, status=503, times=1000)
        with pytest.raises(UnreachableError, match=rf"step-00000002/.*{remote_requests.TRIES} tries failed, the last with"):
            catalog.restore_newest(backend, restore)
        proxy.reset()
        assert backend.names() == ["step-00000002", "step-00000001"]
        assert backend.bad() == []
    assert catalog.restore_newest(backend, restore).progress.step == 2


def test_a_store_that_is_down_fails_one_save(backend, proxy):
    writer = open_writer(backend)
    writer.save(tensors(1), progress(1))
    proxy.hang_up(at=0, times=1000)
    proxy.refuse("", status=503, times=1000)  # nor can half-written objects be listed
    with pytest.raises(SaveError, match="tries failed"):
        writer.save(tensors(2), progress(2))
    proxy.reset()
    writer.save(tensors(3), progress(3))
    assert backend.names() == ["step-00000003", "step-00000001"]


def test_a_directory_that_cannot_be_written_is_refused_before_a_run(workspace, server):
    for location, expected in ((f"s3://{BUCKET}x/run", "no such bucket"), (str(workspace.config_file), "expected a directory")):
        arguments = (str(workspace.config_file), "run.dir=never", f"checkpoint.directory={location}")
        refused = workspace.manta("train", *arguments, **server.environment)
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert "checkpoint.directory: expected " in line
        assert expected in line
        assert not (workspace.directory / "never").exists()


@pytest.mark.slow
def test_a_run_saves_to_a_bucket_and_resumes_from_it(workspace, server):
    directory = f"checkpoint.directory=s3://{BUCKET}/run"
    for steps, more in ((18, ("checkpoint.keep=2",)), (24, ("parallel.zero=3",))):
        done = workspace.manta(
            "train", str(workspace.config_file), "run.dir=in a bucket", directory, f"train.steps={steps}", *more, **server.environment
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
    assert verified.stdout.count("valid") == 2
    assert not (workspace.directory / "in a bucket/checkpoints").exists()
    start = ("run.dir=from a bucket", "train.steps=2", "--weights-only", f"s3://{BUCKET}/run")
    writer = workspace.manta("train", str(workspace.config_file), *start, **server.environment)
    assert writer.returncode == 0, writer.stderr
