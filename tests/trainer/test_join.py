"""How ranks join if one starts before rank 0 listens."""

import threading
import time
from datetime import timedelta

import pytest
from ssh_hosts import free_port
from torch.distributed import TCPStore

from manta.data.errors import InputError
from manta.trainer.dist.world import World, _wait_for_rank_0

HEAD_START = 0.05  # seconds by which rank 1 starts before rank 0


def test_a_rank_that_starts_before_rank_0_joins_at_once():
    assert min(seconds_to_join(polls=True) for _ in range(3)) < 0.15


def test_torch_alone_waits_longer():
    """If this fails, `World.join` no longer needs to poll."""
    assert min(seconds_to_join(polls=False) for _ in range(3)) > 0.15


def seconds_to_join(*, polls: bool) -> float:
    """Return the seconds from the start of rank 0 until rank 1 has joined."""
    port, started = free_port(), []

    def rank_0() -> None:
        time.sleep(HEAD_START)
        started.append(time.monotonic())
        stores.append(TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False))

    stores: list[TCPStore] = []
    thread = threading.Thread(target=rank_0)
    thread.start()
    if polls:
        _wait_for_rank_0("127.0.0.1", port)
    TCPStore("127.0.0.1", port, 2, is_master=False, timeout=timedelta(seconds=30))
    joined = time.monotonic()
    thread.join()
    return joined - started[0]


def test_an_interface_that_this_machine_lacks_is_refused(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,nosuch0")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(InputError, match=r"^GLOO_SOCKET_IFNAME: expected a network interface of \S+ \(.*lo.*\), got nosuch0\. Unset it"):
        World(rank=0, size=1, local_rank=0, attempt=0).join()
