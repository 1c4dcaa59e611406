"""What a rank that hangs tells when it is asked: where each of its threads stands, and which collectives it is in.

Asked by a signal. The first is told by the handler itself, wherever the process hangs; the second by a thread, from the flight recorder of
torch, as long as whoever hangs has let go of Python's lock, which waiting for peers does.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from manta.cluster.protocol import Env

RECORDED = "2000"  # collectives that are kept, the newest
SETTINGS = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")  # the newer name, and the older


def answer(number: signal.Signals) -> None:
    """From here on. To be called on the main thread, before the first process group is made: the recorder reads its settings once.

    What NCCL's own watchdog has to say of a collective that took too long goes beside the log, too. What the user has set stands.
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ.update(dict.fromkeys(SETTINGS, RECORDED))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if log := os.environ.get(Env.LOG_FILE):
        for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
            os.environ.setdefault(name, str(Path(log).parent / "nccl-timeout-rank-"))  # torch adds the rank
    asked, asks = os.pipe()
    os.set_blocking(asks, False)
    signal.signal(number, _nothing)  # so that Python's handler stands behind the other, and writes into the pipe at once
    signal.set_wakeup_fd(asks, warn_on_full_buffer=False)
    faulthandler.register(number, all_threads=True, chain=True)
    threading.Thread(target=_listen, args=(asked, number), name="stacks", daemon=True).start()


def _nothing(*_: object) -> None:
    pass


def _listen(asked: int, number: signal.Signals) -> None:
    while heard := os.read(asked, 512):
        if number in heard:
            for trace in _traces():
                sys.stderr.write("".join(f"{line}\n" for line in told(trace)))
            sys.stderr.flush()


def _traces() -> Iterator[dict[str, Any]]:
    """Of the collectives on CPUs, and of NCCL's where there are any."""
    if "torch.distributed" not in sys.modules:
        return
    import torch._C._distributed_c10d as c10d

    for dump in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        if hasattr(c10d, dump):
            yield json.loads(getattr(c10d, dump)())


def told(trace: Mapping[str, Any]) -> Iterator[str]:
    """A line for each group: how far it has come, and what it is in or did last. trace: as torch's flight recorder dumps it."""
    newest = {entry["process_group"][0]: entry for entry in trace.get("entries", ())}
    for group, entry in newest.items():
        number, name = entry["collective_seq_id"], entry["process_group"][1]
        what = f"{entry['profiling_name']} of {entry['input_sizes']}"
        state = "done" if entry["retired"] else "waited for"
        yield f"collectives of group {group} ({name}): {number} begun, the last, {what}, is {state}"
