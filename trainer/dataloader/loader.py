"""The data loader: a thread prepares the next step's micro batches while the model computes the current one."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from manta.data.live.live_samples import Cursor, LiveSamples
from manta.data.objectives.examples import IGNORED, Examples
from manta.data.sampling.samples import Samples
from manta.data.sampling.step_samples import Timeline
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dist.layout import Layout


class Microbatch(NamedTuple):
    """What this rank reads for one micro step."""

    batch: Batch
    digest: int
    """Digest of its samples; see `Examples.digest`."""
    wait_seconds: float
    """How long the caller waited for it."""


class DataLoader:
    """Prefetches one step. A single thread does all the reading, in order; its exceptions are raised unchanged to the caller."""

    def __init__(
        self, samples: Samples | LiveSamples, timeline: Timeline, layout: Layout, *, rank: int, seed: int, steps: int, device: torch.device
    ) -> None:
        """rank: the data rank. seed: the run's. steps: of the whole run."""
        self._samples, self._timeline, self._layout, self._rank, self._seed, self._steps = samples, timeline, layout, rank, seed, steps
        self._pin = device.type == "cuda"
        # Each thread has its own current GPU, at first GPU 0, and pinned memory belongs to the current one.
        self._thread = ThreadPoolExecutor(1, "data-loader", partial(torch.cuda.set_device, device) if self._pin else None)
        self._prefetched: dict[int, list[Future[tuple[Batch, int]]]] = {}
        self._started: tuple[int, Cursor] | None = None  # the last step that was started to be read, and its cursor; live samples only

    def step(self, step: int) -> Iterator[Microbatch]:
        """Yield this rank's micro batches of a step. Also starts to prefetch the next step."""
        for number in (step, step + 1):
            if number not in self._prefetched and number < self._steps:
                micro_steps = self._layout.accumulation(self._timeline.stage(number).global_batch)
                self._prefetched[number] = [self._thread.submit(self._read, number, micro_step) for micro_step in range(micro_steps)]
        for future in self._prefetched.pop(step):
            start = time.perf_counter()
            batch, digest = future.result()
            yield Microbatch(batch=batch, digest=digest, wait_seconds=time.perf_counter() - start)

    def validation(self, read: Callable[[NDArray[np.integer]], Examples], indices: NDArray[np.integer], count: int) -> Batch:
        """Return what `read` returns for these indices [K]. Those from `count` on fill up the batch and predict nothing."""
        return self._thread.submit(self._read_validation, read, indices, count).result()

    def cursor(self, step: int) -> Cursor | None:
        """Return where the reading of the run's next step starts, whatever was prefetched; None unless samples are live."""
        if not isinstance(self._samples, LiveSamples):
            return None
        if self._started is None or self._started[0] != step:
            self._thread.submit(int).result()  # wait for all reads submitted so far
        if self._started is not None and self._started[0] == step:
            return self._started[1]
        return self._samples.cursor

    def close(self) -> None:
        """Stop the thread after its current micro batch, without waiting for it."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read(self, step: int, micro_step: int) -> tuple[Batch, int]:
        if isinstance(self._samples, LiveSamples) and micro_step == 0:
            self._started = step, self._samples.cursor
        first, length = self._timeline.first_sample(step), self._timeline.stage(step).sequence_length
        numbers = self._layout.samples_of_rank(first=first, micro_step=micro_step, rank=self._rank)
        examples = self._samples.train(numbers, sequence_length=length)
        return self._batch(examples), examples.digest()

    def _read_validation(self, read: Callable[[NDArray[np.integer]], Examples], indices: NDArray[np.integer], count: int) -> Batch:
        examples, counted_K = read(np.minimum(indices, count - 1)), indices < count
        pairs = examples.next_sentence
        return self._batch(
            replace(
                examples,
                targets=np.where(counted_K[:, None], examples.targets, IGNORED),
                next_sentence=None if pairs is None else np.where(counted_K, pairs, IGNORED),
            )
        )

    def _batch(self, examples: Examples) -> Batch:
        batch = Batch.from_examples(examples, seed=self._seed)
        return batch.pin_memory() if self._pin else batch
