"""Text tokenized while it is read, with no preparation: `data.live`.

Pieces of the sources come in a keyed order, another one each epoch, and documents in the files' own. Each data rank reads a share of its
own: every n-th piece where there are as many for each of n ranks, of about one size, else every n-th document of each piece. What a rank
reads is fixed by config and n alone, so a run that comes back on as many ranks goes on with the very samples it would have read; on
another number there is no telling which were read, and it is refused. A cursor says where a rank stands: checkpoints hold each one's.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count

import numpy as np
from numpy.typing import NDArray

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.hashing import hashed
from manta.data.live.live_sources import Part, parts_of, prepare_live, with_absolute_paths
from manta.data.objectives.examples import Examples
from manta.data.objectives.objective import Objective
from manta.data.prepare.encode import sample_text
from manta.data.sampling.order import Permutation
from manta.data.sampling.samples import Samples, entropy
from manta.data.sampling.windows import Windows
from manta.data.shards.manifest import Prepared
from manta.data.sources.config import FilterConfig
from manta.data.sources.input_split import BadRow
from manta.data.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_PROOF_BYTES, _PROOF_PIECES = 1_000_000, 8  # text on which a faster encoder must equal the reference: of few pieces, for each is opened
_ABOUT_ONE_SIZE = 1.25  # the largest piece over the mean, up to which ranks take whole pieces

Numbers = NDArray[np.int64]
Ids = NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a rank's next sample begins."""

    epoch: int = 0
    piece: int = 0
    """In the epoch's order."""
    document: int = 0
    """Of the piece, counted over all ranks and whatever is left out."""
    token: int = 0
    """Of the document."""


