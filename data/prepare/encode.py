"""The work of one process: a piece of a source becomes its train and its validation shard."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from manta.data.config import CacheConfig
from manta.data.errors import InputError
from manta.data.hashing import hashed
from manta.data.sampling.order import Permutation
from manta.data.shards.corpus_directory import Home
from manta.data.shards.manifest import PieceRecord
from manta.data.shards.shard import Shard, ShardWriter, dtype_for
from manta.data.sources.config import FilterConfig
from manta.data.sources.filters import Filter
from manta.data.sources.input_split import BadRow, Document, InputSplit
from manta.data.tokenizer.tokenizer import Encoder, Tokenizer

_BATCH = 1 << 20  # characters encoded at once
_SHUFFLED = 1 << 25  # tokens: documents change places within so many, which is what a worker holds in memory

MALFORMED, DUPLICATE = "malformed", "duplicate"

Tell = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One piece and all that decides what becomes of it."""

    piece: InputSplit
    index: int
    root: str
    cache: CacheConfig
    tokenizer: str
    end_of_text: str
    encoder: Encoder
    held_out: float
    """Share of documents for validation: 0 for none, 1 for all."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    duplicates: bytes = b""
    """A bit for each document of the piece that stands elsewhere before it."""

    @property
    def stem(self) -> str:
        return f"piece-{self.index:05d}"

    @property
    def record(self) -> str:
        return record_file(self.index)

    @property
    def home(self) -> Home:
        return Home(self.root, self.cache)


def record_file(index: int) -> str:
    """Says that a piece's shards are whole."""
    return f"piece-{index:05d}.json"


def encode(task: Task, tell: Tell) -> PieceRecord:
    """Write the piece's shards, and last its record, which says that they are whole.

    tell: is told, from time to time, the place in the piece that has been come to.
    """
    tokenizer = open_tokenizer(task.tokenizer, task.cache, task.end_of_text, task.encoder)
    taken = _Taken(task)
    with task.home.store.staging() as folder:
        with (
            _Shuffled(folder / f"{task.stem}.train", tokenizer.vocabulary, key=2 * task.index) as train,
            _Shuffled(folder / f"{task.stem}.validation", tokenizer.vocabulary, key=2 * task.index + 1) as validation,
        ):
            below = held_out_below(task.held_out)
            for batch in _batches(taken.documents(), tell):
                for ids, raw in _encoded(batch, tokenizer, task.piece):
                    # By its text, not its place: a document that stands twice falls on the same side twice.
                    split = validation if xxhash.xxh3_64_intdigest(raw) < below else train
                    split.append(ids, len(raw) if isinstance(raw, bytes) else 0)
            shards = train.commit(), validation.commit()
        for shard in shards:
            for name in (shard.file, shard.index) if shard else ():
                task.home.store.upload(folder / name, name)
    record = PieceRecord(train=shards[0], validation=shards[1], left_out=dict(sorted(taken.left_out.items())), refused=taken.refused)
    task.home.write(task.record, record.model_dump_json(indent=1).encode())
    return record


def hashes(task: Task, tell: Tell) -> NDArray[np.uint64]:
    """Of each document that the piece's filter takes, in order: what tells whether its text stands elsewhere too."""
    found: list[int] = []
    for batch in _batches(_Taken(task).documents(), tell):
        found.extend(xxhash.xxh3_64_intdigest(_raw(document.content)) for document in batch)
    return np.array(found, dtype=np.uint64)


def sample(pieces: Sequence[tuple[InputSplit, FilterConfig]], wanted: int) -> Iterator[str]:
    """About `wanted` bytes of text from all over: pieces in shuffled order, each giving its share of what is still wanted."""
    order = Permutation(len(pieces), key=0)(np.arange(len(pieces)))
    for left, index in zip(range(len(pieces), 0, -1), order, strict=True):
        share = math.ceil(wanted / left)
        piece, chosen = pieces[int(index)][0], Filter(pieces[int(index)][1])
        for document in piece.documents():
            if share <= 0:
                break
            if isinstance(document, BadRow) or not isinstance(document.content, str) or chosen.reason_against(document.content):
                continue
            part = document.content[:share]
            yield part
            taken = len(part.encode())
            share, wanted = share - taken, wanted - taken
        if wanted <= 0:
            return


