"""How the global batch is split over ranks, and which ranks share weights: pure functions of the config and the number of ranks."""

import math
import os
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from manta.cluster.protocol import Env
from manta.data.errors import InputError
from manta.trainer.config.divisors import divisors
from manta.trainer.config.sections import ParallelConfig, TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """data x micro_batch x accumulation = global batch; data x sequence x tensor = ranks.

    One layout serves every step: if the global batch changes during a run, only accumulation changes.
    """

    data: int  # data-parallel groups: each reads its own samples
    micro_batch: int  # samples in one forward pass
    tensor: int = 1  # ranks that share each matrix
    sequence: int = 1  # ranks that share each sequence (Ulysses)
    expert: int = 1  # ranks that share the experts, taken from data x sequence
    zero: int = 1  # ZeRO stage
    offload: bool = False  # keep masters and optimizer state in CPU memory

    @property
    def replicas(self) -> int:
        """Number of ranks that hold the same weights, experts excepted. ZeRO partitions over them."""
        return self.data * self.sequence

    @property
    def ranks(self) -> int:
        return self.replicas * self.tensor

    def accumulation(self, global_batch: int) -> int:
        """Return the number of micro batches that each rank accumulates in an optimizer step."""
        count, remainder = divmod(global_batch, self.data * self.micro_batch)
        assert not remainder, f"a global batch of {global_batch} does not divide over {self}"
        return count

    def samples_of_rank(self, *, first: int, micro_step: int, rank: int) -> NDArray[np.int64]:
        """Return the sample numbers [micro_batch] of data rank `rank` in this micro step of the step that starts at sample `first`.

        Over all data ranks and micro steps they are range(first, first + global batch), each once: the layout decides which rank reads a
        sample, never which samples a step reads.
        """
        start = first + (micro_step * self.data + rank) * self.micro_batch
        return np.arange(start, start + self.micro_batch, dtype=np.int64)

    def to_environment(self) -> dict[str, str]:
        """Return the variable that hands this layout to the ranks."""
        return {Env.LAYOUT: _ADAPTER.dump_json(self).decode()}

    def suits(self, train: TrainConfig, parallel: ParallelConfig, ranks: int) -> bool:
        """Whether these ranks can train this config under this layout, possibly with smaller tensor, sequence and expert sizes."""
        return (
            self.ranks == ranks
            and (self.micro_batch, self.zero, self.offload) == (train.micro_batch, parallel.zero, parallel.offload)
            and max_data_ranks(train) % self.data == 0
            and parallel.tensor % self.tensor == parallel.sequence % self.sequence == parallel.expert % self.expert == 0
            and self.replicas % self.expert == 0
        )

    def __str__(self) -> str:
        sizes = ((self.data, "data"), (self.tensor, "tensor"), (self.sequence, "sequence"), (self.expert, "expert"))
        named = [f"{name} {size}" for size, name in sizes if size > 1]
        return ", ".join([*named, f"ZeRO-{self.zero}" + (" offloaded" if self.offload else "")])


@dataclass(frozen=True, slots=True)
class WeightShard:
    """Which shard of the weights a rank holds: (index, number of shards) on each axis."""

    tensor: tuple[int, int] = (0, 1)
    expert: tuple[int, int] = (0, 1)


_ADAPTER = TypeAdapter(Layout)


def layout_from_environment(train: TrainConfig, parallel: ParallelConfig, ranks: int) -> Layout:
    """Return the layout that the launcher handed over; without a launcher, compute it.

    Raises InputError if it does not suit the config or the number of ranks.
    """
    text = os.environ.get(Env.LAYOUT)
    if text is None:
        return layout_for(train, parallel, ranks)
    try:
        layout = _ADAPTER.validate_json(text)
    except ValidationError as error:
        raise InputError(f"{Env.LAYOUT}: expected a layout in JSON, got {text!r}. Start the ranks with `manta train`.") from error
    if not layout.suits(train, parallel, ranks):
        expected = f"a layout of {ranks} ranks that suits config.yaml"
        raise InputError(f"{Env.LAYOUT}: expected {expected}, got {layout}. Start the ranks with `manta train`.")
    return layout


def layout_for(train: TrainConfig, parallel: ParallelConfig, ranks: int, *, may_shrink: bool = False) -> Layout:
    """Return the layout for exactly `ranks` ranks. Raises InputError if a global batch does not divide evenly over them.

    may_shrink: if there are too few ranks, reduce tensor, sequence and expert sizes.
    """
    if may_shrink and (shrunk := shrunk_layouts(train, parallel).get(ranks)):
        return shrunk
    layout = largest_layout(train, parallel, ranks)
    if layout.ranks != ranks:
        remedy = f"Start {layout.ranks} ranks or lower train.micro_batch."
        raise InputError(f"WORLD_SIZE: expected a divisor of {micro_batches_text(train)}, got {ranks} ranks. {remedy}")
    return layout


def largest_layout(train: TrainConfig, parallel: ParallelConfig, ranks: int) -> Layout:
    """Return the layout with the most data ranks for at most `ranks` ranks; the others stay idle. Raises InputError if there is none."""
    least = parallel.tensor * parallel.sequence
    if ranks < least:
        sizes = f"parallel.tensor {parallel.tensor} x parallel.sequence {parallel.sequence} = {least} ranks"
        raise InputError(f"cluster: expected at least {sizes}, got {ranks}. Raise cluster.ranks_per_node or lower these sizes.")
    fitting = [layout for size, layout in layouts(train, parallel).items() if size <= ranks]
    if not fitting:
        got, remedy = f"{parallel.expert} for {ranks} ranks", "Lower it, or raise cluster.ranks_per_node or train.global_batch."
        raise InputError(f"parallel.expert: expected a divisor of the data ranks, got {got}. {remedy}")
    return fitting[-1]


def layouts(train: TrainConfig, parallel: ParallelConfig) -> dict[int, Layout]:
    """Return a layout for each number of ranks that a run can use, in ascending order."""
    sizes = parallel.model_dump()
    candidates = (Layout(data=data, micro_batch=train.micro_batch, **sizes) for data in divisors(max_data_ranks(train)))
    return {layout.ranks: layout for layout in candidates if layout.replicas % layout.expert == 0}


def shrunk_layouts(train: TrainConfig, parallel: ParallelConfig) -> dict[int, Layout]:
    """Return layouts for numbers of ranks below the smallest of `layouts`, so that a run can continue on what is left of a cluster.

    Their tensor, sequence and expert sizes divide the configured ones: tensor as large as possible, then sequence, then expert, so that
    each rank holds as little more as possible.
    """
    least, found = min(layouts(train, parallel), default=1), dict[int, Layout]()
    for tensor, sequence, expert in product(*(divisors(size)[::-1] for size in (parallel.tensor, parallel.sequence, parallel.expert))):
        smaller = parallel.model_copy(update={"tensor": tensor, "sequence": sequence, "expert": expert})
        for ranks, layout in layouts(train, smaller).items():
            if ranks < least:
                found.setdefault(ranks, layout)
    return found


def max_data_ranks(train: TrainConfig) -> int:
    """Return how many data ranks can share the micro batches of every step; numbers of data ranks divide it."""
    return math.gcd(*train.batches) // train.micro_batch


def micro_batches_text(train: TrainConfig) -> str:
    """Describe the number that the data ranks must divide."""
    batches = ", ".join(map(str, dict.fromkeys(train.batches)))
    dividend = f"each of train.batch_ramp's {batches}" if train.batch_ramp else f"train.global_batch {batches}"
    return f"{dividend} / train.micro_batch {train.micro_batch}"
