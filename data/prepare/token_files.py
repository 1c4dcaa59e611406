"""Token shards of others, read where they lie: Megatron's, nanoGPT's and llm.c's. Nothing of them is copied but where documents end.

| format | files | documents |
|---|---|---|
| megatron | `x.bin` beside `x.idx` | as the index says |
| nanogpt | bare uint16 ids (karpathy/nanoGPT, data/openwebtext/prepare.py) | each ends with the end-of-text id |
| llm.c | 256 int32 of header, then uint16 or uint32 ids (karpathy/llm.c, dev/data/data_common.py) | each begins with the end-of-text id |

An end-of-text id belongs to the document before it, whichever side its writer meant.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from manta.data.errors import InputError
from manta.data.prepare.encode import Task, Tell, open_tokenizer
from manta.data.shards.manifest import PieceRecord
from manta.data.shards.shard import LONGEST, Shard, index_bytes, parse_index
from manta.data.sources.config import SourceConfig
from manta.data.sources.source import source_files
from manta.data.storage.location import StoredFile, absolute
from manta.data.storage.store import open_store

Format = Literal["megatron", "nanogpt", "llm.c"]

_LLMC_HEADER = struct.Struct("<3i")  # magic, version, tokens; the rest of 1,024 bytes is zero
_LLMC_BYTES = 1024
_LLMC = {(20240520, 1): np.dtype(np.uint16), (20240801, 7): np.dtype(np.uint32)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """One .bin, as a piece of work."""

    path: str
    size: int
    format: Format

    @property
    def name(self) -> str:
        return self.path

    def documents(self) -> Iterator[Any]:
        """None to be encoded: `take_over` reads it."""
        return iter(())

    def location(self, position: int) -> str:
        return f"{self.path}: token {position}"


def token_files(source: SourceConfig) -> list[TokenFile]:
    """The .bin files of a source of token ids, in order. Raises InputError where one's format can not be told."""
    listed = source_files(source)
    names = {file.path for file in listed}
    for name in sorted(names):
        if name.endswith(".idx") and f"{name.removesuffix('.idx')}.bin" not in names:
            raise InputError(f"{name.removesuffix('.idx')}.bin: missing, and its .idx is there; fetch it again, or take the .idx out")
    return [_told(file, source) for file in listed if file.path.endswith(".bin")]


def _told(file: StoredFile, source: SourceConfig) -> TokenFile:
    if source.format is not None:
        return TokenFile(path=file.path, size=file.size, format=source.format)  # type: ignore[arg-type]  one of the three, else not here
    if open_store(_index_of(file.path)).exists():
        return TokenFile(path=file.path, size=file.size, format="megatron")
    head = _head(file.path, file.size)
    if len(head) == _LLMC_HEADER.size and _LLMC_HEADER.unpack(head)[:2] in _LLMC:
        return TokenFile(path=file.path, size=file.size, format="llm.c")
    raise InputError(f"{file.path}: no .idx beside it and no header of llm.c; bare ids want format: nanogpt beside their path")


def take_over(task: Task, tell: Tell) -> PieceRecord:
    """Read the file once: its hash, its ids, its documents; the last of them are held out. Writes their lengths, and last the record."""
    piece = task.piece
    assert isinstance(piece, TokenFile)
    tokenizer = open_tokenizer(task.tokenizer, task.cache, task.end_of_text)
    dtype, offset, lengths = _layout(piece)
    count = (piece.size - offset) // dtype.itemsize
    digest, ends = xxhash.xxh3_64(), [np.zeros(0, np.int64)]
    at = -offset
    for block in open_store(piece.path).blocks(piece.size):
        digest.update(block)
        ids = np.frombuffer(block, dtype, offset=max(0, -at)) if at < 0 else np.frombuffer(block, dtype)
        first = max(0, at) // dtype.itemsize
        tell(first)
        if len(ids) and (ids.max() >= tokenizer.vocabulary or ids.min() < 0):
            wrong = int(np.flatnonzero((ids >= tokenizer.vocabulary) | (ids < 0))[0])
            wants = f"ids below the tokenizer's {tokenizer.vocabulary}: it was written with another one; set tokenizer.file to it"
            raise InputError(f"{piece.location(first + wrong)}: got id {ids[wrong]}, wants {wants}")
        ends.append(first + np.flatnonzero(ids == tokenizer.end_of_text) + 1)
        at += len(block)
    marked = np.concatenate(ends)
    if lengths is None:
        edges = np.unique(np.concatenate([[0], marked, [count]]))
        lengths = np.diff(edges)
    lengths = _bounded(lengths)
    bounds = np.cumsum(lengths)
    unmarked = int(len(bounds) - np.isin(bounds, marked).sum())
    lengths, kept = _split(lengths, task.held_out)
    begin, shards = 0, list[Shard | None]()
    for side, own in (("train", lengths[:kept]), ("validation", lengths[kept:])):
        index = index_bytes(own, dtype)
        made = Shard(
            file=absolute(piece.path),
            index=f"{task.stem}.{side}.idx",
            dtype=dtype.name,
            offset=offset + begin * dtype.itemsize,
            tokens=int(own.sum()),
            documents=len(own),
            text_bytes=0,
            bin_bytes=piece.size,
            idx_bytes=len(index),
            bin_xxh3=digest.hexdigest(),
            idx_xxh3=xxhash.xxh3_64_hexdigest(index),
        )
        if len(own):
            task.home.write(made.index, index)
        shards.append(made if len(own) else None)
        begin += made.tokens
    left = {} if unmarked <= 1 else {"not ended by the end of text, and taken all the same": unmarked}
    record = PieceRecord(train=shards[0], validation=shards[1], left_out=left)
    task.home.write(task.record, record.model_dump_json(indent=1).encode())
    return record


