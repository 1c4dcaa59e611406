"""Token shards on disk, in the format of Megatron-LM's indexed dataset, so that its tools read ours, and we read theirs.

`x.bin` is token ids end to end. `x.idx` is a header, then each document's length in tokens (int32) and first byte (int64), then the
documents' boundaries (int64). One document is one sequence here, and ends with the end-of-text id.
(NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py)

A shard appears under its name once it is complete: it is written to a temporary file, synced, and renamed.
"""

import os
import struct
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from manta.data.errors import InputError
from manta.data.storage.atomic import TEMPORARY, write_atomically

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
LONGEST = 2**31 - 1  # tokens of a document
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
DTYPES = {code: np.dtype(name) for code, name in {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}.items()}

Count = Annotated[int, Field(ge=0, lt=2**48)]


class Shard(BaseModel, frozen=True, extra="forbid"):
    """A range of token ids in a file, and their documents' lengths in another, as the manifest records them."""

    file: str
    """Name beside the manifest; an absolute path or a URL if token files are read in place."""
    index: str
    """Name beside the manifest."""
    dtype: str = Field(pattern="^u?int(8|16|32|64)$")
    offset: Count = 0
    """Bytes of the file before the first token."""
    tokens: Count
    documents: Count
    text_bytes: Count
    bin_bytes: Count
    """Of the whole file."""
    idx_bytes: Count
    bin_xxh3: str
    idx_xxh3: str

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.offset + self.tokens * np.dtype(self.dtype).itemsize > self.bin_bytes:
            raise ValueError(f"expected no more tokens than the {self.bin_bytes:,} bytes of {self.file} hold, got {self.tokens:,}")
        return self

    @classmethod
    def describe(cls, lengths: NDArray[np.integer], dtype: np.dtype[Any], index_content: bytes, **fields: Any) -> Self:
        """Return the record of documents with these lengths in tokens. fields: the other fields."""
        counts = {"tokens": int(lengths.sum()), "documents": len(lengths), "idx_bytes": len(index_content)}
        return cls(dtype=dtype.name, **counts, idx_xxh3=xxhash.xxh3_64_hexdigest(index_content), **fields)


class DocumentIndex(NamedTuple):
    """The content of an .idx file with S sequences and D documents."""

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]  # [S]
    pointers: NDArray[np.int64]  # [S]
    documents: NDArray[np.int64]  # [D + 1]

    def document_lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each document [D], which may be several sequences."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])
        return np.diff(ends[self.documents])


def dtype_for(vocabulary: int) -> np.dtype[Any]:
    """Return the narrowest type for these ids that the format supports."""
    return DTYPES[8] if vocabulary <= 2**16 else DTYPES[4]


class ShardWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx`. Without a commit no file is left."""

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
        try:
            self._bin.close()  # which writes what is buffered
        finally:
            self._temporary.unlink(missing_ok=True)

    def extend(self, tokens: NDArray[np.integer], lengths: NDArray[np.int64], text_bytes: int) -> None:
        """Append documents end to end, with these lengths in tokens. Each includes its end-of-text id."""
        raw = tokens.astype(self._dtype, copy=False).data.cast("B")
        self._hash.update(raw)
        self._bin.write(raw)
        self._lengths.append(lengths)
        self._text_bytes += text_bytes

    def commit(self) -> Shard | None:
        """Publish the shard. Without documents return None and write nothing, because an empty file cannot be mapped."""
        lengths = np.concatenate([np.zeros(0, np.int64), *self._lengths])
        if not len(lengths):
            return None
        self._bin.flush()
        os.fsync(self._bin.fileno())
        index, name = index_bytes(lengths, self._dtype), self._prefix.name
        own = {"file": f"{name}.bin", "bin_bytes": self._bin.tell(), "bin_xxh3": self._hash.hexdigest(), "text_bytes": self._text_bytes}
        shard = Shard.describe(lengths, self._dtype, index, index=f"{name}.idx", **own)
        write_atomically(self._prefix.with_name(shard.index), index)
        self._temporary.replace(self._prefix.with_name(shard.file))
        return shard


def index_bytes(lengths: NDArray[np.integer], dtype: np.dtype[Any]) -> bytes:
    """Return the .idx file of documents with these lengths in tokens. Raises ValueError for a longer one than the format allows."""
    if lengths.max(initial=0) > LONGEST:
        raise ValueError(f"a document: expected at most {LONGEST} tokens, as a Megatron index allows, got {lengths.max()}")
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    pointers = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    documents = np.arange(len(lengths) + 1, dtype=np.int64)
    code = next((code for code, known in DTYPES.items() if known == dtype), 4)  # uint32 has no code, and its ids fit an int32
    header = HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents))
    return header + lengths.astype(np.int32).tobytes() + pointers.tobytes() + documents.tobytes()


def parse_index(raw: bytes, path: str) -> DocumentIndex:
    """Return the content of an .idx file, ours or Megatron's. Raises InputError if it is damaged or of another format."""
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise InputError(f"{path}: expected a Megatron index, which starts with MMIDIDX, got another file. Use Megatron's .idx.")
    _, version, code, sequences, documents = HEADER.unpack_from(raw)
    if version != VERSION or code not in DTYPES:
        expected = f"version {VERSION} and dtype code {' or '.join(map(str, DTYPES))}"
        raise InputError(f"{path}: expected {expected}, got version {version} and dtype code {code}. Write it again with Megatron's tools.")
    size = HEADER.size + sequences * 12 + documents * 8
    if len(raw) not in (size, size + sequences):  # a multimodal index has one more byte for each sequence
        raise InputError(f"{path}: expected {size} bytes, got {len(raw)}. Download it again: it is truncated or damaged.")
    start = HEADER.size
    index = DocumentIndex(
        dtype=DTYPES[code],
        lengths=np.frombuffer(raw, np.int32, sequences, start),
        pointers=np.frombuffer(raw, np.int64, sequences, start + sequences * 4),
        documents=np.frombuffer(raw, np.int64, documents, start + sequences * 12),
    )
    bounds = index.documents
    if index.lengths.min(initial=0) < 0 or not len(bounds) or bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        raise InputError(f"{path}: expected ascending document boundaries, got others. Download it again: it is damaged.")
    return index
