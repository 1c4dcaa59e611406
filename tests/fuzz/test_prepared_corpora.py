"""Damaged directories of prepared corpora: every command repairs them, refuses them in a line, or reads what was written."""

import filecmp
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fuzz import assert_refused_or_done, call, manta
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small_corpora import documents, write_lines

from manta.data.errors import InputError
from manta.data.prepare.prepare import find_prepared
from manta.data.sampling.samples import Samples
from manta.data.shards.manifest import MANIFEST
from manta.launch.config import load

pytestmark = pytest.mark.usefixtures("home")

CONFIG = """
run: {dir: run}
data:
  sources: {some: some.jsonl, others: others.txt}
  mixture: {some: 0.5, others: 0.5}
  sequence_length: 32
  validation: 0.1
  packing: best_fit
  workers: 1
tokenizer: {vocabulary: 400, train_bytes: 20000}
model: {preset: llama-tiny}
train: {steps: 2, global_batch: 8, micro_batch: 4}
"""
COMMANDS = (("data", "verify"), ("data", "inspect"), ("data", "mixture"))
VALUES = (None, True, -1, 0, 10**30, 1.5, float("nan"), "", "x" * 100_000, "../../etc/passwd", "\x00", "\ud800", [], {}, [[]], {"x": {}})
TEXTS = (
    b"",
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"1e999",
    b"NaN",
    b"9" * 5000,
    b"[" * 100_000,
    b'{"format": 2}',
    b"\xff\xfe",
    b'{"a": "\\ud800"}',
)


def sparse(path: Path, _: bytes) -> None:
    os.truncate(path, 1 << 30)


def replace_by_directory(path: Path, _: bytes) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path, _: bytes) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(target: str):
    def link(path: Path, _: bytes) -> None:
        path.unlink()
        path.symlink_to(path if target == "itself" else target)

    return link


