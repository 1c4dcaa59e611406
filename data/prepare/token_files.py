"""Token files of other tools, used in place: Megatron's, nanoGPT's and llm.c's. Only an index of their documents is written.

| format | files | documents |
|---|---|---|
| megatron | `x.bin` beside `x.idx` | as in the index |
| nanogpt | uint16 ids (karpathy/nanoGPT, data/openwebtext/prepare.py) | each ends with the end-of-text id |
| llm.c | a header of 256 int32, then uint16 or uint32 ids (karpathy/llm.c, dev/data/data_common.py) | each starts with the end-of-text id |

An end-of-text id always belongs to the document before it. Legend: D documents.
"""

import struct
from collections.abc import Iterator
from ctypes import c_int64
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from manta.data.errors import InputError
from manta.data.prepare.encode import SplitTask, open_tokenizer
from manta.data.shards.manifest import SplitRecord
from manta.data.shards.origins import SplitOrigins
from manta.data.shards.shard import LONGEST, Shard, index_bytes, parse_index
from manta.data.source_config import SourceConfig
from manta.data.sources.input_split import BadRow, Document
from manta.data.sources.source import source_files
from manta.data.storage.location import StoredFile, absolute
from manta.data.storage.positions import Places
from manta.data.storage.store import open_store
from manta.data.tokenizer.tokenizer import Tokenizer

Lengths = NDArray[np.int64]
TokenFormat = Literal["megatron", "nanogpt", "llm.c"]

_LLMC_HEADER = struct.Struct("<3i")  # magic, version, tokens; the rest of 1,024 bytes is zero
_LLMC_OFFSET = 1024
_LLMC_DTYPES = {(20240520, 1): np.dtype(np.uint16), (20240801, 7): np.dtype(np.uint32)}
_DOWNLOAD_AGAIN = "It is truncated or damaged; download it again."


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFileSplit:
    """A .bin file as an input split without documents to encode: `index_token_file` reads it."""

    path: str
    size: int
    format: TokenFormat

    @property
    def name(self) -> str:
        return self.path

    def documents(self) -> Iterator[Document | BadRow]:
        return iter(())

    @property
    def places(self) -> Places:
        return Places(unit="token", paths=(self.path,))


class _Layout(NamedTuple):
    dtype: np.dtype[Any]
    offset: int
    """Bytes before the first id."""
    lengths: Lengths | None = None
    """Of the documents in the file, if the format records them; 0 for an empty one."""


def token_file_splits(source: SourceConfig) -> list[TokenFileSplit]:
    """Return the .bin files of a source of token files, in order. Raises InputError if the format of one is unknown."""
    files = source_files(source)
    names = {file.path for file in files}
    for name in sorted(names):
        if name.endswith(".idx") and (path := f"{name.removesuffix('.idx')}.bin") not in names:
            raise InputError(f"{path}: expected a .bin beside its .idx, got no such file. Download it again, or remove the .idx.")
    return [TokenFileSplit(path=file.path, size=file.size, format=_format_of(file, source)) for file in files if file.path.endswith(".bin")]


def index_token_file(task: SplitTask, position: c_int64) -> SplitRecord:
    """Read a file once and write the lengths of its documents, of which the last ones are for validation, and the record."""
    split = task.split
    assert isinstance(split, TokenFileSplit)
    layout, tokenizer = _layout(split), open_tokenizer(task.tokenizer, task.cache, task.end_of_text, task.encoder)
    xxh3, ends = _scan(split, layout, tokenizer, position)
    tokens = (split.size - layout.offset) // layout.dtype.itemsize
    in_file = np.diff(np.unique(np.concatenate([[0], ends, [tokens]]))) if layout.lengths is None else layout.lengths
    lengths_D = _limit(in_file[in_file > 0])
    unended = len(lengths_D) - int(np.isin(np.cumsum(lengths_D), ends).sum())
    lengths_D, count = _hold_out(lengths_D, task.validation)
    numbers_D = np.searchsorted(np.cumsum(in_file), np.cumsum(lengths_D) - lengths_D, side="right")  # in the file, which has empty ones

    def write_shard(side: str, lengths_D: Lengths, first: int) -> Shard | None:
        """Write the index of consecutive documents from token `first` on. Return None if there are none."""
        if not len(lengths_D):
            return None
        index = index_bytes(lengths_D, layout.dtype)
        offset = layout.offset + first * layout.dtype.itemsize
        file = {"file": absolute(split.path), "offset": offset, "bin_bytes": split.size, "bin_xxh3": xxh3, "text_bytes": 0}
        shard = Shard.describe(lengths_D, layout.dtype, index, index=f"{task.stem}.{side}.idx", **file)
        task.directory.store.write(shard.index, index)
        return shard

    train = write_shard("train", lengths_D[:count], 0)
    validation = write_shard("validation", lengths_D[count:], int(lengths_D[:count].sum()))
    origins = SplitOrigins(
        places=Places(unit="document", paths=(split.path,)).recorded(),
        train=task.write_positions("train", numbers_D[:count]),
        validation=task.write_positions("validation", numbers_D[count:]),
    )
    notes = {} if unended <= 1 else {"not ended by the end of text, and taken all the same": unended}  # a key of manifests: keep it
    return task.write_record(SplitRecord(train=train, validation=validation, left_out=notes, origins=origins))


