"""Token shards: Megatron's format to the byte, complete or absent."""

import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.data.config import CacheConfig
from manta.data.errors import InputError
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.shard import ShardWriter, dtype_for, parse_index

documents = st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=20), min_size=1, max_size=10)


def write(prefix, documents, vocabulary=2**16):
    with ShardWriter(prefix, dtype_for(vocabulary)) as writer:
        for tokens in documents:
            writer.extend(np.array(tokens), np.array([len(tokens)]), text_bytes=3)
        return writer.commit()


@settings(deadline=None)
@given(documents=documents, vocabulary=st.sampled_from([300, 2**16, 2**16 + 1]))
def test_written_documents_are_read(tmp_path_factory, documents, vocabulary):
    prefix = tmp_path_factory.getbasetemp() / "back.train"
    shard = write(prefix, documents, vocabulary)
    directory = CorpusDirectory(str(prefix.parent), CacheConfig())
    index = directory.read_index(shard)
    assert index.dtype == (np.uint16 if vocabulary <= 2**16 else np.int32)
    assert index.lengths.tolist() == [len(tokens) for tokens in documents]
    assert index.documents.tolist() == list(range(len(documents) + 1))
    tokens = directory.tokens(shard)
    starts = index.pointers // index.dtype.itemsize
    assert [tokens[at : at + n].tolist() for at, n in zip(starts, index.lengths, strict=True)] == documents
    assert (shard.tokens, shard.documents, shard.text_bytes) == (len(tokens), len(documents), 3 * len(documents))
    assert index.document_lengths().tolist() == index.lengths.tolist()
    assert directory.shard_problem(shard, contents=True) is None


def test_the_bytes_are_those_of_megatron(tmp_path):
    write(tmp_path / "x.train", [[1, 2, 0], [3, 0]])
    assert (tmp_path / "x.train.bin").read_bytes() == struct.pack("<5H", 1, 2, 0, 3, 0)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    assert (tmp_path / "x.train.idx").read_bytes() == header + struct.pack("<2i2q3q", 3, 2, 0, 6, 0, 1, 2)


def test_an_uncommitted_shard_leaves_no_file(tmp_path):
    assert write(tmp_path / "empty", []) is None
    with suppress(KeyboardInterrupt), ShardWriter(tmp_path / "x", dtype_for(300)) as writer:
        writer.extend(np.array([1]), np.array([1]), text_bytes=1)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found(tmp_path):
    shard = write(tmp_path / "x.train", [[1, 2, 0]])
    directory, path = CorpusDirectory(str(tmp_path), CacheConfig()), tmp_path / "x.train.bin"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert directory.shard_problem(shard, contents=False) is None
    assert directory.shard_problem(shard, contents=True) == f"{path}: its content has changed since it was written"
    path.write_bytes(whole[:-1])
    assert directory.shard_problem(shard, contents=False) == f"{path}: expected 6 bytes, got 5"
    path.unlink()
    assert directory.shard_problem(shard, contents=False) == f"{path}: missing"


def test_a_bad_index_is_refused(tmp_path):
    write(tmp_path / "x", [[1, 2, 0]])
    path = tmp_path / "x.idx"
    whole = path.read_bytes()
    for content, message in (
        (b"hello" * 20, "expected a Megatron index"),
        (whole[:-3], "expected [0-9]+ bytes, got [0-9]+.*truncated or damaged"),
        (whole.replace(b"\x08", b"\x07", 1), "dtype code 7"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            parse_index(path.read_bytes(), str(path))
