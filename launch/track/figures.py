"""Figures of the whole run, computed from its files from time to time: its goodput."""

import threading
import time
from collections.abc import Mapping

from manta.cluster.supervise.event_log import read_events
from manta.launch.goodput import goodput
from manta.trainer.metrics import read_all_metrics
from manta.trainer.run_directory import RunDirectory

INTERVAL, MAX_SHARE = 30.0, 0.01  # seconds between two computations, and the share of the time that they may take
LARGEST = 1 << 28  # bytes of metrics up to which there are figures


class Figures:
    """Shared by the trackers, each of which has a thread."""

    def __init__(self, run_dir: RunDirectory) -> None:
        self._run_dir, self._lock = run_dir, threading.Lock()
        self._newest: Mapping[str, float] = {}
        self._due = time.monotonic() + INTERVAL
        self._are_final = False

    def newest(self, *, has_ended: bool) -> Mapping[str, float]:
        """Return the newest figures by key, the same object until there are newer ones. They are final if the run has ended."""
        with self._lock:
            start = time.monotonic()
            if (start >= self._due or has_ended) and not self._are_final:
                self._newest = self._read(None if has_ended else time.time()) or self._newest
                self._due = time.monotonic() + max(INTERVAL, (time.monotonic() - start) / MAX_SHARE)
                self._are_final = has_ended
            return self._newest

    def _read(self, now: float | None) -> Mapping[str, float]:
        """Return none if nothing is trained yet, the run is long, or its disk is away for a moment."""
        try:
            if not 0 < self._run_dir.metrics_file.stat().st_size <= LARGEST:
                return {}
            found = goodput(read_events(self._run_dir.events_file), read_all_metrics(self._run_dir.metrics_file), now=now)
        except OSError:
            return {}
        seconds = {f"goodput_seconds/{category.replace(' ', '_')}": value for category, value in found.seconds.items()}
        return {"goodput/training": found.share, **seconds}
