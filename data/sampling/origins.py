"""The documents of a window: from which source, file and line each came.

They are looked up where the preparation recorded them, never searched: the index of a shard, the positions beside it, and the files that
its split was read from. Legend: D documents of a shard.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from manta.data.errors import DataError, InputError, one_line
from manta.data.shards.corpus_directory import REMEDY
from manta.data.shards.manifest import SplitRecord
from manta.data.shards.origins import ShardOrigins
from manta.data.shards.windows import Span, TokenStream
from manta.data.storage.positions import Places

log = logging.getLogger(__name__)

_SHARDS = 32  # shards that keep the ends of their documents in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentOrigin:
    """A document of a sample, or the part of it in the sample."""

    source: str
    """Name in the config."""
    location: str | None
    """Its file and line, row or number: "web.jsonl: line 12". None if unknown."""
    tokens: int
    """Of the document, in the sample."""


class _Part(NamedTuple):
    """A document's tokens in a window, and its position in the files of its split."""

    source: str
    tokens: int
    places: Places | None = None
    position: int = 0


class OriginFinder:
    """Finds the origins of documents. Whatever is not recorded, or is damaged, makes an origin unknown: it is no error."""

    def __init__(self) -> None:
        self._ends = lru_cache(_SHARDS)(_document_ends)
        self._origins = lru_cache(_SHARDS)(_read_origins)
        self._has_warned = False

    def documents(self, spans: Iterable[tuple[TokenStream, str, Span]]) -> list[DocumentOrigin]:
        """Return the documents in spans of streams, each with its source's name, in order. Each file is read once."""
        parts = [part for stream, source, span in spans for part in self._parts(stream, source, span)]
        found: list[DocumentOrigin] = [DocumentOrigin(source=part.source, location=None, tokens=part.tokens) for part in parts]
        for places in dict.fromkeys(part.places for part in parts if part.places):
            rows = [row for row, part in enumerate(parts) if part.places == places]
            for row, location in zip(rows, places.locations([parts[row].position for row in rows]), strict=True):
                found[row] = replace(found[row], location=location)
        return found

    def _parts(self, stream: TokenStream, source: str, span: Span) -> list[_Part]:
        end = span.start + span.length
        try:
            ends_D = self._ends(stream, span.shard)
        except (OSError, InputError, DataError) as error:
            self._warn(error)
            return [_Part(source, span.length)]
        first, last = np.searchsorted(ends_D, [span.start, end - 1], side="right").tolist()
        tokens = np.diff([span.start, *ends_D[first:last].tolist(), end]).tolist()
        try:
            places, origins = self._origins(stream, span.shard)
            positions = origins.positions(stream.home, stream.shards[span.shard], np.arange(first, last + 1)).tolist()
        except _NotRecordedError:
            return [_Part(source, count) for count in tokens]
        except (OSError, InputError, DataError) as error:
            self._warn(error)
            return [_Part(source, count) for count in tokens]
        return [_Part(source, count, places, position) for count, position in zip(tokens, positions, strict=True)]

    def _warn(self, error: Exception) -> None:
        """Log the first problem: others are likely to be the same one."""
        if not self._has_warned:
            log.warning("the files and lines of some documents are unknown: %s", one_line(error).removesuffix(f". {REMEDY}"))
        self._has_warned = True


class _NotRecordedError(Exception):
    """The corpus was prepared before origins were recorded."""


def _document_ends(stream: TokenStream, shard: int) -> NDArray[np.int64]:
    """Return the end of each document in a shard [D]."""
    return np.cumsum(stream.home.read_index(stream.shards[shard]).document_lengths())


def _read_origins(stream: TokenStream, number: int) -> tuple[Places, ShardOrigins]:
    """Return the files of a shard's input split, and where the positions of its documents are.

    Raises _NotRecordedError, and OSError, InputError or DataError if the record is missing, damaged or another shard's.
    """
    shard = stream.shards[number]
    stem, _, side = shard.index.removesuffix(".idx").rpartition(".")
    path = stream.home.location(f"{stem}.json")
    try:
        record = SplitRecord.model_validate_json(stream.home.read(f"{stem}.json"))
    except ValidationError:
        raise InputError(f"{path}: expected the record of an input split, got a damaged one") from None
    is_train = side == "train"
    if (record.train if is_train else record.validation) != shard:
        raise InputError(f"{path}: expected the record of {shard.index}, got another one")
    origins = record.origins and (record.origins.train if is_train else record.origins.validation)
    if not record.origins or not origins:
        raise _NotRecordedError
    return record.origins.places, origins