def _format_of(file: StoredFile, source: SourceConfig) -> TokenFormat:
    if source.format is not None:
        return source.format  # type: ignore[return-value]  one of the three, else the source holds documents
    if open_store(_index_path(file.path)).exists():
        return "megatron"
    if _llmc_header(file.path, file.size):
        return "llm.c"
    raise InputError(f"{file.path}: expected an .idx beside it or a header of llm.c, got neither. Set format: nanogpt if it is bare ids.")


def _layout(split: TokenFileSplit) -> _Layout:
    if split.format == "nanogpt":
        return _fixed_layout(split, np.dtype(np.uint16), 0)
    if split.format == "llm.c":
        header = _llmc_header(split.path, split.size)
        if header is None:
            problem = "expected an llm.c data file, with magic 20240520 (gpt-2) or 20240801 (llama-3), got another header"
            raise InputError(f"{split.path}: {problem}. Set the source's format.")
        dtype, tokens = header
        layout = _fixed_layout(split, dtype, _LLMC_OFFSET)
        if (got := (split.size - _LLMC_OFFSET) // dtype.itemsize) != tokens:
            raise InputError(f"{split.path}: expected the {tokens} tokens of its header, got {got}. {_DOWNLOAD_AGAIN}")
        return layout
    path = _index_path(split.path)
    if not open_store(path).exists():
        raise InputError(f"{path}: expected the index that Megatron writes beside each .bin, got no such file. Download it.")
    index = parse_index(open_store(path).read(), path)
    lengths_D = index.document_lengths()
    if (size := int(lengths_D.sum()) * index.dtype.itemsize) != split.size:
        problem = f"expected the {size} bytes of its .idx, got {split.size}"
        raise InputError(f"{split.path}: {problem}. It is truncated, or the .idx of another file; download both again.")
    return _Layout(dtype=index.dtype, offset=0, lengths=lengths_D)


def _fixed_layout(split: TokenFileSplit, dtype: np.dtype[Any], offset: int) -> _Layout:
    if split.size <= offset or (split.size - offset) % dtype.itemsize:
        problem = f"expected {offset} bytes and then {dtype.name} ids, got {split.size} bytes"
        raise InputError(f"{split.path}: {problem}. It is truncated or of another format; download it again.")
    return _Layout(dtype=dtype, offset=offset)


def _llmc_header(path: str, size: int) -> tuple[np.dtype[Any], int] | None:
    """Return the type of the ids and their number; None if there is no such header."""
    with open_store(path).open(size=size) as stream:
        head = stream.read(_LLMC_HEADER.size)
    if len(head) < _LLMC_HEADER.size:
        return None
    magic, version, tokens = _LLMC_HEADER.unpack(head)
    dtype = _LLMC_DTYPES.get((magic, version))
    return None if dtype is None else (dtype, tokens)


def _index_path(path: str) -> str:
    return f"{path.removesuffix('.bin')}.idx"


def _scan(split: TokenFileSplit, layout: _Layout, tokenizer: Tokenizer, position: c_int64) -> tuple[str, Lengths]:
    """Check a file's ids. Return its hash, and the number of tokens up to and including each end-of-text id."""
    digest, ends = xxhash.xxh3_64(), [np.zeros(0, np.int64)]
    header, first = layout.offset, 0
    for block in open_store(split.path).blocks(split.size):
        digest.update(block)
        ids = np.frombuffer(block[header:], layout.dtype)
        position.value = first
        if len(ids) and (ids.max() >= tokenizer.vocabulary or ids.min() < 0):
            bad = int(np.flatnonzero((ids >= tokenizer.vocabulary) | (ids < 0))[0])
            problem = f"expected ids below the tokenizer's {tokenizer.vocabulary}, got {ids[bad]}"
            raise InputError(f"{split.places.location(first + bad)}: {problem}. Set tokenizer.file to the tokenizer that wrote them.")
        ends.append(first + np.flatnonzero(ids == tokenizer.end_of_text) + 1)
        first += len(ids)
        header = 0
    return digest.hexdigest(), np.concatenate(ends)


def _limit(lengths_D: Lengths) -> Lengths:
    """Cut documents that are too long for an index, which has 31 bits for a length: a file without an end of text, for example."""
    if lengths_D.max(initial=0) <= LONGEST:
        return lengths_D
    parts = [[LONGEST] * (length // LONGEST) + [length % LONGEST] for length in lengths_D.tolist()]
    return np.array([part for document in parts for part in document if part], dtype=np.int64)


def _hold_out(lengths_D: Lengths, share: float) -> tuple[Lengths, int]:
    """Return the documents, and how many of them are for training: all before the last ones, which hold about `share` of the tokens.

    If no document ends near there, the one across that point is cut in two.
    """
    if share in (0, 1):
        return lengths_D, 0 if share else len(lengths_D)
    ends_D = np.cumsum(lengths_D)
    validation = max(1, int(ends_D[-1] * share))
    cut = int(ends_D[-1]) - validation
    nearest = int(np.argmin(np.abs(ends_D - cut)))
    if ends_D[nearest] < ends_D[-1] and abs(int(ends_D[nearest]) - cut) <= validation // 2:
        return lengths_D, nearest + 1
    edges = np.unique(np.concatenate([[0, cut], ends_D]))
    return np.diff(edges), int(np.searchsorted(edges, cut))