def _bounded(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """An index spells lengths in 31 bits: what is longer, a file without any end of text for one, is several documents."""
    if lengths.max(initial=0) <= LONGEST:
        return lengths
    parts = [[LONGEST] * (length // LONGEST) + [length % LONGEST] for length in lengths.tolist()]
    return np.array([part for several in parts for part in several if part], dtype=np.int64)


def _split(lengths: NDArray[np.int64], held_out: float) -> tuple[NDArray[np.int64], int]:
    """How many documents are trained on: those before the last, which hold about the share to be held out.

    Where no document ends near there, as in a file that is one document, that one is cut in two.
    """
    if held_out in (0, 1):
        return lengths, 0 if held_out else len(lengths)
    ends = np.cumsum(lengths)
    held = max(1, int(ends[-1] * held_out))
    cut = int(ends[-1]) - held
    nearest = int(np.argmin(np.abs(ends - cut)))
    if ends[nearest] < ends[-1] and abs(int(ends[nearest]) - cut) <= held // 2:
        return lengths, nearest + 1
    edges = np.unique(np.concatenate([[0, cut], ends]))
    return np.diff(edges), int(np.searchsorted(edges, cut))


def _layout(piece: TokenFile) -> tuple[np.dtype[Any], int, NDArray[np.int64] | None]:
    """Type of the ids, bytes before the first, and the documents' lengths where the format tells them."""
    if piece.format == "nanogpt":
        return np.dtype(np.uint16), _whole(piece, 0, np.dtype(np.uint16)), None
    if piece.format == "llm.c":
        head = _head(piece.path, piece.size)
        if len(head) < _LLMC_HEADER.size or _LLMC_HEADER.unpack(head)[:2] not in _LLMC:
            raise InputError(f"{piece.path}: no header of llm.c's data files; wants magic 20240520 (gpt-2) or 20240801 (llama-3)")
        magic, version, count = _LLMC_HEADER.unpack(head)
        dtype = _LLMC[magic, version]
        _whole(piece, _LLMC_BYTES, dtype)
        if (piece.size - _LLMC_BYTES) // dtype.itemsize != count:
            wants = f"the {count} that its header tells"
            got = (piece.size - _LLMC_BYTES) // dtype.itemsize
            raise InputError(f"{piece.path}: got {got} tokens, wants {wants}: it is truncated or damaged: fetch it again")
        return dtype, _LLMC_BYTES, None
    beside = _index_of(piece.path)
    if not open_store(beside).exists():
        raise InputError(f"{beside}: missing; wants the index that Megatron's tools write beside each .bin")
    index = parse_index(open_store(beside).read(), beside)
    lengths = index.document_lengths()
    if lengths.sum() * index.dtype.itemsize != piece.size:
        wants = f"the {lengths.sum() * index.dtype.itemsize} that its .idx tells"
        raise InputError(f"{piece.path}: got {piece.size} bytes, wants {wants}: it is truncated or of another .idx")
    return index.dtype, 0, lengths[lengths > 0]


def _index_of(path: str) -> str:
    return f"{path.removesuffix('.bin')}.idx"


def _whole(piece: TokenFile, offset: int, dtype: np.dtype[Any]) -> int:
    """The offset, once what follows is whole ids."""
    if piece.size <= offset or (piece.size - offset) % dtype.itemsize:
        raise InputError(
            f"{piece.path}: got {piece.size} bytes, wants {offset} and whole {dtype.name} ids: it is truncated or another format"
        )
    return offset


def _head(path: str, size: int) -> bytes:
    with open_store(path).open(size=size) as stream:
        return stream.read(_LLMC_HEADER.size)
