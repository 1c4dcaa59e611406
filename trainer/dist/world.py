"""This process among all ranks: how it joins the others, and its process groups."""

import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]  torch documents them

from manta.cluster.protocol import Env
from manta.data.errors import InputError
from manta.trainer.dist.layout import Layout, WeightShard
from manta.trainer.hardware import check_gpus, device_type

FAST_POLLING = 5.0  # seconds during which a rank polls for rank 0 more often than torch does


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One rank among all. `attempt` counts the starts of a supervised run; 0 without a supervisor."""

    rank: int
    size: int
    local_rank: int
    attempt: int

    @classmethod
    def from_environment(cls) -> Self:
        """Read the variables that torchrun sets as well. A process started alone is rank 0 of 1."""
        names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", Env.ATTEMPT: "0"}
        try:
            rank, size, local_rank, attempt = (int(os.environ.get(name, default)) for name, default in names.items())
        except ValueError as error:
            raise InputError(f"{', '.join(names)}: expected whole numbers: {error}. Unset them or let a launcher set them.") from None
        if not 0 <= rank < size:
            raise InputError(f"RANK: expected 0 <= RANK < WORLD_SIZE, got {rank} of {size}. Let a launcher set them.")
        return cls(rank=rank, size=size, local_rank=local_rank, attempt=attempt)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if device_type() == "cuda" else torch.device("cpu")

    def join(self, *, timeout: timedelta = timedelta(minutes=30)) -> None:
        """Create the process group of all ranks: gloo for CPU tensors (checkpoint planning), NCCL for GPU tensors."""
        check_gpus()
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in os.environ:
            if self.size > 1:
                remedy = "Start the ranks with `manta train` or torchrun."
                raise InputError(f"MASTER_PORT: expected a free port of rank 0's node, got nothing. {remedy}")
            os.environ["MASTER_PORT"] = "0"  # a free one
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.size), LOCAL_RANK=str(self.local_rank))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        _check_interface()
        backend = "gloo"
        if self.device.type == "cuda":
            if self.local_rank >= (gpus := torch.cuda.device_count()):
                expected = f"one rank per GPU, of which this node has {gpus}"
                raise InputError(f"LOCAL_RANK: expected {expected}, got {self.local_rank}. Lower cluster.ranks_per_node.")
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        store = None
        if self.rank == 0:
            store = self._listen(address, port, timeout)
        else:
            _wait_for_rank_0(address, port)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    def _listen(self, address: str, port: int, timeout: timedelta) -> Store | None:
        """Return a store that listens only on MASTER_ADDR: torch's own would listen on every address of this machine.

        None leaves it to torch: torchrun's agent may have a store already, and each node may resolve a host name to another address.
        """
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return None
        try:
            family = socket.getaddrinfo(address, port, flags=socket.AI_NUMERICHOST)[0][0]
        except socket.gaierror:  # a name
            return None
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((address, port))
            except OSError as error:
                expected = "expected an address of rank 0's machine and a free port there"
                raise OSError(f"MASTER_ADDR, MASTER_PORT: {expected}, got {address}, {port}: {error.strerror}") from error
            store = TCPStore(address, port, self.size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())
        return PrefixStore("default_pg", store)  # torch's name: the other ranks join by MASTER_ADDR and MASTER_PORT

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return each value summed over all ranks, in fp64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def mesh(self, layout: Layout) -> "Mesh":
        """Create the process groups of this layout. All ranks call this together, after they have joined."""
        tensor, sequence, expert = layout.tensor, layout.sequence, layout.expert
        ranks = range(self.size)
        replicas = [list(ranks[index::tensor]) for index in range(tensor)]  # ranks with the same tensor shard
        return Mesh(
            data_rank=self.rank // (tensor * sequence),
            sequence_rank=self.rank // tensor % sequence,
            tensor_rank=self.rank % tensor,
            expert_rank=self.rank // tensor % expert,
            layout=layout,
            tensor=self._own_group(list(ranks[first : first + tensor]) for first in range(0, self.size, tensor)),
            sequence=self._own_group(same[first : first + sequence] for same in replicas for first in range(0, len(same), sequence)),
            replicas=self._own_group(replicas),
            expert=self._own_group(same[first : first + expert] for same in replicas for first in range(0, len(same), expert)),
            expert_replicas=self._own_group(same[first::expert] for same in replicas for first in range(expert)),
        )

    def _own_group(self, groups: Iterable[list[int]]) -> ProcessGroup:
        """Create this rank's group, of groups that partition the ranks. Only its members take part: the cost does not grow with ranks."""
        own = next(ranks for ranks in groups if self.rank in ranks)
        group: Any = dist.group.WORLD if len(own) == self.size else dist.new_group(own, use_local_synchronization=True)
        return group


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """One rank's indices in a layout, and its process groups. Ranks are numbered tensor first, then sequence, then data.

    It also serves as DeepSpeed's `mpu`, which calls all ranks that hold the same weights "data parallel".
    """

    data_rank: int
    sequence_rank: int
    tensor_rank: int
    expert_rank: int
    layout: Layout
    tensor: ProcessGroup  # ranks that share each matrix
    sequence: ProcessGroup  # ranks that share each sequence
    replicas: ProcessGroup  # ranks that hold the same weights, experts excepted: data x sequence
    expert: ProcessGroup  # ranks that share the experts: consecutive replicas
    expert_replicas: ProcessGroup  # ranks that hold the same experts

    @property
    def shard(self) -> WeightShard:
        return WeightShard(tensor=(self.tensor_rank, self.layout.tensor), expert=(self.expert_rank, self.layout.expert))

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


def _check_interface() -> None:
    """Raises InputError if GLOO_SOCKET_IFNAME names a network interface that this machine does not have."""
    named, present = os.environ.get("GLOO_SOCKET_IFNAME", ""), [name for _, name in socket.if_nameindex()]
    if missing := [name for name in named.split(",") if name and name not in present]:
        expected = f"a network interface of {socket.gethostname()} ({', '.join(present)})"
        raise InputError(f"GLOO_SOCKET_IFNAME: expected {expected}, got {missing[0]}. Unset it, or name another one.")


def _wait_for_rank_0(address: str, port: int) -> None:
    """Return once rank 0 listens, or after some seconds. torch polls too, but sleeps half a second if rank 0 is a moment late."""
    deadline, wait = time.monotonic() + FAST_POLLING, 0.005
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, port), timeout=1.0) as connection:
                if connection.getsockname() != connection.getpeername():  # else it is connected to itself, over its own ephemeral port
                    return
        except OSError:
            time.sleep(wait)
            wait = min(2 * wait, 0.1)
