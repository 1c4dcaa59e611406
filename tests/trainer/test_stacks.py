"""A rank that hangs in a collective says so when it is asked, though nothing of its own code can run."""

import signal
import socket
import subprocess
import sys
import time

RANK = """
import signal, sys, time
from manta.trainer import stack_traces
stack_traces.answer(signal.SIGUSR2)
import torch, torch.distributed as dist
rank, port = map(int, sys.argv[1:])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
for _ in range(3):
    dist.all_reduce(torch.ones(4))
print("three", flush=True)
if rank == 1:
    time.sleep(600)  # a peer that skips the fourth
dist.all_reduce(torch.ones(2, 3))
"""


def test_a_rank_that_waits_for_a_peer_tells_which_collective_it_is_in_and_where():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([sys.executable, "-P", "-c", RANK, str(rank), str(port)], **piped) for rank in (0, 1)]
    try:
        for rank in ranks:
            assert rank.stdout.readline() == "three\n"
        time.sleep(1)
        for rank in ranks:
            rank.send_signal(signal.SIGUSR2)
        time.sleep(1)
    finally:
        for rank in ranks:
            rank.kill()
    told = [rank.communicate()[1] for rank in ranks]
    assert "collectives of group 0 (default_pg): 4 begun, the last, gloo:all_reduce of [[2, 3]], is waited for" in told[0]
    assert "collectives of group 0 (default_pg): 3 begun, the last, gloo:all_reduce of [[4]], is done" in told[1]
    assert all("Current thread" in text or "Thread 0x" in text for text in told)
