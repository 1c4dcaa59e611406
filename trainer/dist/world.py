"""Where this process stands among its peers, and how it joins them."""

import ipaddress
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]  torch documents them

from manta.cluster.protocol import Env
from manta.data.errors import InputError
from manta.trainer.hardware.device import check_gpus, device_type
from manta.trainer.dist.layout import Layout
from manta.trainer.dist.sharding import Part

SOON = 5.0  # seconds in which rank 0 is asked for often


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
                for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), (Env.ATTEMPT, "0"))
            )
        except ValueError as error:
            raise InputError(f"RANK, WORLD_SIZE, LOCAL_RANK, {Env.ATTEMPT}: {error}; unset them or let a launcher set them") from None
        if not 0 <= rank < size:
            raise InputError(f"RANK: got {rank} of WORLD_SIZE {size}, wants 0 <= RANK < WORLD_SIZE; let a launcher set them")
        return cls(rank=rank, size=size, local_rank=local, attempt=attempt)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if device_type() == "cuda" else torch.device("cpu")

    def join(self, *, timeout: timedelta = timedelta(minutes=30)) -> None:
        """Meets the other ranks. Gloo carries what lies on the CPU (checkpoint planning), NCCL what lies on GPUs."""
        check_gpus()
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in os.environ:
            if self.size > 1:
                raise InputError("MASTER_PORT: not set, wants a free port of rank 0's node; start the ranks with `manta train` or torchrun")
            os.environ["MASTER_PORT"] = str(_free_port())
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.size), LOCAL_RANK=str(self.local_rank))
        backend = "gloo"
        if self.device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                wants = f"one rank a GPU, of which this node has {torch.cuda.device_count()}"
                raise InputError(f"LOCAL_RANK: got {self.local_rank}, wants {wants}; lower cluster.ranks_per_node")
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        store = self._rendezvous(timeout) if self.rank == 0 else None
        if self.rank > 0:
            _await_first(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    def _rendezvous(self, timeout: timedelta) -> Store | None:
        """Where the ranks meet, listening at MASTER_ADDR alone: torch would have it listen at every address that this machine has.

        None leaves it to torch: torchrun's agent may have one already, and a name may mean another address to each node.
        """
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not _is_address(address):
            return None
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                door.bind((address, port))
            except OSError as error:
                wants = "an address of this machine, which has rank 0, and a port that is free there"
                raise OSError(f"MASTER_ADDR, MASTER_PORT: got {address}, {port}, wants {wants}: {error.strerror}") from error
            store = TCPStore(address, port, self.size, is_master=True, timeout=timeout, master_listen_fd=door.detach())
        return PrefixStore("default_pg", store)  # as torch names it: the other ranks come by MASTER_ADDR and MASTER_PORT

    def mesh(self, layout: Layout) -> "Mesh":
        """The groups of this layout. All ranks call this together, once they have joined."""
        tensor, sequence, expert = layout.tensor, layout.sequence, layout.expert
        ranks = range(self.size)
        lanes = [list(ranks[lane::tensor]) for lane in range(tensor)]  # ranks that hold the same part of each matrix
        return Mesh(
            data_rank=self.rank // (tensor * sequence),
            sequence_rank=self.rank // tensor % sequence,
            tensor_rank=self.rank % tensor,
            expert_rank=self.rank // tensor % expert,
            layout=layout,
            tensor=self._mine(list(ranks[first : first + tensor]) for first in range(0, self.size, tensor)),
            sequence=self._mine(lane[first : first + sequence] for lane in lanes for first in range(0, len(lane), sequence)),
            replicas=self._mine(lanes),
            expert=self._mine(lane[first : first + expert] for lane in lanes for first in range(0, len(lane), expert)),
            expert_replicas=self._mine(lane[first::expert] for lane in lanes for first in range(expert)),
        )

    def _mine(self, groups: Iterable[list[int]]) -> ProcessGroup:
        """Of groups that hold every rank once, the one that this rank is in. Its own ranks alone make it: it costs the same at any size."""
        mine = next(ranks for ranks in groups if self.rank in ranks)
        group: Any = dist.group.WORLD if len(mine) == self.size else dist.new_group(mine, use_local_synchronization=True)
        return group


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """One rank's place in a layout, and the groups it is in. Ranks count tensor first, then sequence, then data.

    It is DeepSpeed's `mpu` as well: what that names data parallel are all ranks that hold the same weights.
    """

    data_rank: int
    sequence_rank: int
    tensor_rank: int
    expert_rank: int
    layout: Layout
    tensor: ProcessGroup  # share each matrix
    sequence: ProcessGroup  # share each sequence
    replicas: ProcessGroup  # hold the same weights, experts apart: data x sequence
    expert: ProcessGroup  # share the experts: consecutive replicas
    expert_replicas: ProcessGroup  # hold the same experts

    @property
    def part(self) -> Part:
        return Part(tensor=(self.tensor_rank, self.layout.tensor), expert=(self.expert_rank, self.layout.expert))

    @property
    def is_first_of_sample(self) -> bool:
        """Whether this rank is the first of those that read the same samples."""
        return self.tensor_rank == self.sequence_rank == 0

    def get_model_parallel_group(self) -> ProcessGroup:
        return self.tensor

    def get_model_parallel_world_size(self) -> int:
        return self.layout.tensor

    def get_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_data_parallel_group(self) -> ProcessGroup:
        return self.replicas

    def get_data_parallel_world_size(self) -> int:
        return self.layout.replicas

    def get_data_parallel_rank(self) -> int:
        return self.data_rank * self.layout.sequence + self.sequence_rank


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _await_first(address: str, port: int) -> None:
    """Until rank 0 listens, some seconds at most. torch asks too, but sleeps half a second where it has come a moment early."""
    deadline, wait = time.monotonic() + SOON, 0.005
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, port), timeout=1.0) as door:
                if door.getsockname() != door.getpeername():  # else it has met itself: the port was its own for this moment
                    return
        except OSError:
            time.sleep(wait)
            wait = min(2 * wait, 0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
