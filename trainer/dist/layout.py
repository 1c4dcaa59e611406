"""How a run lies on ranks: who takes which samples, who shares which weights. Pure functions of counts and config."""

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from manta.data.errors import InputError
from manta.trainer.config.training import ParallelConfig, TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """data x micro_batch x accumulation = global batch, exactly; data x sequence x tensor = ranks.

    It is one for the whole run: where the global batch changes, accumulation does, and nothing else.
    """

    data: int  # ranks, or groups of them, that share the samples
    micro_batch: int  # samples taken at once
    tensor: int = 1  # ranks that share each matrix
    sequence: int = 1  # ranks that share each sequence
    expert: int = 1  # ranks that share the experts, out of data x sequence
    zero: int = 1  # ZeRO stage
    offload: bool = False  # whether masters and optimizer state lie in CPU memory

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, experts apart: ZeRO cuts over them."""
        return self.data * self.sequence

    @property
    def ranks(self) -> int:
        return self.replicas * self.tensor

    def accumulation(self, global_batch: int) -> int:
        """Turns of an optimizer step of so many samples."""
        turns, left = divmod(global_batch, self.data * self.micro_batch)
        assert not left, f"a global batch of {global_batch} that was not planned for"
        return turns

    def samples(self, *, first: int, turn: int, rank: int) -> NDArray[np.int64]:
        """The global sample numbers [micro_batch] that data rank `rank` takes in this turn of a step that begins with sample `first`.

        Over all data ranks and turns they are range(first, first + global batch), each once: the layout decides who reads a sample,
        never which samples a step reads.
        """
        here = first + (turn * self.data + rank) * self.micro_batch
        return np.arange(here, here + self.micro_batch, dtype=np.int64)

    def __str__(self) -> str:
        sizes = ((self.data, "data"), (self.tensor, "tensor"), (self.sequence, "sequence"), (self.expert, "expert"))
        named = [f"{name} {size}" for size, name in sizes if size > 1]
        return ", ".join([*named, f"ZeRO-{self.zero}" + (" offloaded" if self.offload else "")])


def plan(train: TrainConfig, ranks: int, parallel: ParallelConfig | None = None) -> Layout:
    """The layout for at most `ranks` ranks: the largest data size that deals each global batch out evenly. The rest stand by."""
    parallel = parallel or ParallelConfig()
    if ranks < 1:
        raise InputError(f"cluster: got {ranks} ranks, wants at least 1; raise cluster.ranks_per_node")
    each = parallel.tensor * parallel.sequence
    if ranks < each:
        wants = f"at least parallel.tensor {parallel.tensor} x parallel.sequence {parallel.sequence} = {each}"
        raise InputError(f"cluster: got {ranks} ranks, wants {wants}; raise cluster.ranks_per_node or lower them")
    turns = shared_turns(train)
    fitting = (
        size for size in range(min(ranks // each, turns), 0, -1) if turns % size == 0 and size * parallel.sequence % parallel.expert == 0
    )
    data = next(fitting, None)
    if data is None:
        raise InputError(
            f"parallel.expert: got {parallel.expert}, wants a divisor of the data ranks, and {ranks} ranks can not be dealt out so;"
            " lower it, or raise cluster.ranks_per_node or train.global_batch"
        )
    return Layout(
        data=data,
        micro_batch=train.micro_batch,
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        expert=parallel.expert,
        zero=parallel.zero,
        offload=parallel.offload,
    )


def sizes(train: TrainConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """The numbers of ranks that a run can have, ascending."""
    each, turns = parallel.tensor * parallel.sequence, shared_turns(train)
    return tuple(data * each for data in range(1, turns + 1) if turns % data == 0 and data * parallel.sequence % parallel.expert == 0)


def smaller(train: TrainConfig, parallel: ParallelConfig) -> dict[int, ParallelConfig]:
    """Numbers of ranks too small for these sizes, and which sizes each can have instead: divisors of them, tensor as large as can be, then
    sequence, then expert, so that a rank has to hold as little more as can be.
    """
    least, found = min(sizes(train, parallel)), dict[int, ParallelConfig]()
    for tensor, sequence, expert in product(*(_divisors(size) for size in (parallel.tensor, parallel.sequence, parallel.expert))):
        instead = parallel.model_copy(update={"tensor": tensor, "sequence": sequence, "expert": expert})
        for ranks in sizes(train, instead):
            if ranks < least:
                found.setdefault(ranks, instead)
    return found


def _divisors(number: int) -> list[int]:
    """From the largest on."""
    return [divisor for divisor in range(number, 0, -1) if number % divisor == 0]


def shared_turns(train: TrainConfig) -> int:
    """How many ways the micro batches of a step can be dealt out, of whichever stage it is."""
    return math.gcd(*train.batches) // train.micro_batch


def turns_in_words(train: TrainConfig) -> str:
    """What the ranks have to divide."""
    batches = ", ".join(map(str, dict.fromkeys(train.batches)))
    of = f"each of train.batch_ramp's {batches}" if train.batch_ramp else f"train.global_batch {batches}"
    return f"{of} / train.micro_batch {train.micro_batch}"


def fits(train: TrainConfig, ranks: int, parallel: ParallelConfig | None = None, *, shrinks: bool = False) -> Layout:
    """The layout for exactly `ranks` ranks. Raises InputError where the global batch can not be dealt out evenly over them.

    `shrinks`: whether fewer ranks than tensor, sequence and expert want may have smaller ones.
    """
    if shrinks and parallel:
        parallel = smaller(train, parallel).get(ranks, parallel)
    layout = plan(train, ranks, parallel)
    if layout.ranks != ranks:
        wants = f"a divisor of {turns_in_words(train)}"
        raise InputError(f"WORLD_SIZE: got {ranks} ranks, wants {wants}; start {layout.ranks} ranks or lower train.micro_batch")
    return layout
