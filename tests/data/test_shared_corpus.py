"""A directory of corpora that another user prepared: what this user may not read is named, with what to change."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fuzz import Outcome, call
from small_corpora import SMALL, config, documents, write_lines

from manta.data.prepare.prepare import find_prepared, prepare
from manta.data.sampling.samples import Samples

OTHER = 12345  # a user who need not exist
pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")]


@contextmanager
def other_user() -> Iterator[None]:
    os.setegid(OTHER)
    os.seteuid(OTHER)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def shared(tmp_path):
    """A corpus that its owner prepared under umask 077, in a folder that everybody may enter."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    data = config(tmp_path / "corpora", write_lines(tmp_path / "some.jsonl", documents(80)), packing="best_fit")
    before = os.umask(0o077)
    prepare(data, SMALL)
    os.umask(before)
    (tmp_path / "some.jsonl").chmod(0o644)
    (tmp_path / "corpora").chmod(0o755)
    return data


def use(data) -> Outcome:
    """Open a corpus and read a sample, as a run does, as another user."""

    def read() -> None:
        prepared = find_prepared(data, SMALL) or prepare(data, SMALL)
        Samples(prepared, data, SMALL, seed=1).train(np.arange(4))

    with other_user():
        return call(read)


def share(directory: str) -> None:
    for path in Path(directory).rglob("*"):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))


def test_a_corpus_prepared_under_umask_077_is_refused_with_its_remedy(shared):
    outcome = use(shared)
    assert (outcome.code, outcome.stderr.count("\n")) == (2, 1), outcome.stderr
    (tokenizer,) = Path(shared.directory).glob("tokenizer-*")
    remedy = f"Its owner can share it (chmod -R go+rX {shared.directory}); or set another data.directory."
    assert outcome.stderr == f"manta: {tokenizer}/tokenizer.json: expected read access, got Permission denied. {remedy}\n"
    share(shared.directory)
    assert use(shared).code == 0


@pytest.mark.parametrize(
    "name", ["*.train.bin", "*.validation.idx", "packing-*.json", "*packing*.bin", "manifest.json", "tokenizer.json", ""]
)
def test_any_file_that_only_its_owner_can_read_is_named(shared, name):
    share(shared.directory)
    private = next(Path(shared.directory).rglob(name)) if name else Path(shared.directory)
    mode = private.stat().st_mode
    private.chmod(mode & ~(stat.S_IRWXG | stat.S_IRWXO))
    outcome = use(shared)
    assert (outcome.code, outcome.stderr.count("\n")) == (2, 1), outcome.stderr
    assert f"{private}" in outcome.stderr
    assert "expected read access, got Permission denied. Its owner can share it" in outcome.stderr
    private.chmod(mode)
    assert use(shared).code == 0


def test_a_shard_that_becomes_private_while_a_run_reads_it_is_named(shared):
    share(shared.directory)
    prepared = find_prepared(shared, SMALL)
    samples = Samples(prepared, shared, SMALL, seed=1)
    shard = Path(prepared.corpora[0]) / "piece-00000.train.bin"
    shard.chmod(0o600)
    with other_user():
        outcome = call(lambda: samples.train(np.arange(4)))
    assert (outcome.code, outcome.stderr.count("\n")) == (2, 1), outcome.stderr
    assert f"manta: {shard}: expected read access" in outcome.stderr
