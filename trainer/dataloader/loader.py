"""Micro batches, prepared by a thread of their own while those before them are computed."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from manta.data.live.samples import Cursor, LiveSamples
from manta.data.objectives.causal import IGNORED, Examples
from manta.data.sampling.samples import Samples
from manta.data.sampling.timeline import Timeline
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dist.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    batch: Batch
    digest: int


class Reader:
    """Reads one step ahead. A single thread does all the reading, in order; what goes wrong in it is raised to whoever asks, as it is."""

    def __init__(
        self,
        samples: Samples | LiveSamples,
        timeline: Timeline,
        layout: Layout,
        *,
        rank: int,
        seed: int,
        steps: int,
        device: torch.device,
    ) -> None:
        """rank: which of the layout's data ranks. seed: the run's. steps: of the whole run."""
        self._samples, self._timeline, self._layout, self._rank, self._seed, self._steps = samples, timeline, layout, rank, seed, steps
        self._pins = device.type == "cuda"
        # Each thread is at a GPU of its own choice, the first at first: pinned memory would be that one's.
        self._thread = ThreadPoolExecutor(1, "reader", partial(torch.cuda.set_device, device) if self._pins else None)
        self._ahead: dict[int, list[Future[Microbatch]]] = {}
        self._begun: tuple[int, Cursor] | None = None  # the last step whose reading was begun, and where; of live samples

    def step(self, step: int) -> Iterator[Microbatch]:
        """This rank's micro batches of a step. Those of the next one are begun."""
        for wanted in (step, step + 1):
            if wanted not in self._ahead and wanted < self._steps:
                turns = self._layout.accumulation(self._timeline.phase(wanted).global_batch)
                self._ahead[wanted] = [self._thread.submit(self._train, wanted, turn) for turn in range(turns)]
        for future in self._ahead.pop(step):
            yield future.result()

    def validation(self, indices: NDArray[np.integer], count: int) -> Batch:
        """Validation samples [K]; those from `count` on only make up the batch, and predict nothing."""
        return self._thread.submit(self._validation, indices, count).result()

    def cursor(self, step: int) -> Cursor | None:
        """Where the reading of the next step to be taken begins, whatever of it is read already; None where samples are had by number."""
        begun = self._begun
        if begun is not None and begun[0] == step:
            return begun[1]
        return self._thread.submit(self._stands, step).result()

    def close(self) -> None:
        """The thread ends with what it is reading; nobody waits for that."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _train(self, step: int, turn: int) -> Microbatch:
        if isinstance(self._samples, LiveSamples) and turn == 0:
            self._begun = step, self._samples.cursor
        first, length = self._timeline.first_sample(step), self._timeline.phase(step).sequence_length
        numbers = self._layout.samples(first=first, turn=turn, rank=self._rank)
        examples = self._samples.train(numbers, sequence_length=length)
        return Microbatch(batch=self._batch(examples), digest=examples.digest())

    def _stands(self, step: int) -> Cursor | None:
        """By now all that was asked for is read."""
        if self._begun is not None and self._begun[0] == step:
            return self._begun[1]
        return self._samples.cursor if isinstance(self._samples, LiveSamples) else None

    def _validation(self, indices: NDArray[np.integer], count: int) -> Batch:
        examples = self._samples.validation(np.minimum(indices, count - 1))
        return self._batch(_counted(examples, indices < count))

    def _batch(self, examples: Examples) -> Batch:
        batch = Batch.of(examples, seed=self._seed)
        return batch.pinned() if self._pins else batch


def _counted(examples: Examples, counted_K: NDArray[np.bool_]) -> Examples:
    """The same, predicting nothing where an example is there only to make up the batch."""
    pairs = examples.next_sentence
    return replace(
        examples,
        targets=np.where(counted_K[:, None], examples.targets, IGNORED),
        next_sentence=None if pairs is None else np.where(counted_K, pairs, IGNORED),
    )
