"""How ranks meet, where one comes before rank 0 listens."""

import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore

from manta.trainer.dist.world import _await_first, _free_port

HEAD_START = 0.05  # seconds that rank 1 is before rank 0


def test_a_rank_that_comes_before_rank_0_is_not_kept_waiting():
    assert min(seconds_of_meeting(asks_often=True) for _ in range(3)) < 0.15


def test_torch_by_itself_keeps_it_waiting():
    """Should it not any more, `World.join` need not ask."""
    assert min(seconds_of_meeting(asks_often=False) for _ in range(3)) > 0.15


def seconds_of_meeting(*, asks_often: bool) -> float:
    """From when rank 0 comes."""
    port, came = _free_port(), []

    def rank_0() -> None:
        time.sleep(HEAD_START)
        came.append(time.monotonic())
        stores.append(TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False))

    stores: list[TCPStore] = []
    thread = threading.Thread(target=rank_0)
    thread.start()
    if asks_often:
        _await_first("127.0.0.1", port)
    TCPStore("127.0.0.1", port, 2, is_master=False, timeout=timedelta(seconds=30))
    met = time.monotonic()
    thread.join()
    return met - came[0]
