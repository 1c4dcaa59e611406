"""Helpers for tests of sources: write small files, read a source as a worker does, and catch its error."""

import pickle
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from manta.data.config import DataConfig
from manta.data.errors import InputError
from manta.data.source_config import SourceConfig
from manta.data.sources import splits
from manta.data.sources.input_split import BadRow, Document, InputSplit

DOCUMENTS = ["Guten Tag.\n", "雪が降る", "a\r\nb", "🙂 <|endoftext|> not the end"]
NONE: Mapping[str, object] = {}


def splits_of(path, bad_rows: str = "fail", data: Mapping[str, object] = NONE, **keys) -> list[InputSplit]:
    """keys: of the source. data: keys of the data section."""
    source = SourceConfig(path=str(path), **keys)
    config = DataConfig(sources=(source,), sequence_length=8, bad_rows=bad_rows, **data)
    return pickle.loads(pickle.dumps(splits.input_splits(source, config)))


def read_all(path, **keys) -> list[tuple[InputSplit, Document | BadRow]]:
    """Return everything that a source yields, and check that positions rise within each split."""
    everything = []
    for split in splits_of(path, **keys):
        rows = list(split.documents())
        positions = [row.position for row in rows if isinstance(row, Document)]
        assert all(before < after for before, after in pairwise(positions))
        everything += [(split, row) for row in rows]
    return everything


def read(path, **keys) -> list[str] | list[list[int]]:
    """Return the documents of a source without bad rows."""
    contents = [row.content for _, row in read_all(path, **keys)]
    assert all(isinstance(content, str) or content.dtype == np.uint32 for content in contents)
    return [content if isinstance(content, str) else content.tolist() for content in contents]


def locations(path, **keys) -> list[str]:
    return [split.places.location(row.position) for split, row in read_all(path, **keys)]


def read_skipping(path, **keys) -> tuple[list[str], list[str]]:
    """Return the documents, and the messages of the bad rows, with bad_rows: skip."""
    rows = [row for _, row in read_all(path, bad_rows="skip", **keys)]
    messages = [row.message for row in rows if isinstance(row, BadRow)]
    assert all("\n" not in message for message in messages)
    return [row.content for row in rows if isinstance(row, Document)], messages


def error_of(path, **keys) -> str:
    """Return the one-line error of a bad source."""
    with pytest.raises(InputError) as caught:
        read_all(path, **keys)
    message = str(pickle.loads(pickle.dumps(caught.value)))
    assert "\n" not in message
    return message


def write_file(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def write_parquet(path: Path, group: int = 2, **columns) -> str:
    parquet.write_table(pa.table(columns), path, row_group_size=group)
    return str(path)


def write_arrow(path: Path, *, stream: bool = False, batch: int = 2, **columns) -> str:
    table = pa.table(columns)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return str(path)
