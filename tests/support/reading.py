"""What the tests of sources share: a source is read as a worker reads it, and a bad one tells its one line."""

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from manta.data.config import DataConfig
from manta.data.errors import InputError
from manta.data.sources import splits
from manta.data.sources.config import SourceConfig
from manta.data.sources.formats import Document, Piece, Refused

DOCUMENTS = ["Guten Tag.\n", "雪が降る", "a\r\nb", "🙂 <|endoftext|> not the end"]


def pieces(path, bad_rows: str = "fail", **keys) -> list[Piece]:
    source = SourceConfig(path=str(path), **keys)
    return pickle.loads(pickle.dumps(splits.pieces(source, DataConfig(sources=(source,), sequence_length=8, bad_rows=bad_rows))))


def found(path, **keys) -> list[tuple[Piece, Document | Refused]]:
    """All that a source yields; within each piece, places rise."""
    all_found = []
    for piece in pieces(path, **keys):
        of_piece = list(piece.documents())
        places = [one.place for one in of_piece if isinstance(one, Document)]
        assert all(before < after for before, after in pairwise(places))
        all_found += [(piece, one) for one in of_piece]
    return all_found


def read(path, **keys) -> list[str] | list[list[int]]:
    """The documents, where none is refused."""
    contents = [one.content for _, one in found(path, **keys)]
    assert all(isinstance(content, str) or content.dtype == np.uint32 for content in contents)
    return [content if isinstance(content, str) else content.tolist() for content in contents]


def places(path, **keys) -> list[str]:
    return [piece.where(one.place) for piece, one in found(path, **keys)]


def skipped(path, **keys) -> tuple[list[str], list[str]]:
    """The documents, and what is told of the rows that are left out."""
    both = [one for _, one in found(path, bad_rows="skip", **keys)]
    assert all("\n" not in one.problem for one in both if isinstance(one, Refused))
    return [one.content for one in both if isinstance(one, Document)], [one.problem for one in both if isinstance(one, Refused)]


def told(path, **keys) -> str:
    """The one line that a bad source is refused with."""
    with pytest.raises(InputError) as caught:
        found(path, **keys)
    message = str(pickle.loads(pickle.dumps(caught.value)))
    assert "\n" not in message
    return message


def put(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def table(path: Path, group: int = 2, **columns) -> str:
    parquet.write_table(pa.table(columns), path, row_group_size=group)
    return str(path)


def arrow(path: Path, *, stream: bool = False, batch: int = 2, **columns) -> str:
    written = pa.table(columns)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), written.schema) as writer:
        writer.write_table(written, max_chunksize=batch)
    return str(path)
