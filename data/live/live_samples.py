"""Samples tokenized while training, without preparation: `data.live`.

Each epoch reads the input splits in a different pseudo-random order, and the documents of a split in file order. If the splits can be
divided evenly over n data ranks and have similar sizes, each rank reads every n-th split; otherwise it reads every n-th document of each
split. What a rank reads depends only on the config and n, so a run that resumes on n data ranks continues with exactly the same samples.
On another number, which documents have been read is unknown, and the run is refused. Checkpoints store a cursor for each data rank.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice, zip_longest

import numpy as np
from numpy.typing import NDArray

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.hashing import hashed
from manta.data.live.live_sources import LiveSplit, live_splits, prepare_live, with_absolute_paths
from manta.data.objectives.examples import Examples
from manta.data.objectives.objective import Objective
from manta.data.sampling.order import Permutation
from manta.data.sampling.origins import DocumentOrigin
from manta.data.sampling.samples import Samples
from manta.data.shards.manifest import PreparedData
from manta.data.shards.windows import Windows, check_indices
from manta.data.source_config import FilterConfig
from manta.data.sources.input_split import BadRow
from manta.data.sources.splits import sample_text
from manta.data.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_ENCODER_TEST_BYTES, _ENCODER_TEST_SPLITS = 1_000_000, 8  # text on which the fast encoder must equal the reference; each split is opened
_MAX_SIZE_RATIO = 1.25  # largest split over the mean, up to which each rank reads its own splits

Numbers = NDArray[np.int64]
Ids = NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a rank's next sample starts. Checkpoints store these fields by name."""

    epoch: int = 0
    piece: int = 0
    """The split, by its position in the epoch's order."""
    document: int = 0
    """In the split, counting the documents of all ranks and those that are not read."""
    token: int = 0
    """In the document."""


