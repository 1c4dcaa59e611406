"""Text tokenized while it is read, with no preparation: `data.live`.

Data rank r of n takes every n-th document of each piece of the sources, from the r-th on; pieces come in a keyed order, another one
each epoch, and documents in the files' own. What a rank reads is fixed by config and n alone, so a run that comes back on as many
ranks goes on with the very samples it would have read; on another number there is no telling which were read, and it is refused.
A cursor says where a rank stands; checkpoints hold one of each rank.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import xxhash
from numpy.typing import NDArray

from manta.data import corpus
from manta.data.config import DataConfig, TokenizerConfig
from manta.data.encode import held_out_below
from manta.data.errors import InputError
from manta.data.examples import Objective, Read
from manta.data.filters import Filter
from manta.data.formats import Document, Piece
from manta.data.hashing import hashed
from manta.data.manifest import Prepared
from manta.data.objectives import Examples
from manta.data.order import Permutation
from manta.data.samples import entropy
from manta.data.stream import Text
from manta.data.tokenizer import Tokenizer

_REMEMBERED = 4096  # cursors of samples that may have been read ahead of the step that is saved

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a rank's next sample begins."""

    epoch: int = 0
    piece: int = 0
    """In the epoch's order."""
    document: int = 0
    """Of the piece, counted over all ranks."""
    token: int = 0
    """Of the document."""


