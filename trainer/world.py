"""Where this process stands among its peers, and how it joins them."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist

from manta.data.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One rank's place. `attempt` counts the starts of a run under supervision; 0 without it."""

    rank: int
    size: int
    local_rank: int
    attempt: int

    @classmethod
    def from_environment(cls) -> Self:
        """From the variables that torchrun sets too; a process started alone is rank 0 of 1."""
        try:
            rank, size, local, attempt = (
                int(os.environ.get(name, default))
                for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MANTA_ATTEMPT", "0"))
            )
        except ValueError as error:
            raise InputError(f"RANK, WORLD_SIZE, LOCAL_RANK, MANTA_ATTEMPT: {error}; unset them or let a launcher set them") from None
        if not 0 <= rank < size:
            raise InputError(f"RANK: got {rank} of WORLD_SIZE {size}, wants 0 <= RANK < WORLD_SIZE; let a launcher set them")
        return cls(rank=rank, size=size, local_rank=local, attempt=attempt)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def join(self, *, timeout: timedelta = timedelta(minutes=30)) -> None:
        """Meets the other ranks. Gloo carries what lies on the CPU (checkpoint planning), NCCL what lies on GPUs."""
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in os.environ:
            if self.size > 1:
                raise InputError("MASTER_PORT: not set, wants a free port of rank 0's node; start the ranks with `manta train` or torchrun")
            os.environ["MASTER_PORT"] = str(_free_port())
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.size), LOCAL_RANK=str(self.local_rank))
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=timeout)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
