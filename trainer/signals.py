"""Signals that a rank handles: requests to stop, and requests to log where it is.

A rank that is asked where it is logs the stack of each thread, and the collectives it is in. The signal handler itself writes the stacks,
wherever the process hangs. A thread writes the collectives, from torch's flight recorder; it needs Python's lock, which a rank that waits
for its peers has released.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from manta.cluster.protocol import Env, collective_line

RECORDED = "2000"  # collectives that the flight recorder keeps, the newest
OLD_NAMES = {"TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"}
"""Of torch's settings. torch warns if they are set, so only a user sets them."""


class StopRequest:
    """Records SIGTERM and the first SIGINT from its construction on. A second SIGINT raises KeyboardInterrupt.

    Ranks act on a request between steps, all together: a rank that exited alone, even while importing, would leave the others waiting.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._record)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # a supervisor may have blocked it until now

    @property
    def is_made(self) -> bool:
        return self.signal is not None

    def _record(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


def dump_on_signal(number: signal.Signals) -> None:
    """Install the handler. Call it on the main thread, before the first process group exists: the recorder reads its settings once.

    NCCL's own watchdog writes its dump of a collective that timed out beside the log. Keeps what the user has set.
    """
    settings = {"TORCH_FR_BUFFER_SIZE": RECORDED, "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    if log := os.environ.get(Env.LOG_FILE):
        settings["TORCH_FR_DUMP_TEMP_FILE"] = str(Path(log).parent / "nccl-timeout-rank-")  # torch appends the rank
    for name, value in settings.items():
        if OLD_NAMES.get(name, name) not in os.environ:
            os.environ.setdefault(name, value)
    received, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.signal(number, lambda _number, _frame: None)  # faulthandler chains to Python's handler, which writes into the pipe at once
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    faulthandler.register(number, all_threads=True, chain=True)
    threading.Thread(target=_log_collectives, args=(received, number), name="stacks", daemon=True).start()


def _log_collectives(received: int, number: signal.Signals) -> None:
    while numbers := os.read(received, 512):
        if number in numbers:
            for trace in _traces():
                sys.stderr.write("".join(f"{line}\n" for line in describe(trace)))
            sys.stderr.flush()


def _traces() -> Iterator[dict[str, Any]]:
    """Yield the flight recorder's dumps: of collectives on CPUs, and of NCCL's if there are any."""
    if "torch.distributed" not in sys.modules:
        return
    import torch._C._distributed_c10d as c10d

    for dump in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        if hasattr(c10d, dump):
            yield json.loads(getattr(c10d, dump)())


def describe(trace: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each process group: how many collectives it has started, and the newest. trace: a dump of the flight recorder."""
    newest = {entry["process_group"][0]: entry for entry in trace.get("entries", ())}
    for group, entry in newest.items():
        yield collective_line(
            f"{group} ({entry['process_group'][1]})",
            number=entry["collective_seq_id"],
            collective=f"{entry['profiling_name']} of {entry['input_sizes']}",
            is_done=entry["retired"],
        )
