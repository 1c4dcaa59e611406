"""Manifests with right hashes and wrong contents: each is refused in a line, or the tensors that are loaded are those that were saved.

The checkpoint is a real one, of a run on two ranks under ZeRO-1. Its manifest is changed as JSON and then sealed again.
"""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from fuzz import assert_refused_or_done, call, manta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from old_run import HERE, copy_old_run
from tree_edits import EDIT, Edit, edit

from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.storage import open_backend

NAME = "step-00000010"
ORIGINAL = HERE / "workspace/run/checkpoints" / NAME
HOSTILE = [
    *(None, True, False, -1, 0, 1, 2, 7, 99, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, "5000 digits", 1.5, 1e300, math.nan, math.inf),
    *(
        "",
        "x",
        "F32",
        "I64",
        "BF16",
        "Q8",
        "../x",
        "a/../../b",
        "/etc/passwd",
        "\0",
        "\ud800",
        "\x1b[2J",
        "x" * 5000,
        "rank-0001.safetensors",
    ),
    *([], {}, [[]], [{}], {"": {}}, [0] * 5000, [[0, 8, [], []]], [2**32] * 3, [2**40] * 12, json.loads("[" * 150 + "]" * 150)),
]


def seal(manifest: dict) -> bytes:
    """Return a manifest's bytes, with the hash of what it says."""
    body = json.dumps({key: value for key, value in manifest.items() if key != "xxh3"}, separators=(",", ":"))[1:].encode()
    body = body.replace(b'"5000 digits"', b"9" * 5000)
    return b'{"xxh3":"%s",\n%s\n' % (xxhash.xxh3_128_hexdigest(body).encode(), body)


@pytest.fixture(scope="module")
def manifest() -> dict:
    return json.loads((ORIGINAL / "manifest.json").read_text())


@pytest.fixture(scope="module")
def saved() -> dict[str, torch.Tensor]:
    """Every tensor of the original, loaded whole."""
    return load(ORIGINAL.parent)


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    shutil.copytree(ORIGINAL, tmp_path / "checkpoints" / NAME)
    return tmp_path / "checkpoints"


def load(directory: Path) -> dict[str, torch.Tensor]:
    """Load the checkpoint as two ranks would that hold the first and the second half of each tensor."""
    backend, tensors = open_backend(directory), {}

    def restore(checkpoint) -> None:
        for key, shape in checkpoint.shapes.items():
            tensors[key] = torch.full((math.prod(shape),), math.nan)
        for half in range(2):
            state = {}
            for key, shape in checkpoint.shapes.items():
                start, count = half * (tensors[key].numel() // 2), tensors[key].numel() // 2 + half * (tensors[key].numel() % 2)
                flat = tensors[key].narrow(0, start, count)
                state[key] = TensorViews.from_flat(shape, flat, local_shape=shape, offsets=(0,) * len(shape), start=start)
            catalog.load(backend, checkpoint, state, checkpoint.shapes, verify="full")

    catalog.restore_one(backend, NAME, restore)
    return tensors


def check(checkpoints: Path, content: bytes, saved: dict[str, torch.Tensor]) -> str | None:
    """Read the checkpoint with every command, and load it. Return why it was refused, if it was."""
    (checkpoints / NAME / "manifest.json").write_bytes(content)
    directory = str(checkpoints / NAME)
    assert_refused_or_done(manta("checkpoint", "list", directory, "--json"), 0)
    assert_refused_or_done(manta("checkpoint", "list", directory), 0)
    verified = manta("checkpoint", "verify", directory)
    assert_refused_or_done(verified, *((0,) if verified.stdout.count(" valid: ") == 1 else (1,)))
    assert_refused_or_done(manta("checkpoint", "inspect", directory, "--match", "blocks.0.*"), 0, 1, 2)
    outcome = call(lambda: catalog.load_newest_weights(open_backend(checkpoints)))
    assert_refused_or_done(outcome, verified.code)
    if verified.code:
        with pytest.raises(CheckpointError) as refused:
            load(checkpoints)
        assert "\n" not in str(refused.value)
        return str(refused.value)
    loaded = load(checkpoints)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in loaded.items()), "it was accepted, and holds other tensors"
    return None


PLACED = st.tuples(st.sampled_from(["", "files", "tensors", "tensors"]), EDIT)  # mostly in what decides from where bytes are loaded


