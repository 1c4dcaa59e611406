"""Who takes which samples: the plan of a global batch over ranks, a pure function of counts."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manta.data.errors import InputError
from manta.trainer.config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """data x micro_batch x accumulation = global batch, exactly."""

    data: int  # ranks that hold whole replicas and share the samples
    micro_batch: int  # sequences a rank takes at once
    accumulation: int  # turns a rank takes an optimizer step

    @property
    def global_batch(self) -> int:
        return self.data * self.micro_batch * self.accumulation

    def samples(self, *, step: int, turn: int, rank: int) -> NDArray[np.int64]:
        """The global sample numbers [micro_batch] that `rank` takes in this turn (0 <= turn < accumulation) of this step.

        Over all ranks and turns they are range(step * global_batch, (step + 1) * global_batch), each once: the layout decides who
        reads a sample, never which samples a step reads.
        """
        first = step * self.global_batch + (turn * self.data + rank) * self.micro_batch
        return np.arange(first, first + self.micro_batch, dtype=np.int64)


def plan(train: TrainConfig, ranks: int) -> Layout:
    """The layout for at most `ranks` ranks: the largest data size that deals the global batch out evenly. The rest stand by."""
    if ranks < 1:
        raise InputError(f"cluster: got {ranks} ranks, wants at least 1; raise cluster.ranks_per_node")
    turns = train.global_batch // train.micro_batch
    data = next(size for size in range(min(ranks, turns), 0, -1) if turns % size == 0)
    return Layout(data=data, micro_batch=train.micro_batch, accumulation=turns // data)


def fits(train: TrainConfig, ranks: int) -> Layout:
    """The layout for exactly `ranks` ranks. Raises InputError where the global batch can not be dealt out evenly over them."""
    layout = plan(train, ranks)
    if layout.data != ranks:
        turns = f"train.global_batch {train.global_batch} / train.micro_batch {train.micro_batch}"
        raise InputError(f"WORLD_SIZE: got {ranks} ranks, wants a divisor of {turns}; start {layout.data} ranks or lower train.micro_batch")
    return layout