class LiveSamples:
    """The samples of one data rank, which must be read in order."""

    def __init__(
        self, prepared: PreparedData, data: DataConfig, tokens: TokenizerConfig, *, seed: int, held_out: int, rank: int = 0, ranks: int = 1
    ) -> None:
        """held_out: validation samples to read, which happens here.

        Raises InputError if there are none, if the sources or the tokenizer have changed since `prepared`, or if the tokenizer lacks
        tokens that the objective needs.
        """
        data = with_absolute_paths(data)
        if (fingerprint := prepare_live(prepared.tokenizer, data, tokens).fingerprint) != prepared.fingerprint:
            expected = f"fingerprint {prepared.fingerprint}, of the text that the run started with"
            raise InputError(f"data.sources: expected {expected}, got {fingerprint}. Restore that text, or start a new run.")
        self._seed, self._rank, self._ranks = seed, rank, ranks
        self._tokenizer = Tokenizer(prepared.tokenizer, end_of_text=tokens.end_of_text)
        self._objective = Objective(data, self._tokenizer)
        by_source = [live_splits(source, data) for source in data.sources]
        self._splits = [split for train, _ in by_source for split in train]
        self._reads_whole_splits = _divides_evenly([split.split.size for split in self._splits], ranks)
        spread = self._splits[:: max(1, len(self._splits) // _ENCODER_TEST_SPLITS)][:_ENCODER_TEST_SPLITS]
        self._tokenizer.choose_encoder(list(sample_text([(split.split, FilterConfig()) for split in spread], _ENCODER_TEST_BYTES)))
        self._bad_rows = 0
        self._last_read = -1
        self.seek(Cursor())
        self.sequence_length = data.sequence_length
        self.tokenizer_vocabulary = self._tokenizer.vocabulary
        self._validation = self._read_validation([splits for _, splits in by_source], held_out, share=data.validation)
        self.validation_windows = len(self._validation)
        self.source_names = ()  # a window may hold documents of several sources
        self.token_bytes = self._tokenizer.token_bytes()

    def train(self, read_indices: NDArray[np.integer], *, sequence_length: int | None = None) -> Examples:
        """Return this rank's next samples. read_indices [K]: their numbers in the run, which rise from call to call."""
        samples = np.asarray(read_indices, dtype=np.int64)
        assert (np.diff(samples, prepend=self._last_read) > 0).all(), f"samples {samples} after {self._last_read}"
        rows, cursors = zip(*islice(self._windows, len(samples)), strict=True)
        self._last_read, self.cursor = int(samples[-1]), cursors[-1]
        return self._objective(Windows(tokens=np.stack(rows)), samples, seed=self._seed, sequence_length=sequence_length)

    def validation(self, indices: NDArray[np.integer]) -> Examples:
        """Return validation examples [K] in range(validation_windows), which are the same for every seed and on every rank."""
        samples = np.asarray(indices, dtype=np.int64)
        check_indices(samples, self.validation_windows)
        return self._objective(Windows(tokens=self._validation[samples]), samples, seed=None)

    def documents(self, _sample: int) -> list[DocumentOrigin]:
        """Return no documents: without a prepared corpus, where they came from is not recorded."""
        return []

    def seek(self, cursor: Cursor) -> None:
        """Continue from a cursor."""
        assert cursor.piece < max(1, len(self._splits)), f"{cursor} of {len(self._splits)} splits"
        self.cursor = cursor  # where this rank's next sample starts
        self._windows = self._windows_from(cursor)

    def _windows_from(self, cursor: Cursor) -> Iterator[tuple[Numbers, Cursor]]:
        """Yield this rank's windows, each with the cursor after it, without end."""
        width, stride = self._objective.shape.width, self._objective.shape.stride
        buffer: deque[tuple[Cursor, Ids]] = deque()  # documents, or the rest of the first one
        size = 0
        for start, ids in self._documents_from(cursor):
            buffer.append((start, ids))
            size += len(ids)
            while size >= width:
                row = _first_tokens(buffer, width)
                size -= stride
                yield row, _drop(buffer, stride)

    def _documents_from(self, cursor: Cursor) -> Iterator[tuple[Cursor, Ids]]:
        """Yield the ids of this rank's train documents, epoch after epoch. The first one starts at the cursor's token."""
        for epoch in count(cursor.epoch):
            order = Permutation(len(self._splits), int(hashed(self._seed, epoch)[0]))(np.arange(len(self._splits))).tolist()
            is_empty = True
            for position in range(cursor.piece if epoch == cursor.epoch else 0, len(order)):
                resumed = (epoch, position) == (cursor.epoch, cursor.piece)
                for number, text in self._own_documents(self._splits[order[position]], position, cursor.document if resumed else 0):
                    token = cursor.token if resumed and number == cursor.document else 0
                    yield Cursor(epoch=epoch, piece=position, document=number, token=token), self._encode(text)[token:]
                    is_empty = False
            if is_empty and epoch > cursor.epoch:  # the first epoch may have been resumed close to its end
                problem = f"expected a document for each of {self._ranks} data ranks, got none for rank {self._rank} in an epoch"
                raise InputError(f"data.sources: {problem}. Add documents, or use fewer ranks.")

    def _own_documents(self, split: LiveSplit, position: int, first: int) -> Iterator[tuple[int, str]]:
        """Yield this rank's train documents of the split at this position of an epoch, from number `first` on, with their numbers."""
        if self._reads_whole_splits and position % self._ranks != self._rank:
            return
        for number, document in enumerate(split.split.documents()):
            # The rank of the first document depends on the position, because a split may have a single document.
            if number < first or not (self._reads_whole_splits or (number + position) % self._ranks == self._rank):
                continue
            if isinstance(document, BadRow):
                self._bad_rows += 1
                if self._bad_rows.bit_count() == 1:  # the first, and again each time their number has doubled
                    log.warning("skipped %d malformed rows so far, most recently: %s", self._bad_rows, document.message)
            if (text := split.text(document)) is not None and not split.holds_out(text):
                yield number, text

    def _read_validation(self, by_source: Sequence[Sequence[LiveSplit]], requested: int, *, share: float) -> Numbers:
        """Return up to `requested` validation windows [<= requested, W], from the validation documents of all sources in turn."""
        width, stride = self._objective.shape.width, self._objective.shape.stride
        texts: list[Ids] = []
        size = 0
        streams = [chain.from_iterable(split.validation_texts() for split in splits) for splits in by_source]
        for text in (text for turn in zip_longest(*streams) for text in turn if text is not None):
            texts.append(self._encode(text))
            size += len(texts[-1])
            if size >= width + (requested - 1) * stride:
                break
        windows = min(requested, self._objective.shape.count(size))
        if not windows and not share and not size:
            return np.zeros((0, width), dtype=np.int64)
        if not windows:
            problem = f"expected at least {width} for a sample of {self.sequence_length}, got {size} validation tokens"
            raise InputError(f"data.validation: {problem}. Raise it from {share:g}, add documents, or set it to 0.")
        tokens = np.concatenate(texts).astype(np.int64)
        return np.lib.stride_tricks.sliding_window_view(tokens, width)[::stride][:windows].copy()

    def _encode(self, text: str) -> Ids:
        """Encode one document. Batches are not faster with either library (measured)."""
        return np.append(self._tokenizer.encode([text])[0], np.uint32(self._tokenizer.end_of_text))


def open_samples(
    prepared: PreparedData, data: DataConfig, tokens: TokenizerConfig, *, seed: int, held_out: int = 1, rank: int = 0, ranks: int = 1
) -> Samples | LiveSamples:
    """Open the samples of data rank `rank` of `ranks`. held_out: validation samples to read if they are live.

    Raises InputError; see `Samples` and `LiveSamples`.
    """
    if data.live:
        return LiveSamples(prepared, data, tokens, seed=seed, held_out=held_out, rank=rank, ranks=ranks)
    return Samples(prepared, data, tokens, seed=seed)


def check_data_ranks(cursors: Sequence[object] | None, ranks: int) -> None:
    """Raise InputError if a checkpoint of a live run is to resume on another number of data ranks than it has cursors."""
    saved = len(cursors or ())
    if saved != ranks:
        plural = "" if saved == 1 else "s"
        problem = f"expected {saved} data rank{plural}, which have each read a share of the text, got {ranks}"
        remedy = f"Start {saved} (cluster.ranks_per_node), or start a new run without data.live from these weights (run.start_from)."
        raise InputError(f"data.live: {problem}. {remedy}")


def _divides_evenly(sizes: Sequence[int], ranks: int) -> bool:
    """Whether each rank can read the same number of splits of similar size, so that all ranks finish an epoch at about the same time.

    The shards of a stream have unknown sizes: all are 0.
    """
    return bool(sizes) and len(sizes) % ranks == 0 and max(sizes) * len(sizes) <= _MAX_SIZE_RATIO * sum(sizes)


def _first_tokens(buffer: Iterable[tuple[Cursor, Ids]], width: int) -> Numbers:
    """Return the first `width` tokens of the buffer [width]."""
    parts: list[Ids] = []
    for _, ids in buffer:
        parts.append(ids[:width])
        width -= len(parts[-1])
        if not width:
            break
    return np.concatenate(parts, dtype=np.int64)


def _drop(buffer: deque[tuple[Cursor, Ids]], count: int) -> Cursor:
    """Remove the first `count` tokens. Returns the cursor of the next token."""
    while True:
        cursor, ids = buffer.popleft()
        if count < len(ids):
            cursor = replace(cursor, token=cursor.token + count)
            buffer.appendleft((cursor, ids[count:]))
            return cursor
        count -= len(ids)
        if not buffer:  # continue with whichever document is next
            return replace(cursor, document=cursor.document + 1, token=0)
