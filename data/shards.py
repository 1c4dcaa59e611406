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
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel

from manta.data.durable import TEMPORARY, write_atomically
from manta.data.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
DTYPES = {8: np.dtype(np.uint16), 4: np.dtype(np.int32)}


class Shard(BaseModel, frozen=True, extra="forbid"):
    """One pair of files, as the manifest knows it."""

    file: str
    tokens: int
    documents: int
    text_bytes: int
    bin_bytes: int
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


def dtype_for(vocabulary: int) -> np.dtype[Any]:
    """The narrowest type the format has for these ids."""
    return DTYPES[8] if vocabulary <= 2**16 else DTYPES[4]


class ShardWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx`; what is not committed leaves nothing behind."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._temporary = prefix.with_name(f".{prefix.name}.{os.getpid()}{TEMPORARY}")
        self._bin = self._temporary.open("wb", buffering=1 << 20)
        self._hash = xxhash.xxh3_64()
        self._lengths: list[int] = []
        self._text_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bin.close()
        self._temporary.unlink(missing_ok=True)

    def append(self, tokens: NDArray[np.integer], text_bytes: int) -> None:
        """One document, its end-of-text id included."""
        raw = tokens.astype(self._dtype).tobytes()
        self._hash.update(raw)
        self._bin.write(raw)
        self._lengths.append(len(tokens))
        self._text_bytes += text_bytes

    def commit(self) -> Shard | None:
        """Make the shard appear; None, and no file, where it holds no document (nobody can map an empty file)."""
        if not self._lengths:
            return None
        self._bin.flush()
        os.fsync(self._bin.fileno())
        index = self._index()
        written = self._bin.tell()
        write_atomically(_with(self._prefix, ".idx"), index)
        self._temporary.replace(_with(self._prefix, ".bin"))
        return Shard(
            file=self._prefix.name,
            tokens=sum(self._lengths),
            documents=len(self._lengths),
            text_bytes=self._text_bytes,
            bin_bytes=written,
            idx_bytes=len(index),
            bin_xxh3=self._hash.hexdigest(),
            idx_xxh3=xxhash.xxh3_64_hexdigest(index),
        )

    def _index(self) -> bytes:
        lengths = np.array(self._lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        pointers = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        documents = np.arange(len(lengths) + 1, dtype=np.int64)
        code = next(code for code, dtype in DTYPES.items() if dtype == self._dtype)
        header = HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents))
        return header + lengths.tobytes() + pointers.tobytes() + documents.tobytes()


def read_index(prefix: Path) -> Index:
    """The index of a shard, ours or Megatron's. Raises InputError where it is none."""
    path = _with(prefix, ".idx")
    raw = path.read_bytes()
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise InputError(f"{path}: not a Megatron index; wants one that begins with MMIDIDX")
    _, version, code, sequences, documents = HEADER.unpack_from(raw)
    if version != VERSION or code not in DTYPES:
        raise InputError(f"{path}: version {version}, dtype code {code}; wants version {VERSION}, code {' or '.join(map(str, DTYPES))}")
    wanted = HEADER.size + sequences * 12 + documents * 8
    if len(raw) != wanted:
        raise InputError(f"{path}: {len(raw)} bytes; wants {wanted}: the file is truncated or damaged")
    at = HEADER.size
    return Index(
        dtype=DTYPES[code],
        lengths=np.frombuffer(raw, np.int32, sequences, at),
        pointers=np.frombuffer(raw, np.int64, sequences, at + sequences * 4),
        documents=np.frombuffer(raw, np.int64, documents, at + sequences * 12),
    )


def map_tokens(prefix: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A shard's token stream [tokens], mapped and not read; a plain array, because a memmap costs microseconds to slice."""
    return np.asarray(np.memmap(_with(prefix, ".bin"), dtype=dtype, mode="r"))


def problem(directory: Path, shard: Shard, *, contents: bool) -> str | None:
    """What is wrong with a shard's files, if anything: there and of their size, and where asked, their hashes."""
    for suffix, size, digest in ((".bin", shard.bin_bytes, shard.bin_xxh3), (".idx", shard.idx_bytes, shard.idx_xxh3)):
        path = _with(directory / shard.file, suffix)
        try:
            got = path.stat().st_size
        except FileNotFoundError:
            return f"{path}: missing"
        if got != size:
            return f"{path}: {got} bytes; wants {size}"
        if contents and _xxh3(path) != digest:
            return f"{path}: its content has changed since it was written"
    return None


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _xxh3(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
