"""Ray in a thread: to start or join it takes seconds, and may hang in Ray's own code, which no signal and no exception interrupts."""

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Self

from manta.cluster.ray.errors import RayStartError
from manta.cluster.ray.private_ray import abandon, ended_process, start_failure
from manta.cluster.ray.runtime import Ray

LAST_WORDS = 2.0  # seconds that Ray's code has to raise an error after one of its processes has ended
SHUTDOWN_TIMEOUT = 30.0  # seconds


class Connection:
    """Context manager. Its thread lives as long as the Ray cluster that it started: Ray's processes end with it."""

    def __init__(self, ray: Ray) -> None:
        self._ray = ray
        self._started = Future[Path | None]()
        self._closing = threading.Event()
        self._is_stuck = False
        self._thread = threading.Thread(target=self._run, name="ray", daemon=True)

    def is_ready(self, wait: float) -> bool:
        """Whether Ray has started, or starts within some seconds. Raises RayStartError if it cannot."""
        ended = ended_process()
        try:
            self._started.result(LAST_WORDS if ended else wait)
        except TimeoutError:
            if ended is None:
                return False
            self._is_stuck = True
            raise RayStartError(start_failure(ended)) from None
        return True

    @property
    def scratch(self) -> Path | None:
        """A private directory (0700) for agents; None if they make one."""
        return self._started.result()

    def __enter__(self) -> Self:
        try:
            self._thread.start()
        except RuntimeError as error:  # no thread is left
            raise RayStartError(start_failure(str(error)), is_transient=True) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(0 if self._is_stuck else SHUTDOWN_TIMEOUT)
        if self._thread.is_alive():
            abandon()

    def _run(self) -> None:
        try:
            with self._ray.connected() as scratch:
                self._started.set_result(scratch)
                self._closing.wait()
        except RayStartError as error:
            self._started.set_exception(error)
        except Exception as error:  # noqa: BLE001  whatever Ray raises becomes a line for the user
            if not self._started.done():
                self._started.set_exception(RayStartError(f"{type(error).__name__}: {error}"))