def edited(manifest: dict, edits: list[tuple[str, Edit]]) -> dict:
    """Return a copy of the manifest with some of its values changed."""
    tree = copy.deepcopy(manifest)
    for section, change in edits:
        part = tree.get(section)
        if isinstance(part, dict | list) and part:
            edit({section: part}, [([0, *change[0]], *change[1:])], HOSTILE)
        else:
            edit(tree, [change], HOSTILE)
    return tree


def try_changed(checkpoints: Path, manifest: dict, saved: dict[str, torch.Tensor], count: int) -> None:
    refused: list[str | None] = []

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )
    @given(st.lists(PLACED, min_size=1, max_size=3))
    def each(edits: list[tuple[str, Edit]]) -> None:
        refused.append(check(checkpoints, seal(edited(manifest, edits)), saved))

    each()
    problems = [reason for reason in refused if reason is not None]
    assert len(problems) > len(refused) / 3, "most changes matter"
    assert not any("xxh3: expected '" in problem for problem in problems), "all were sealed"


def test_hostile_manifests_are_refused_or_harmless(checkpoints, manifest, saved):
    try_changed(checkpoints, manifest, saved, count=15)


@pytest.mark.slow
def test_many_hostile_manifests_are_refused_or_harmless(checkpoints, manifest, saved):
    try_changed(checkpoints, manifest, saved, count=1000)


def test_the_manifest_itself_is_accepted(checkpoints, manifest, saved):
    assert check(checkpoints, seal(manifest), saved) is None
    assert check(checkpoints, seal(dict(sorted(manifest.items(), reverse=True))), saved) is None


KEY, MATRIX = "master/blocks.0.attention.q_proj.weight", "exp_avg/blocks.0.attention.q_proj.weight"


def change(manifest: dict, what: str) -> None:  # noqa: C901, PLR0912  a table
    """Change one thing, in a way that a check of the hash alone does not find."""
    files, tensors = manifest["files"], manifest["tensors"]
    chunks = tensors[KEY]["chunks"]
    match what:
        case "no chunks":
            chunks.clear()
        case "a chunk of file 99":
            chunks[0][0] = 99
        case "a chunk twice":
            chunks.append(chunks[0])
        case "two chunks with each other's bytes":
            chunks[0][1], tensors[MATRIX]["chunks"][0][1] = tensors[MATRIX]["chunks"][0][1], chunks[0][1]
        case "two tensors with each other's chunks":
            tensors[KEY], tensors[MATRIX] = tensors[MATRIX], tensors[KEY]
        case "a chunk outside of its file":
            chunks[0][1] = files[0][1]
        case "a chunk in the header":
            chunks[0][1] = 0
        case "a larger shape":
            tensors[KEY]["shape"][0] += 1
        case "a shape that no memory holds":
            tensors[KEY]["shape"] = [2**62, 2**62]
        case "no tensors":
            tensors.clear()
        case "a tensor less":
            del tensors[KEY]
        case "the optimizer's state as integers":
            tensors[KEY]["dtype"] = "I64"
        case "a file outside of the checkpoint":
            files[0][0] = "../rank-0000.safetensors"
        case "a file that does not exist":
            files[0][0] = "rank-0007.safetensors"
        case "the same file twice":
            files[1] = files[0]
        case "too few hashes":
            files[0][2].clear()


