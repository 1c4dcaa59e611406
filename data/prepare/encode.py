"""Encode one input split into a train and a validation shard, in one process."""

from collections import Counter
from collections.abc import Iterator
from ctypes import c_int64
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from manta.data.config import CacheConfig
from manta.data.errors import InputError
from manta.data.hashing import hashed
from manta.data.sampling.order import Permutation
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import SplitRecord
from manta.data.shards.origins import ShardOrigins, SplitOrigins
from manta.data.shards.shard import Shard, ShardWriter, dtype_for
from manta.data.source_config import FilterConfig
from manta.data.sources.input_split import BadRow, Document, InputSplit, is_held_out
from manta.data.sources.rows import Content
from manta.data.tokenizer.tokenizer import Encoder, Tokenizer

_BATCH = 1 << 20  # characters encoded at a time
_SHUFFLED = 1 << 25  # tokens of documents that are shuffled together, in a worker's memory

MALFORMED, DUPLICATE = "malformed", "duplicate"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTask:
    """An input split, and everything that determines its shards."""

    split: InputSplit
    index: int
    root: str
    """Path or URL of the corpus directory."""
    cache: CacheConfig
    tokenizer: str
    """Path or URL of a tokenizer.json."""
    end_of_text: str
    encoder: Encoder
    validation: float
    """Share of documents for validation: 0 for none, 1 for all."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    duplicates: bytes = b""
    """A bit for each document that passes the filter: whether it repeats an earlier one."""

    @property
    def stem(self) -> str:
        return f"piece-{self.index:05d}"

    @property
    def directory(self) -> CorpusDirectory:
        return CorpusDirectory(self.root, self.cache)

    def write_positions(self, side: str, positions: NDArray[np.int64]) -> ShardOrigins | None:
        """Write the positions of a shard's documents [documents]. Return None if there are none."""
        if not len(positions):
            return None
        origins, content = ShardOrigins.describe(positions, f"{self.stem}.{side}")
        if origins.file:
            self.directory.store.write(origins.file, content)
        return origins

    def write_record(self, record: SplitRecord) -> SplitRecord:
        """Write the record of a split, which says that its shards are complete."""
        self.directory.store.write(record_file(self.index), record.model_dump_json(indent=1).encode())
        return record


def record_file(index: int) -> str:
    return f"piece-{index:05d}.json"


def encode_split(task: SplitTask, position: c_int64) -> SplitRecord:
    """Write the shards of a split, and last its record. position: set to the position of the current document."""
    tokenizer, documents = open_tokenizer(task.tokenizer, task.cache, task.end_of_text, task.encoder), _SelectedDocuments(task)
    with (
        task.directory.store.staging() as folder,
        _ShufflingWriter(folder / f"{task.stem}.train", tokenizer.vocabulary, key=2 * task.index) as train,
        _ShufflingWriter(folder / f"{task.stem}.validation", tokenizer.vocabulary, key=2 * task.index + 1) as validation,
    ):
        for batch in documents.batches(position):
            for document, (ids, raw) in zip(batch, _encode(batch, tokenizer, task.split), strict=True):
                writer = validation if is_held_out(raw, task.validation) else train
                writer.append(ids, len(raw) if isinstance(raw, bytes) else 0, document.position)
        shards = train.commit(), validation.commit()
    origins = SplitOrigins(
        places=task.split.places.recorded(),
        train=task.write_positions("train", train.positions()),
        validation=task.write_positions("validation", validation.positions()),
    )
    removed = dict(sorted(documents.removed.items()))
    record = SplitRecord(train=shards[0], validation=shards[1], left_out=removed, refused=documents.first_bad_row, origins=origins)
    return task.write_record(record)


def hash_split(task: SplitTask, position: c_int64) -> NDArray[np.uint64]:
    """Return the hash of each document that passes the filter, in order."""
    batches = _SelectedDocuments(task).batches(position)
    return np.array([xxhash.xxh3_64_intdigest(_raw(document.content)) for batch in batches for document in batch], dtype=np.uint64)


