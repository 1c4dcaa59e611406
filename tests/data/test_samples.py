"""Samples by number: the windows of the corpus, each once per epoch, on any rank."""

import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from small_corpora import SMALL, config, documents, write_lines

from manta.data.config import CacheConfig
from manta.data.errors import InputError
from manta.data.objectives.examples import Examples
from manta.data.prepare import prepare
from manta.data.sampling.order import Order
from manta.data.sampling.samples import Samples
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import PreparedData
from manta.data.shards.windows import TokenStream

T = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> PreparedData:
    """Two sources, the first of fifteen shards."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "many").mkdir()
    for part in range(15):
        write_lines(folder / "many" / f"{part:02d}.jsonl", documents(10, seed=part))
    one = write_lines(folder / "one.jsonl", documents(40, seed=9))
    return prepare.prepare(config(folder / "corpora", folder / "many", one), SMALL)


def open_samples(prepared: PreparedData, *, seed: int = 0, sequence_length: int = T, **more) -> Samples:
    return Samples(prepared, config(Path("corpora"), "unread", sequence_length=sequence_length, **more), SMALL, seed=seed)


def text(examples: Examples) -> list[list[int]]:
    """Return the windows that causal examples were made of."""
    return np.concatenate([examples.tokens, examples.targets[:, -1:]], axis=1).tolist()


def total(opened: Samples) -> int:
    """Return the windows of an epoch of all sources."""
    (source,) = opened.sampler.sources
    return len(source.dataset)


def stream(root: str, split: str) -> np.ndarray:
    home = CorpusDirectory(root, CacheConfig())
    return np.concatenate([home.tokens(shard) for shard in getattr(manifest.load_manifest(home), split).shards])


def windows(prepared: PreparedData, split: str) -> list[list[int]]:
    """Return T + 1 tokens at every T of each source's tokens."""
    found = []
    for root in prepared.corpora:
        tokens = stream(root, split).tolist()
        found += [tokens[at : at + T + 1] for at in range(0, len(tokens) - T, T)]
    return found


def test_samples_are_windows_in_the_order_of_the_seed(prepared):
    opened = open_samples(prepared, seed=5)
    expected = windows(prepared, "train")
    assert total(opened) == len(expected)
    numbers = np.arange(3 * total(opened) - 7, 3 * total(opened) + 25)  # across epochs
    got = opened.train(numbers)
    assert got.samples.tolist() == numbers.tolist()
    assert {array.dtype for array in (got.tokens, got.targets, got.positions, got.samples)} == {np.dtype(np.int64)}
    assert text(got) == [expected[window] for window in Order(total(opened), seed=5)(numbers)[1]]


def test_any_number_of_ranks_reads_each_window_once_per_epoch(prepared):
    opened = open_samples(prepared, seed=5)
    for ranks in (1, 3):
        epoch = np.arange(total(opened))
        read = [row for rank in range(ranks) for row in text(opened.train(epoch[rank::ranks]))]
        assert sorted(read) == sorted(windows(prepared, "train"))


def test_validation_covers_all_sources_and_ignores_the_seed(prepared):
    opened = open_samples(prepared, seed=5)
    expected = windows(prepared, "validation")
    read = text(opened.validation(np.arange(opened.validation_windows)))
    assert sorted(read) == sorted(expected)
    assert text(open_samples(prepared, seed=6).validation(np.array([3, 3, 0]))) == [read[3], read[3], read[0]]
    first = [expected.index(row) for row in read[: len(read) // 4]]
    assert min(first) < len(expected) / 3
    assert max(first) > 2 * len(expected) / 3
    with pytest.raises(IndexError):
        opened.validation(np.array([opened.validation_windows]))


def test_a_sample_can_span_several_shards(prepared):
    length = 2500
    opened = open_samples(prepared, sequence_length=length)
    tokens = stream(prepared.corpora[0], "train")
    assert max(shard.tokens for shard in manifest.load_manifest(CorpusDirectory(prepared.corpora[0], CacheConfig())).train.shards) < length
    order = Order(total(opened), seed=0)(np.arange(total(opened)))[1]
    first = int(np.flatnonzero(order == 0)[0])
    assert np.array_equal(text(opened.train(np.array([first])))[0], tokens[: length + 1])


def test_samples_do_not_depend_on_the_limit_of_open_shards(prepared, monkeypatch):
    numbers = np.arange(200)
    expected = open_samples(prepared, seed=5).train(numbers).tokens
    for function in (TokenStream.map, TokenStream._view):
        monkeypatch.setattr(TokenStream, function.__name__, lru_cache(1)(function.__wrapped__))
    assert np.array_equal(open_samples(prepared, seed=5).train(numbers).tokens, expected)


@pytest.fixture
def damaged(prepared, tmp_path) -> PreparedData:
    """A copy that a test may damage."""
    target = tmp_path / "copy"
    target.mkdir()
    for path in Path(prepared.corpora[0]).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return PreparedData(tokenizer=prepared.tokenizer, corpora=(str(target), prepared.corpora[1]), fingerprint=prepared.fingerprint)


def refused(prepared: PreparedData) -> str:
    with pytest.raises(InputError) as caught:
        open_samples(prepared)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_truncated_or_missing_shard_is_refused(damaged):
    open_samples(damaged)
    path = Path(damaged.corpora[0]) / "piece-00002.train.bin"
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 2)
    assert refused(damaged) == f"{path}: expected {len(whole)} bytes, got {len(whole) - 2}. Run `manta prepare` again."
    path.unlink()
    assert refused(damaged) == f"{path}: missing. Run `manta prepare` again."


def test_a_missing_older_or_altered_manifest_is_refused(damaged):
    path = Path(damaged.corpora[0]) / manifest.MANIFEST
    spec = json.loads(path.read_bytes())
    path.write_text(json.dumps(spec | {"format": 0}))
    assert "format: expected 2, got 0" in refused(damaged)
    path.write_text(json.dumps(spec | {"surplus": 1}))
    assert "damaged; surplus: Extra inputs are not permitted. Run `manta prepare` again." in refused(damaged)
    path.write_text(json.dumps(spec | {"fingerprint": "0"}))
    assert "damaged; its content has changed since it was written" in refused(damaged)
    path.write_text(json.dumps(spec | {"fingerprint": "0", "xxh3": ""}))
    assert "fingerprint does not match its shards" in refused(damaged)
    path.unlink()
    assert "not prepared, or only in part" in refused(damaged)


def test_another_corpus_or_tokenizer_is_refused(prepared, tmp_path):
    turned = PreparedData(tokenizer=prepared.tokenizer, corpora=prepared.corpora[::-1], fingerprint=prepared.fingerprint)
    assert "with which the run started, got" in refused(turned)
    other = tmp_path / "tokenizer.json"
    other.write_text(prepared.tokenizer.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert "not the tokenizer" in refused(PreparedData(tokenizer=other, corpora=prepared.corpora, fingerprint=prepared.fingerprint))