CHANGES = {
    "no chunks": "expected chunks that cover each element",
    "a chunk of file 99": "expected chunks of its shape in the 2 files",
    "a chunk twice": "expected chunks that cover each element",
    "two chunks with each other's bytes": "header: expected the manifest's chunks",
    "two tensors with each other's chunks": "header: expected the manifest's chunks",
    "a chunk outside of its file": "expected chunks ",
    "a chunk in the header": "expected chunks ",
    "a larger shape": "expected chunks that cover each element",
    "a shape that no memory holds": "expected chunks that cover each element",
    "no tensors": "header: expected the manifest's chunks",
    "a tensor less": "header: expected the manifest's chunks",
    "the optimizer's state as integers": "expected chunks that share no bytes",
    "a file outside of the checkpoint": "files.0.0: String should match pattern",
    "a file that does not exist": "rank-0007.safetensors: No such file",
    "the same file twice": "expected each name once",
    "too few hashes": "expected a hash of each MiB",
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_checkpoint_that_is_not_whole_is_refused_although_its_hash_is_right(checkpoints, manifest, saved, what):
    hostile = copy.deepcopy(manifest)
    change(hostile, what)
    assert CHANGES[what] in str(check(checkpoints, seal(hostile), saved))


@pytest.mark.parametrize("what", ["no chunks", "two tensors with each other's chunks"])
def test_a_checkpoint_that_is_not_whole_is_neither_used_nor_published(tmp_path, manifest, what):
    run = copy_old_run(tmp_path / "workspace")
    hostile = copy.deepcopy(manifest)
    change(hostile, what)
    (run / "checkpoints" / NAME / "manifest.json").write_bytes(seal(hostile))
    for command in (("generate", str(run), "a", "--tokens", "1"), ("export", str(run), "--output", str(tmp_path / "exported"))):
        outcome = manta(*command)
        assert_refused_or_done(outcome, 1)
        assert CHANGES[what] in outcome.output
        assert not outcome.stdout
    assert not (tmp_path / "exported").exists()


def put(file: Path, kind: str) -> None:  # noqa: C901  a table
    """Replace a file by another one."""
    content = file.read_bytes()
    file.unlink()
    match kind:
        case "pipe":
            os.mkfifo(file)
        case "directory":
            file.mkdir()
        case "link to itself":
            file.symlink_to(file)
        case "endless device":
            file.symlink_to("/dev/zero")
        case "nothing":
            pass
        case "1 GB of nothing":
            with file.open("wb") as sparse:
                sparse.truncate(1 << 30)
        case "half of it":
            file.write_bytes(content[: len(content) // 2])
        case "no bytes":
            file.write_bytes(b"")
        case "lists in lists":
            file.write_bytes(b"[" * 100_000)
        case "other JSON":
            file.write_text('{"attempt": "x", "token": [], "step": {}}\n')


KINDS = [
    "pipe",
    "directory",
    "link to itself",
    "endless device",
    "1 GB of nothing",
    "half of it",
    "no bytes",
    "lists in lists",
    "other JSON",
]


@pytest.mark.parametrize("file", ["manifest.json", "rank-0001.safetensors"])
@pytest.mark.parametrize("kind", [*KINDS, "nothing"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(checkpoints, kind, file, caplog):
    older = checkpoints / "step-00000005"
    shutil.copytree(ORIGINAL, older)
    (older / "manifest.json").write_bytes(seal(json.loads((ORIGINAL / "manifest.json").read_text()) | {"step": 5}))
    put(checkpoints / NAME / file, kind)
    verified = manta("checkpoint", "verify", str(checkpoints / NAME))
    assert_refused_or_done(verified, 1)
    assert file in verified.stdout
    assert_refused_or_done(manta("checkpoint", "list", str(checkpoints.parent)), 0)
    assert_refused_or_done(manta("checkpoint", "prune", str(checkpoints.parent), "--keep", "1", "--bad"), 0)
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000005", NAME], "the newest valid one is kept"
    found = catalog.restore_newest(open_backend(checkpoints), lambda _: None)
    assert found.progress.step == 5
    assert file in caplog.text
    assert [path.name for path in checkpoints.glob("bad-*")] == [f"bad-{NAME}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_fence_is_reported_in_a_line(checkpoints, kind):
    fence = checkpoints / "fence.json"
    fence.write_text('{"attempt": 1, "token": "a0001-12345678"}\n')
    put(fence, kind)
    outcome = call(lambda: open_backend(checkpoints).set_fence(2, "a0002-12345678"))
    assert_refused_or_done(outcome, 1)
    assert outcome.stderr.startswith(f"manta: {fence}: damaged (")
    assert outcome.stderr.endswith("Delete it once no other attempt runs.\n")


@pytest.mark.parametrize("kind", ["pipe", "directory", "link to itself", "1 GB of nothing"])
def test_what_is_called_latest_does_not_matter(checkpoints, kind):
    latest = checkpoints / "latest"
    latest.write_text(f"{NAME}\n")
    put(latest, kind)
    assert_refused_or_done(manta("checkpoint", "list", str(checkpoints.parent)), 0)
    assert catalog.newest_valid(open_backend(checkpoints)).name == NAME
