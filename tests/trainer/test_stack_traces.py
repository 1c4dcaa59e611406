"""A rank that hangs in a collective logs it when asked by a signal, although its own code can not run."""

import signal
import socket
import subprocess
import sys
import time

RANK = """
import signal, sys, time
from manta.trainer import signals
signals.dump_on_signal(signal.SIGUSR2)
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


def test_a_hung_rank_logs_its_pending_collective_and_its_stacks():
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
    logs = [rank.communicate()[1] for rank in ranks]
    assert "process group 0 (default_pg): collective 4, gloo:all_reduce of [[2, 3]], is pending" in logs[0]
    assert "process group 0 (default_pg): collective 3, gloo:all_reduce of [[4]], is done" in logs[1]
    assert not any("deprecated" in text for text in logs)
    assert all("Current thread" in text or "Thread 0x" in text for text in logs)
