"""Verification finds every damaged file of a prepared corpus, and reads each file once."""

from pathlib import Path

import numpy as np
import pytest
from small_corpora import SMALL, config, documents, write_lines

from manta.data.config import CacheConfig, DataConfig, TokenizerConfig
from manta.data.objectives.objective import window_shape
from manta.data.prepare import prepare
from manta.data.prepare.verify import Damage, corpus_size, verify
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import PreparedData


def find_damage(prepared: PreparedData, data: DataConfig) -> list[Damage]:
    corpora = [(home := CorpusDirectory(root, CacheConfig()), manifest.load_manifest(home)) for root in prepared.corpora]
    read = []
    found = verify(corpora, window_shape(data), advance=read.append)
    if not found:
        assert sum(read) == corpus_size(corpora, window_shape(data))[1]
    return found


def flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_packing_is_found_and_prepare_repairs_it(tmp_path):
    data = config(tmp_path / "corpora", write_lines(tmp_path / "some.jsonl", documents(80)), packing="best_fit")
    prepared = prepare.prepare(data, SMALL)
    assert find_damage(prepared, data) == []
    (packing,) = Path(prepared.corpora[0]).glob("piece-00000.train.packing-*.bin")
    flip_bit(packing, 100)
    (found,) = find_damage(prepared, data)
    assert found.path == str(packing)
    packing.unlink()
    (found,) = find_damage(prepared, data)
    assert (found.path, found.got) == (str(packing), "no such file")
    assert find_damage(prepare.prepare(data, SMALL), data) == []


@pytest.mark.parametrize("change", [3, 1030])
def test_a_file_of_several_shards_is_read_once(tmp_path, change):
    """One of llm.c's files, with a header before the ids, has both train and validation shards."""
    prepared = prepare.prepare(config(tmp_path / "corpora", write_lines(tmp_path / "some.jsonl", documents(80))), SMALL)
    home = CorpusDirectory(prepared.corpora[0], CacheConfig())
    ids = np.concatenate([home.tokens(shard) for shard in manifest.load_manifest(home).train.shards])
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    file = tmp_path / "llm-c.bin"
    file.write_bytes(header.tobytes() + ids.tobytes())
    data, tokens = config(tmp_path / "corpora", file), TokenizerConfig(file=prepared.tokenizer)
    in_place = prepare.prepare(data, tokens)
    assert find_damage(in_place, data) == []
    flip_bit(file, change)
    (found,) = find_damage(in_place, data)
    assert (found.path, found.expected[:5]) == (str(file), "xxh3 ")


def test_wrong_ids_and_counts_are_found_despite_intact_hashes(tmp_path):
    data = config(tmp_path / "corpora", write_lines(tmp_path / "some.jsonl", documents(80)))
    prepared = prepare.prepare(data, SMALL)
    home = CorpusDirectory(prepared.corpora[0], CacheConfig())
    corpus, shape = manifest.load_manifest(home), window_shape(data)
    (shard,) = corpus.train.shards
    (small,) = verify([(home, corpus.model_copy(update={"vocabulary": 100}))], shape, advance=lambda _: None)[:1]
    assert (small.path, small.expected) == (home.location(shard.file), "ids below 100")
    fewer = shard.model_copy(update={"documents": shard.documents - 1})
    other = corpus.model_copy(update={"train": corpus.train.model_copy(update={"shards": (fewer,)})})
    counts, index = verify([(home, other)], shape, advance=lambda _: None)
    assert (counts.path, counts.expected) == (home.location("manifest.json"), f"{shard.documents - 1:,}, the sum of its shards")
    assert (index.path, index.got) == (home.location(shard.index), f"{shard.documents:,} documents")
