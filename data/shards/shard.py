"""Token shards on disk: Megatron-LM's indexed dataset, so that what we write its tools read, and the other way round.

`x.bin` is token ids end to end. `x.idx` is a header, then of each document its length in tokens (int32) and the byte at which it
starts (int64), then the documents' own boundaries (int64); one document is one sequence here and ends with the end-of-text id.
(NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py)

A shard appears under its name only when it is whole: it is written beside it, synced, and renamed.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel

from manta.data.errors import InputError
from manta.data.storage.atomic import TEMPORARY, write_atomically

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
LONGEST = 2**31 - 1  # tokens of a document
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
DTYPES = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}


class Shard(BaseModel, frozen=True, extra="forbid"):
    """A range of token ids in a file, and the lengths of its documents in another, as the manifest knows them."""

    file: str
    """Beside the manifest; or, of a corpus that is read where it lies, an absolute path or a URL."""
    index: str
    """Beside the manifest."""
    dtype: str
    offset: int = 0
    """Bytes of the file before the first token."""
    tokens: int
    documents: int
    text_bytes: int
    bin_bytes: int
    """Of the whole file."""
    idx_bytes: int
    bin_xxh3: str
    idx_xxh3: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What an .idx holds, of S sequences and D documents."""

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    documents: NDArray[np.int64]

    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document [D], which may be several sequences."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])
        return np.diff(ends[self.documents])


def dtype_for(vocabulary: int) -> np.dtype[Any]:
    """The narrowest type for these ids that the format and its readers have."""
    return DTYPES[8] if vocabulary <= 2**16 else DTYPES[4]


class ShardWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx`; what is not committed leaves nothing behind."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._temporary = prefix.with_name(f".{prefix.name}.{os.getpid()}{TEMPORARY}")
        self._bin = self._temporary.open("wb", buffering=1 << 20)
        self._hash = xxhash.xxh3_64()
        self._lengths: list[NDArray[np.int64]] = []
        self._text_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._bin.close()
        self._temporary.unlink(missing_ok=True)

    def append(self, tokens: NDArray[np.integer], text_bytes: int) -> None:
        """One document, its end-of-text id included."""
        self.extend(tokens, np.array([len(tokens)], dtype=np.int64), text_bytes)

    def extend(self, tokens: NDArray[np.integer], lengths: NDArray[np.int64], text_bytes: int) -> None:
        """Documents end to end, and how many tokens each of them is."""
        raw = tokens.astype(self._dtype, copy=False).data.cast("B")
        self._hash.update(raw)
        self._bin.write(raw)
        self._lengths.append(lengths)
        self._text_bytes += text_bytes

    def commit(self) -> Shard | None:
        """Make the shard appear; None, and no file, where it holds no document (nobody can map an empty file)."""
        lengths = np.concatenate([np.zeros(0, np.int64), *self._lengths])
        if not len(lengths):
            return None
        self._bin.flush()
        os.fsync(self._bin.fileno())
        written = self._bin.tell()
        index = index_bytes(lengths, self._dtype)
        write_atomically(with_suffix(self._prefix, ".idx"), index)
        self._temporary.replace(with_suffix(self._prefix, ".bin"))
        return Shard(
            file=f"{self._prefix.name}.bin",
            index=f"{self._prefix.name}.idx",
            dtype=self._dtype.name,
            tokens=int(lengths.sum()),
            documents=len(lengths),
            text_bytes=self._text_bytes,
            bin_bytes=written,
            idx_bytes=len(index),
            bin_xxh3=self._hash.hexdigest(),
            idx_xxh3=xxhash.xxh3_64_hexdigest(index),
        )


def index_bytes(lengths: NDArray[np.integer], dtype: np.dtype[Any]) -> bytes:
    """The .idx of documents of these lengths in tokens, end to end. Raises ValueError where one is longer than the format can say."""
    if lengths.max(initial=0) > LONGEST:
        raise ValueError(f"a document of {lengths.max()} tokens; a Megatron index wants at most {LONGEST}")
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    pointers = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    documents = np.arange(len(lengths) + 1, dtype=np.int64)
    code = next((code for code, known in DTYPES.items() if known == dtype), 4)  # uint32 has none, and its ids fit an int32
    header = HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents))
    return header + lengths.astype(np.int32).tobytes() + pointers.tobytes() + documents.tobytes()


def read_index(path: Path) -> Index:
    """An .idx, ours or Megatron's. Raises InputError where it is none."""
    return parse_index(path.read_bytes(), str(path))


def parse_index(raw: bytes, path: str) -> Index:
    """path: for the message."""
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise InputError(f"{path}: not a Megatron index; wants one that begins with MMIDIDX")
    _, version, code, sequences, documents = HEADER.unpack_from(raw)
    if version != VERSION or code not in DTYPES:
        raise InputError(f"{path}: version {version}, dtype code {code}; wants version {VERSION}, code {' or '.join(map(str, DTYPES))}")
    wanted = HEADER.size + sequences * 12 + documents * 8
    if len(raw) not in (wanted, wanted + sequences):  # a multimodal one has a byte more for each sequence
        raise InputError(f"{path}: {len(raw)} bytes; wants {wanted}: the file is truncated or damaged")
    at = HEADER.size
    index = Index(
        dtype=DTYPES[code],
        lengths=np.frombuffer(raw, np.int32, sequences, at),
        pointers=np.frombuffer(raw, np.int64, sequences, at + sequences * 4),
        documents=np.frombuffer(raw, np.int64, documents, at + sequences * 12),
    )
    bounds = index.documents
    if index.lengths.min(initial=0) < 0 or not len(bounds) or bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        raise InputError(f"{path}: its lengths or bounds of documents make no sense: the file is damaged: fetch it again")
    return index


def map_tokens(path: Path, shard: Shard) -> NDArray[Any]:
    """A shard's token stream [tokens], mapped and not read; a plain array, because a memmap costs microseconds to slice."""
    return np.asarray(np.memmap(path, dtype=shard.dtype, mode="r", offset=shard.offset, shape=(shard.tokens,)))


def xxh3(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