class LiveSamples:
    """One data rank's samples, asked for in the order in which a run reads them."""

    def __init__(
        self, prepared: Prepared, data: DataConfig, tokens: TokenizerConfig, *, seed: int, held_out: int, rank: int = 0, ranks: int = 1
    ) -> None:
        """held_out: validation samples wanted, which are read here and now.

        Raises InputError where there are none, where the sources or the tokenizer are not those that `prepared` tells, or where the
        tokenizer lacks what the objective needs.
        """
        data = with_absolute_paths(data)
        if (got := prepare_live(prepared.tokenizer, data, tokens).fingerprint) != prepared.fingerprint:
            raise InputError(
                f"data.sources: fingerprint {got}; the run wants {prepared.fingerprint}: the corpus is another one than the run began with"
            )
        self._seed, self._rank, self._ranks = seed, rank, ranks
        self._tokenizer = Tokenizer(prepared.tokenizer, end_of_text=tokens.end_of_text)
        self._objective = Objective(data, self._tokenizer)
        by_source = [parts_of(source, data) for source in data.sources]
        self._parts = [part for parts, _ in by_source for part in parts]
        self._takes_pieces = _as_many_for_each([part.piece.size for part in self._parts], ranks)
        self._tokenizer.choose_encoder(_some_text(self._parts))
        self._malformed = 0
        self._read = -1
        self.seek(Cursor())
        self.sequence_length = data.sequence_length
        self.tokenizer_vocabulary = self._tokenizer.vocabulary
        self._validation = self._first_held_out([parts for _, parts in by_source], held_out, share=data.validation)
        self.validation_windows = len(self._validation)

    def train(self, count: NDArray[np.integer], *, sequence_length: int | None = None) -> Examples:
        """What this rank reads next; `count` [K] are the numbers that these samples have in the run, which rise from call to call."""
        samples = np.asarray(count, dtype=np.int64)
        rows: list[Numbers] = []
        for number in samples.tolist():
            assert number > self._read, f"sample {number} after {self._read}"
            row, self._cursor = next(self._windows)
            rows.append(row)
            self._read = number
        return self._objective(Windows(tokens=np.stack(rows)), samples, seed=self._seed, sequence_length=sequence_length)

    def validation(self, indices: NDArray[np.integer]) -> Examples:
        """Those of the validation windows [K] in range(validation_windows), the same for every seed and on every rank."""
        samples = np.asarray(indices, dtype=np.int64)
        return self._objective(self.validation_text(samples), samples, seed=None)

    def validation_text(self, indices: NDArray[np.integer]) -> Windows:
        """Validation windows [K] as they stand in the files."""
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= self.validation_windows):
            raise IndexError(f"validation: expected indices below {self.validation_windows}, got {indices.min()} to {indices.max()}")
        return Windows(tokens=self._validation[indices])

    def validation_unigram_entropy(self, indices: NDArray[np.integer]) -> float:
        """As `Samples.validation_unigram_entropy`."""
        tokens = self.validation_text(indices).tokens[:, -self._objective.shape.stride :]
        return entropy(np.bincount(tokens.ravel(), minlength=self.tokenizer_vocabulary))

    @property
    def cursor(self) -> Cursor:
        """Where this rank's next sample begins."""
        return self._cursor

    def seek(self, cursor: Cursor) -> None:
        """As if all before it had been read."""
        assert cursor.piece < max(1, len(self._parts)), f"{cursor} of {len(self._parts)} pieces"
        self._cursor = cursor
        self._windows = self._windows_from(cursor)

    def _windows_from(self, cursor: Cursor) -> Iterator[tuple[Numbers, Cursor]]:
        """This rank's windows, each with the cursor after it. Without end: epochs follow one another."""
        width, stride = self._objective.shape.width, self._objective.shape.stride
        held: deque[tuple[Cursor, Ids]] = deque()  # documents; of the first, what is left of it
        size = 0
        for begin, ids in self._documents_from(cursor):
            held.append((begin, ids))
            size += len(ids)
            while size >= width:
                row = _first(held, width)
                size -= stride
                yield row, _pass_over(held, stride)

    def _documents_from(self, cursor: Cursor) -> Iterator[tuple[Cursor, Ids]]:
        """The ids of this rank's documents to train on, the first from the cursor's token on."""
        for epoch in count(cursor.epoch):
            order = Permutation(len(self._parts), int(hashed(self._seed, epoch)[0]))(np.arange(len(self._parts))).tolist()
            found = False
            for place in range(cursor.piece if epoch == cursor.epoch else 0, len(order)):
                resumed = (epoch, place) == (cursor.epoch, cursor.piece)
                for number, text in self._own(self._parts[order[place]], place, cursor.document if resumed else 0):
                    token = cursor.token if resumed and number == cursor.document else 0
                    yield Cursor(epoch=epoch, piece=place, document=number, token=token), self._encoded(text)[token:]
                    found = True
            if not found and epoch > cursor.epoch:  # the first one may have been all but done
                raise InputError(
                    f"data.sources: got no document for data rank {self._rank} in a whole epoch, wants one for each of {self._ranks} ranks;"
                    " give more documents, or use fewer ranks"
                )

    def _own(self, part: Part, place: int, first: int) -> Iterator[tuple[int, str]]:
        """Of a piece that stands at this place of an epoch: what this rank trains on, from document `first` on, with its number."""
        if self._takes_pieces and place % self._ranks != self._rank:
            return
        for number, found in enumerate(part.piece.documents()):
            # Which rank the first document falls to depends on the place: pieces may be of a single one.
            if number < first or not (self._takes_pieces or (number + place) % self._ranks == self._rank):
                continue
            if isinstance(found, BadRow):
                self._tell(found)
            if (text := part.text(found)) is not None and not part.holds_out(text):
                yield number, text

    def _tell(self, refused: BadRow) -> None:
        """The first malformed row, and again each time there are twice as many."""
        self._malformed += 1
        if self._malformed & (self._malformed - 1) == 0:
            log.warning("malformed rows are left out, %d so far, the last: %s", self._malformed, refused.message)

    def _first_held_out(self, by_source: Sequence[Sequence[Part]], wanted: int, *, share: float) -> Numbers:
        """The first validation windows, of the first documents that each source holds out, in turn: [<= wanted, W]."""
        width, stride = self._objective.shape.width, self._objective.shape.stride
        texts: list[Ids] = []
        size = 0
        for text in _in_turn(chain.from_iterable(part.held_out() for part in parts) for parts in by_source):
            texts.append(self._encoded(text))
            size += len(texts[-1])
            if size >= width + (wanted - 1) * stride:
                break
        count = min(wanted, max(0, size - width + stride) // stride)
        if not count:
            wants = f"a sample of {self.sequence_length} wants {width}"
            raise InputError(f"data.validation: {size} tokens are held out; {wants}: raise it from {share:g}, or give more documents")
        tokens = np.concatenate(texts).astype(np.int64)
        return np.lib.stride_tricks.sliding_window_view(tokens, width)[::stride][:count].copy()

    def _encoded(self, text: str) -> Ids:
        """A batch of documents is encoded no faster than one by one: measured, with either library."""
        return np.append(self._tokenizer.encode([text])[0], np.uint32(self._tokenizer.end_of_text))


def open_samples(
    prepared: Prepared, data: DataConfig, tokens: TokenizerConfig, *, seed: int, held_out: int = 1, rank: int = 0, ranks: int = 1
) -> Samples | LiveSamples:
    """What data rank `rank` of `ranks` reads. held_out: how many validation samples are wanted; of a prepared corpus all can be had.

    Raises InputError as `Samples` and `LiveSamples` do.
    """
    if data.live:
        return LiveSamples(prepared, data, tokens, seed=seed, held_out=held_out, rank=rank, ranks=ranks)
    return Samples(prepared, data, tokens, seed=seed)


def check_data_ranks(cursors: Sequence[object] | None, ranks: int) -> None:
    """Raises InputError where a checkpoint of a live run is to go on with more or fewer data ranks than it has cursors."""
    saved = len(cursors or ())
    if saved != ranks:
        wants = f"{saved}: so many have read its text, each a share of its own"
        remedy = "start as many (cluster.ranks_per_node), or begin a new run without data.live, from these weights by run.start_from"
        raise InputError(f"data.live: got {ranks} data rank{'s' if ranks > 1 else ''}, wants {wants}; {remedy}")


def _as_many_for_each(sizes: Sequence[int], ranks: int) -> bool:
    """Whether ranks take whole pieces, so that each reads its own files only. Else some would be through an epoch much sooner than others.

    Shards of a stream tell no size: all of them 0.
    """
    return bool(sizes) and len(sizes) % ranks == 0 and max(sizes) * len(sizes) <= _ABOUT_ONE_SIZE * sum(sizes)


def _some_text(parts: Sequence[Part]) -> list[str]:
    spread = parts[:: max(1, len(parts) // _PROOF_PIECES)][:_PROOF_PIECES]
    return list(sample_text([(part.piece, FilterConfig()) for part in spread], _PROOF_BYTES))


def _first(held: Iterable[tuple[Cursor, Ids]], width: int) -> Numbers:
    """The first tokens of all that is held [W]."""
    row, filled = np.empty(width, dtype=np.int64), 0
    for _, ids in held:
        taken = ids[: width - filled]
        row[filled : filled + len(taken)] = taken
        filled += len(taken)
        if filled == width:
            break
    return row


def _pass_over(held: deque[tuple[Cursor, Ids]], count: int) -> Cursor:
    """Lets go of so many tokens. Gives where what follows begins."""
    while True:
        at, ids = held.popleft()
        if count < len(ids):
            at = replace(at, token=at.token + count)
            held.appendleft((at, ids[count:]))
            return at
        count -= len(ids)
        if not held:  # with whichever document comes next
            return replace(at, document=at.document + 1, token=0)


def _in_turn(streams: Iterable[Iterator[str]]) -> Iterator[str]:
    """One of each, then again, until all are at their ends."""
    waiting = deque(streams)
    while waiting:
        stream = waiting.popleft()
        for one in stream:
            yield one
            waiting.append(stream)
            break