FILES = (
    sparse,
    replace_by_directory,
    replace_by_pipe,
    replace_by_link("itself"),
    replace_by_link("missing"),
    replace_by_link("/dev/zero"),
    lambda path, _: path.unlink(),
    lambda path, content: path.write_bytes(bytes(len(content))),
    lambda path, content: path.write_bytes(content[: len(content) // 2]),
    lambda path, content: path.write_bytes(content + b"\n{}"),
    lambda path, content: path.write_bytes(content[::-1]),
    *(lambda path, _, text=text: path.write_bytes(text) for text in TEXTS),
)


def set_value(draw, tree: object) -> None:
    """Replace one value, or the name of a key, somewhere in a JSON document."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if isinstance(tree[key], (dict, list)) and draw(st.booleans()):
            tree = tree[key]
            continue
        if isinstance(tree, dict) and draw(st.integers(0, 4)) == 0:
            tree["other"] = tree.pop(key)
        else:
            tree[key] = draw(st.sampled_from(VALUES))
        return


def parse(content: bytes) -> dict | list | None:
    """Return a JSON document; None if an earlier damage has left none."""
    with suppress(ValueError, RecursionError):
        tree = json.loads(content)
        return tree if isinstance(tree, dict | list) else None
    return None


def damage(draw, directory: Path) -> None:
    path = draw(st.sampled_from(sorted(path for path in directory.rglob("*") if path.is_file())))
    content = path.read_bytes()
    if path.suffix == ".json" and draw(st.booleans()) and (tree := parse(content)):
        set_value(draw, tree)
        path.write_text(json.dumps(tree), encoding="utf-8", errors="surrogatepass")
    elif draw(st.integers(0, 3)) == 0 and content:
        flipped = bytearray(content)
        flipped[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
        path.write_bytes(flipped)
    else:
        draw(st.sampled_from(FILES))(path, content)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write_lines(folder / "some.jsonl", documents(60))
    (folder / "others.txt").write_text("\n\n".join(documents(80, seed=1)))
    (folder / "run.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert manta("prepare", "run.yaml").code == 0
        shutil.copytree("corpora", "intact")
        np.save("samples.npy", read_samples())
        yield folder


def read_samples() -> np.ndarray:
    """Return all samples of an epoch, as a run reads them."""
    config = load(Path("run.yaml"), [])
    prepared = find_prepared(config.data, config.tokenizer)
    if prepared is None:
        raise InputError("not prepared")
    samples = Samples(prepared, config.data, config.tokenizer, seed=1)
    return np.stack([samples.train(np.arange(first, first + 8)).tokens for first in range(0, 80, 8)])


def check(*commands: tuple[str, ...]) -> None:
    """Check what commands make of ./corpora."""
    for command in commands:
        assert_refused_or_done(manta(*command, "run.yaml"), 0, 2)
    found: list[np.ndarray] = []
    assert_refused_or_done(call(lambda: found.append(read_samples())), 0, 2)
    if found and has_intact_tokens():  # all of them are read by `manta data verify` only
        assert (found[0] == np.load("samples.npy")).all()
    prepared = manta("prepare", "run.yaml")
    assert_refused_or_done(prepared, 0, 1, 2)
    if prepared.code == 0:
        assert files("corpora") == files("intact")
        assert manta("data", "verify", "run.yaml").code == 0


def has_intact_tokens() -> bool:
    names = (path.relative_to("intact") for path in Path("intact").rglob("*") if path.name.endswith((".train.bin", ".validation.bin")))
    pairs = [(Path("intact", name), Path("corpora", name)) for name in names]
    return all(found.is_file() and filecmp.cmp(intact, found, shallow=False) for intact, found in pairs)


def check_drawn(data) -> None:
    copy_intact()
    for _ in range(data.draw(st.integers(1, 2))):
        damage(data.draw, Path("corpora"))
    check(data.draw(st.sampled_from(COMMANDS)))


def copy_intact() -> None:
    shutil.rmtree("corpora")
    shutil.copytree("intact", "corpora")


def files(directory: str) -> dict[str, object]:
    """Return what runs read: bytes, and of manifests the values, which damage may leave as they were.

    A manifest that lost its hash counts as an older one. The records of input splits, which only a preparation that resumes reads, are
    not repaired.
    """

    def values(content: bytes) -> dict[str, object]:
        return {key: value for key, value in json.loads(content).items() if key != "xxh3"}

    paths = (path for path in Path(directory).rglob("*") if path.suffix in {".bin", ".idx"} or path.name in {MANIFEST, "tokenizer.json"})
    contents = {path: path.read_bytes() for path in paths}
    return {str(path.relative_to(directory)): values(content) if path.name == MANIFEST else content for path, content in contents.items()}


OPTIONS = {
    "database": None,
    "deadline": None,
    "phases": [Phase.generate],
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
}


DAMAGE = {
    "a shard that links to itself": ("piece-00000.train.bin", replace_by_link("itself")),
    "a manifest of a huge number": (MANIFEST, lambda path, content: path.write_bytes(content.replace(b": 2,", b": " + b"9" * 5000 + b","))),
    "a manifest that is a pipe": (MANIFEST, replace_by_pipe),
    "a packing of another order": ("*train.packing*.bin", lambda path, content: path.write_bytes(content[::-1])),
    "a tokenizer that is not text": ("tokenizer.json", lambda path, content: path.write_bytes(b"\xff" + content)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_any_file_of_a_corpus_may_be_damaged(kind):
    name, damage = DAMAGE[kind]
    copy_intact()
    path = next(Path("corpora").rglob(name))
    damage(path, path.read_bytes())
    check(*COMMANDS)


@settings(max_examples=6, derandomize=True, **OPTIONS)
@given(data=st.data())
def test_damaged_corpora_are_refused_or_repaired(data):
    check_drawn(data)


@pytest.mark.slow
@settings(max_examples=250, **OPTIONS)
@given(data=st.data())
def test_many_damaged_corpora_are_refused_or_repaired(data):
    check_drawn(data)