@lru_cache(maxsize=1)
def open_tokenizer(at: str, cache: CacheConfig, end_of_text: str, encoder: Encoder = "tokenizers") -> Tokenizer:
    """A tokenizer.json, wherever it lies."""
    folder, _, name = at.rpartition("/")
    return Tokenizer(Home(folder, cache).copy(name), end_of_text=end_of_text, encoder=encoder)


def held_out_below(share: float) -> int:
    """A document is held out where the hash of its text is below this."""
    return math.ceil(share * 2**64)


class _Taken:
    """A piece's documents without those that are not wanted, which are counted by the reason."""

    def __init__(self, task: Task) -> None:
        self._piece, self._filter = task.piece, Filter(task.filter)
        self._duplicates = np.unpackbits(np.frombuffer(task.duplicates, np.uint8))
        self.left_out: Counter[str] = Counter()
        self.refused: str | None = None

    def documents(self) -> Iterator[Document]:
        number = 0
        for document in self._piece.documents():
            if isinstance(document, BadRow):
                self.refused = self.refused or document.message
                self.left_out[MALFORMED] += 1
                continue
            reason = None
            if isinstance(document.content, str) and not self._filter.takes_all:
                reason = self._filter.reason_against(document.content)
            if reason is None:
                number += 1
                if number <= len(self._duplicates) and self._duplicates[number - 1]:
                    reason = DUPLICATE
            if reason is not None:
                self.left_out[reason] += 1
                continue
            yield document


class _Shuffled:
    """A shard whose documents change places: neighbours in a file are alike, and samples are made of neighbours."""

    def __init__(self, prefix: Path, vocabulary: int, *, key: int) -> None:
        self._writer, self._key, self._blocks = ShardWriter(prefix, dtype_for(vocabulary)), key, 0
        self._held: list[NDArray[np.uint32]] = []
        self._tokens = self._text_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def append(self, ids: NDArray[np.uint32], text_bytes: int) -> None:
        self._held.append(ids)
        self._tokens += len(ids)
        self._text_bytes += text_bytes
        if self._tokens >= _SHUFFLED:
            self._flush()

    def commit(self) -> Shard | None:
        self._flush()
        return self._writer.commit()

    def _flush(self) -> None:
        if not self._held:
            return
        order = Permutation(len(self._held), int(hashed(self._key, self._blocks)[0]))(np.arange(len(self._held))).tolist()
        lengths = np.array([len(self._held[at]) for at in order], dtype=np.int64)
        self._writer.extend(np.concatenate([self._held[at] for at in order]), lengths, self._text_bytes)
        self._held, self._tokens, self._text_bytes, self._blocks = [], 0, 0, self._blocks + 1


def _encoded(batch: list[Document], tokenizer: Tokenizer, piece: InputSplit) -> Iterator[tuple[NDArray[np.uint32], "bytes | memoryview"]]:
    """Of each document its ids, which end with the end of text, and its bytes, which are its identity."""
    end = np.array([tokenizer.end_of_text], dtype=np.uint32)
    texts = [document.content for document in batch if isinstance(document.content, str)]
    encoded = iter(tokenizer.encode(texts))
    for document in batch:
        raw = _raw(document.content)
        if isinstance(document.content, str):
            yield np.concatenate([next(encoded), end]), raw
            continue
        ids = document.content
        if len(ids) and ids.max() >= tokenizer.vocabulary:
            wants = f"ids below the tokenizer's {tokenizer.vocabulary}: they were written with another one; set tokenizer.file to it"
            raise InputError(f"{piece.location(document.position)}: got token id {ids.max()}, wants {wants}")
        yield (ids if len(ids) and ids[-1] == tokenizer.end_of_text else np.concatenate([ids, end])), raw


def _raw(content: str | NDArray[np.uint32]) -> "bytes | memoryview":
    return content.encode() if isinstance(content, str) else np.ascontiguousarray(content).data.cast("B")


def _batches(documents: Iterable[Document], tell: Tell) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        tell(document.position)
        batch.append(document)
        size += len(document.content)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