@lru_cache(maxsize=1)
def open_tokenizer(location: str, cache: CacheConfig, end_of_text: str, encoder: Encoder) -> Tokenizer:
    directory, _, name = location.rpartition("/")
    return Tokenizer(CorpusDirectory(directory, cache).local_copy(name), end_of_text=end_of_text, encoder=encoder)


class _SelectedDocuments:
    """The documents of a split that pass its filter and repeat no earlier one. Counts the removed ones by reason."""

    def __init__(self, task: SplitTask) -> None:
        self._split, self._filter = task.split, task.filter
        self._duplicates = iter(np.unpackbits(np.frombuffer(task.duplicates, np.uint8)))
        self.removed: Counter[str] = Counter()
        self.first_bad_row: str | None = None

    def batches(self, position: c_int64) -> Iterator[list[Document]]:
        batch: list[Document] = []
        size = 0
        for document in self._documents():
            position.value = document.position
            batch.append(document)
            size += len(document.content)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _documents(self) -> Iterator[Document]:
        for document in self._split.documents():
            if isinstance(document, BadRow):
                self.first_bad_row = self.first_bad_row or document.message
                self.removed[MALFORMED] += 1
                continue
            reason = self._filter.rejection(document.content) if isinstance(document.content, str) else None
            if reason is None and next(self._duplicates, False):
                reason = DUPLICATE
            if reason is None:
                yield document
            else:
                self.removed[reason] += 1


class _ShufflingWriter(ShardWriter):
    """Writes a shard in shuffled order: neighbors in a file are alike, and samples are made of neighbors."""

    def __init__(self, prefix: Path, vocabulary: int, *, key: int) -> None:
        super().__init__(prefix, dtype_for(vocabulary))
        self._key, self._blocks = key, 0
        self._documents: list[NDArray[np.uint32]] = []
        self._positions: list[int] = []
        self._shuffled_positions = [np.zeros(0, np.int64)]
        self._tokens = self._bytes = 0

    def append(self, ids: NDArray[np.uint32], text_bytes: int, position: int) -> None:
        """position: of the document in its input split."""
        self._documents.append(ids)
        self._positions.append(position)
        self._tokens += len(ids)
        self._bytes += text_bytes
        if self._tokens >= _SHUFFLED:
            self._flush()

    def commit(self) -> Shard | None:
        self._flush()
        return super().commit()

    def positions(self) -> NDArray[np.int64]:
        """Return the positions of the documents in the order of the shard [documents], once it is committed."""
        return np.concatenate(self._shuffled_positions)

    def _flush(self) -> None:
        if not self._documents:
            return
        order = Permutation(len(self._documents), int(hashed(self._key, self._blocks)[0]))(np.arange(len(self._documents)))
        shuffled = [self._documents[index] for index in order.tolist()]
        self.extend(np.concatenate(shuffled), np.array([*map(len, shuffled)], dtype=np.int64), self._bytes)
        self._shuffled_positions.append(np.array(self._positions, dtype=np.int64)[order.astype(np.int64)])
        self._documents, self._positions, self._tokens, self._bytes, self._blocks = [], [], 0, 0, self._blocks + 1


def _encode(batch: list[Document], tokenizer: Tokenizer, split: InputSplit) -> Iterator[tuple[NDArray[np.uint32], "bytes | memoryview"]]:
    """Yield the ids of each document, which end with the end of text, and its bytes, which identify it."""
    end = np.array([tokenizer.end_of_text], dtype=np.uint32)
    encoded = iter(tokenizer.encode([document.content for document in batch if isinstance(document.content, str)]))
    for document in batch:
        if isinstance(document.content, str):
            ids = np.append(next(encoded), end)
        else:
            ids = document.content
            if ids.max() >= tokenizer.vocabulary:
                problem = f"expected token ids below the tokenizer's {tokenizer.vocabulary}, got {ids.max()}"
                location = split.places.location(document.position)
                raise InputError(f"{location}: {problem}. Set tokenizer.file to the tokenizer that wrote them.")
            if ids[-1] != tokenizer.end_of_text:
                ids = np.append(ids, end)
        yield ids, _raw(document.content)


def _raw(content: Content) -> "bytes | memoryview":
    return content.encode() if isinstance(content, str) else np.ascontiguousarray(content).data.cast("B")