class LiveSamples:
    """One data rank's samples, asked for in the order in which a run reads them."""

    def __init__(
        self, prepared: Prepared, data: DataConfig, tokens: TokenizerConfig, *, seed: int, held_out: int, rank: int = 0, ranks: int = 1
    ) -> None:
        """held_out: validation samples wanted. Raises InputError where there are none, or the tokenizer lacks what the objective needs."""
        self._seed, self._rank, self._ranks = seed, rank, ranks
        self._tokenizer = Tokenizer(prepared.tokenizer, end_of_text=tokens.end_of_text)
        self._objective = Objective(data, self._tokenizer)
        self._held_out_below = held_out_below(data.validation)
        self._pieces = [(piece, Filter(source.filter)) for source in data.sources for piece in corpus.pieces(source, data)]
        self._tokenizer.choose_encoder(self._some_text())
        self._history: deque[tuple[int, Cursor]] = deque(maxlen=_REMEMBERED)
        self._next = Cursor()
        self._text = self._windows(self._next)
        self.sequence_length = data.sequence_length
        self.tokenizer_vocabulary = self._tokenizer.vocabulary
        self._validation = self._first_held_out(held_out)
        self.validation_windows = len(self._validation)
        if not self.validation_windows:
            wants = f"a sample of {data.sequence_length}"
            raise InputError(f"data.validation: too little is held out for {wants}; raise data.validation, or give more documents")

    def train(self, count: NDArray[np.integer], *, sequence_length: int | None = None) -> Examples:
        """What this rank reads next; `count` [K] are the numbers that these samples have in the run, which rise from call to call."""
        samples = np.asarray(count, dtype=np.int64)
        rows: list[Numbers] = []
        for number in samples.tolist():
            assert not self._history or number > self._history[-1][0], f"sample {number} after {self._history[-1][0]}"
            self._history.append((number, self._next))
            row, self._next = next(self._text)
            rows.append(row)
        return self._objective(Read(text=Text(tokens=np.stack(rows))), samples, seed=self._seed, length=sequence_length)

    def validation(self, indices: NDArray[np.integer]) -> Examples:
        """Those of the first documents held out, the same for every seed and on every rank."""
        samples = np.asarray(indices, dtype=np.int64)
        return self._objective(Read(text=self.validation_text(samples)), samples, seed=None)

    def validation_text(self, indices: NDArray[np.integer]) -> Text:
        """Validation windows [K] as they stand in the files."""
        return Text(tokens=self._validation[np.asarray(indices)])

    def validation_unigram_entropy(self, indices: NDArray[np.integer]) -> float:
        """As `Samples.validation_unigram_entropy`."""
        tokens = self.validation_text(indices).tokens[:, -self._objective.shape.stride :]
        return entropy(np.bincount(tokens.ravel(), minlength=self.tokenizer_vocabulary))

    def cursor(self, count: int) -> Cursor:
        """Where this rank stands once the samples before `count` are trained on, whatever was read ahead."""
        return next((cursor for number, cursor in self._history if number >= count), self._next)

    def go_on_from(self, cursor: Cursor) -> None:
        """As if all before it had been read."""
        self._history.clear()
        self._next = cursor
        self._text = self._windows(cursor)

    def _windows(self, cursor: Cursor) -> Iterator[tuple[Numbers, Cursor]]:
        """This rank's windows from the cursor on, each with the cursor after it. Without end: epochs follow one another."""
        shape = self._objective.shape
        held: deque[tuple[Cursor, NDArray[np.uint32]]] = deque()  # documents, each from the place its cursor tells
        size = 0
        for begin, ids in self._documents(cursor):
            held.append((begin, ids))
            size += len(ids)
            while size >= shape.width:
                row = np.concatenate([ids for _, ids in held])[: shape.width].astype(np.int64)
                left = shape.stride
                while left >= len(held[0][1]):  # never the last: windows are wider than their stride, or a document follows
                    left -= len(held.popleft()[1])
                    if not held:
                        break
                if held:
                    first, rest = held[0]
                    after = Cursor(epoch=first.epoch, piece=first.piece, document=first.document, token=first.token + left)
                    held[0] = after, rest[left:]
                else:
                    after = Cursor(epoch=begin.epoch, piece=begin.piece, document=begin.document + 1)
                size -= shape.stride
                yield row, after

    def _documents(self, cursor: Cursor) -> Iterator[tuple[Cursor, NDArray[np.uint32]]]:
        """This rank's documents to train on, from the cursor on."""
        epoch, first = cursor.epoch, cursor.piece
        while True:
            order = Permutation(len(self._pieces), int(hashed(self._seed, epoch)[0]))(np.arange(len(self._pieces))).tolist()
            found = 0
            for place in range(first, len(order)):
                piece, taken = self._pieces[order[place]]
                resumed = (epoch, place) == (cursor.epoch, cursor.piece)
                skipped = cursor.document if resumed else 0
                for number, text in self._own(piece, taken, skipped):
                    found += 1
                    at = Cursor(epoch=epoch, piece=place, document=number, token=cursor.token if resumed and number == skipped else 0)
                    yield at, self._encoded(text)[at.token :]
            if not found and first == 0:
                raise InputError("data.sources: a whole epoch gave this rank no document; give more documents, or use fewer ranks")
            epoch, first = epoch + 1, 0

    def _own(self, piece: Piece, taken: Filter, skipped: int) -> Iterator[tuple[int, str]]:
        for number, text in enumerate(_texts(piece, taken)):
            if number >= skipped and number % self._ranks == self._rank and not self._is_held_out(text):
                yield number, text

    def _first_held_out(self, wanted: int) -> Numbers:
        """The first validation windows, of all sources in turn: [<= wanted, W]."""
        shape = self._objective.shape
        parts: list[NDArray[np.uint32]] = []
        size = 0
        for piece, taken in self._pieces:
            for text in _texts(piece, taken):
                if self._is_held_out(text):
                    parts.append(self._encoded(text))
                    size += len(parts[-1])
            if size >= wanted * shape.stride + shape.width:
                break
        count = min(wanted, max(0, size - shape.width + shape.stride) // shape.stride)
        if not count:
            return np.empty((0, shape.width), dtype=np.int64)
        stream = np.concatenate(parts).astype(np.int64)
        return np.lib.stride_tricks.sliding_window_view(stream, shape.width)[:: shape.stride][:count].copy()

    def _is_held_out(self, text: str) -> bool:
        return xxhash.xxh3_64_intdigest(text.encode()) < self._held_out_below

    def _encoded(self, text: str) -> NDArray[np.uint32]:
        return np.append(self._tokenizer.encode([text])[0], np.uint32(self._tokenizer.end_of_text))

    def _some_text(self) -> list[str]:
        """On which a faster encoder has to be proven."""
        return list(islice((text for piece, taken in self._pieces for text in _texts(piece, taken)), 200))


def _texts(piece: Piece, taken: Filter) -> Iterator[str]:
    for document in piece.documents():
        if isinstance(document, Document) and isinstance(document.content, str) and taken.reason_against(document.content) is None:
            yield document.content
