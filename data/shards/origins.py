"""Which document of its input split each document of a shard is, as the split's record says.

piece-00000.{train,validation}.origins    positions int64, little-endian [documents], in the order of the shard

Corpora from before this was recorded have neither. Nothing that identifies a corpus depends on it.
"""

from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel

from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.shard import Count, Shard
from manta.data.storage.open_files import cache_maps
from manta.data.storage.positions import Places

Positions = NDArray[np.int64]


class ShardOrigins(BaseModel, frozen=True, extra="forbid"):
    """The positions of a shard's documents: in a file, or consecutive numbers."""

    file: str | None = None
    """Name beside the manifest. None: document k of the shard is at position first + k."""
    xxh3: str = ""
    first: Count = 0

    @classmethod
    def describe(cls, positions: Positions, stem: str) -> tuple[Self, bytes]:
        """Return the record of a shard's positions [documents], and the content of its file; empty if none is needed.

        stem: name of the shard without suffix.
        """
        if len(positions) and (np.diff(positions) == 1).all():
            return cls(first=int(positions[0])), b""
        content = positions.astype("<i8").tobytes()
        return cls(file=f"{stem}.origins", xxh3=xxhash.xxh3_64_hexdigest(content)), content

    def positions(self, home: CorpusDirectory, shard: Shard, documents: Positions) -> Positions:
        """Return the positions of some of a shard's documents [K], given their numbers [K].

        Raises OSError, InputError or DataError if the file is missing or damaged.
        """
        return documents + self.first if self.file is None else _map(home, self.file, shard.documents, self.xxh3)[documents]

    def problem(self, home: CorpusDirectory, shard: Shard, *, contents: bool) -> str | None:
        """Return what is wrong with the file, if anything. contents: check its hash, not its size alone."""
        return self.file and home.file_problem(self.file, 8 * shard.documents, self.xxh3, contents=contents)


class SplitOrigins(BaseModel, frozen=True, extra="forbid"):
    """Where the documents of an input split came from."""

    places: Places
    train: ShardOrigins | None
    validation: ShardOrigins | None


@cache_maps
def _map(home: CorpusDirectory, file: str, documents: int, xxh3: str) -> Positions:
    return home.map_file(file, size=8 * documents, xxh3=xxh3).view("<i8")
