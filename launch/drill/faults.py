"""The faults of a drill: each is injected into a running run, which must detect it and resume."""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from manta.cluster.ray.runtime import JoinedRay, Ray
from manta.cluster.supervise.event_log import POLL, Event
from manta.cluster.supervise.fault_injection import Fault, FaultInjector
from manta.cluster.supervise.hangs import MIN_INTERVALS
from manta.cluster.supervise.stragglers import CHECKS, LASTING
from manta.cluster.tail import Tail
from manta.data.storage.store import open_store
from manta.launch.config import RunConfig
from manta.launch.terminal import count_text, notify
from manta.trainer.metrics import Line, parse_line
from manta.trainer.run_directory import RunDirectory

TIMEOUT = 600.0  # seconds in which a run must detect a fault, and resume after it
NODE_RETURN_TIMEOUT = 60.0  # seconds to wait for a lost node
ACTOR_TIMEOUT = 30.0  # seconds that Ray has to start the fault injector
STEPS_BETWEEN = 3  # steps between two faults
COMMIT_TIME = 0.2  # seconds in which a save that all ranks have written is committed

T = TypeVar("T")
Script = Generator[None, None, T]
"""Runs until its next `yield`, and continues at the next event of the run."""


@dataclass(slots=True, kw_only=True)
class FaultResult:
    """What happened after a fault. Times are in seconds after it, None if it was not detected, or the run did not resume.

    `skipped`: why it was not injected. `first_line`: how many lines the run had logged by then. `keeps_running`: the run never stopped.
    `recomputed`: steps that were computed twice. `losses`: how they compare with those of a run without faults.
    """

    fault: str
    skipped: str = ""
    first_line: int = 0
    detected: float | None = None
    resumed: float | None = None
    keeps_running: bool = False
    recomputed: int = 0
    note: str = ""
    losses: str = ""
    has_same_losses: bool = False

    def cells(self) -> tuple[str, ...]:
        """Return a row of the drill's table: fault, detected after, resumed after, recomputed, losses, note."""
        if self.skipped:
            return self.fault, "skipped", "", "", "", self.skipped
        detected, resumed = ("NEVER" if time is None else f"{time:.2f} s" for time in (self.detected, self.resumed))
        recomputed = count_text(self.recomputed, "step") if self.recomputed else ""
        return self.fault, detected, "kept running" if self.keeps_running else resumed, recomputed, self.losses, self.note

    def text(self) -> str:
        """Return the same as a line for the terminal."""
        fault, detected, resumed, recomputed, _, note = self.cells()
        if self.skipped:
            return f"{fault}: skipped: {note}"
        parts = (
            f"detected after {detected}",
            resumed if self.keeps_running else f"resumed after {resumed}",
            recomputed and f"{recomputed} recomputed",
            note,
        )
        return f"{fault}: {', '.join(filter(None, parts))}"


class RunMonitor:
    """Collects a run's events and metrics. `lines` are in the order of writing: a step that was recomputed has two."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.events: list[Event] = []
        self.lines: list[Line] = []
        self._metrics = Tail(run.metrics_file)

    def add(self, event: Event) -> None:
        if event.kind != POLL:
            self.events.append(event)
        self.lines += self._metrics.lines(parse_line)

    @property
    def step(self) -> int:
        """The step of the newest line."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def furthest_step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def attempt(self) -> int:
        """The number of the newest attempt."""
        return self._newest("attempt-started").attempt

    @property
    def ranks(self) -> list[dict[str, Any]]:
        """The newest attempt's ranks, with their process ids and nodes."""
        return self._newest("attempt-started").details["ranks"]

    def node_id(self, number: int) -> str:
        return self._newest("nodes-gathered").details["nodes"][number]["id"]

    @property
    def newest_checkpoint(self) -> str:
        """Its name; "" if there is none."""
        return next(iter(self.run.open_checkpoints().names()), "")

    def event_after(self, when: float, *kinds: str) -> Event | None:
        """Return the first event of these kinds after a time."""
        return next((event for event in self.events if event.kind in kinds and event.time > when), None)

    def _newest(self, kind: str) -> Event:
        return next(event for event in reversed(self.events) if event.kind == kind)


def wait_for(find: Callable[[], T | None], timeout: float = TIMEOUT) -> Script[T]:
    """Wait until `find` returns something. Raises TimeoutError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (found := find()):
        if time.monotonic() > deadline:
            raise TimeoutError
        yield
    return found


class FaultScript:
    """Injects all faults into the last rank, whose node is not the head's. The loss of its node comes last: the run may then have fewer."""

    def __init__(self, config: RunConfig, ray: Ray, monitor: RunMonitor) -> None:
        self._config, self._ray, self._monitor = config, ray, monitor
        self.results: list[FaultResult] = []

    def run(self) -> Script[None]:
        """Inject one fault after the other. Raises TimeoutError if the run makes no progress."""
        yield from wait_for(lambda: self._monitor.lines)
        faults = self._faults()
        for number, (name, obstacle, inject) in enumerate(faults, start=1):
            result = FaultResult(fault=name, skipped=obstacle)
            self.results.append(result)
            if not obstacle:
                notify(f"fault {number} of {len(faults)}: {name}")
                yield from self._settle()
                result.first_line = len(self._monitor.lines)
                yield from inject(result)
            notify(result.text())
        yield from self._settle()

    def _faults(self) -> list[tuple[str, str, Callable[[FaultResult], Script[None]]]]:
        """Return name, why the fault cannot be injected here ("" if it can), and script of each fault."""
        checkpoints = self._config.checkpoint
        remote = "" if open_store(checkpoints.directory or "").is_local else f"checkpoints are in {checkpoints.directory}"
        unverified = "checkpoint.verify is sizes" if checkpoints.verify == "sizes" else ""
        return [
            ("rank killed", "", lambda result: self._restart_after(result, "kill")),
            ("disk full", remote, self._disk_full),
            ("rank hung", "", self._rank_hung),
            ("rank slowed", "the run has one rank" if len(self._monitor.ranks) == 1 else "", self._rank_slowed),
            ("bit flipped in a checkpoint", remote or unverified, self._bit_flipped),
            ("agent killed", "", lambda result: self._restart_after(result, "agent")),
            ("node lost", "the run shares its Ray" if isinstance(self._ray, JoinedRay) else "", self._node_lost),
        ]

    def _restart_after(self, result: FaultResult, fault: Fault) -> Script[None]:
        """Inject a fault after which the run starts another attempt."""
        attempt = self._monitor.attempt
        _, when = self._inject(fault)
        detected = yield from wait_for(lambda: self._monitor.event_after(when, "rank-failed", "node-lost"))
        result.detected = detected.time - when
        yield from self._resume(result, attempt, when)

    def _resume(self, result: FaultResult, attempt: int, when: float) -> Script[None]:
        """Wait for the first step of a later attempt."""
        lines = self._monitor.lines
        line = yield from wait_for(lambda: next((line for line in lines if line["attempt"] > attempt), None))
        result.resumed = line["time"] - when
        before = [each["step"] for each in lines if each["attempt"] == attempt]
        result.recomputed = before[-1] - (line["step"] - 1) if before else 0

    def _rank_hung(self, result: FaultResult) -> Script[None]:
        """Stop a rank once this attempt has learned how long its steps take."""
        attempt = self._monitor.attempt
        steps = MIN_INTERVALS + STEPS_BETWEEN
        yield from wait_for(lambda: sum(line["attempt"] == attempt for line in self._monitor.lines) > steps)
        result.first_line = len(self._monitor.lines)
        yield from self._restart_after(result, "stop")

    def _rank_slowed(self, result: FaultResult) -> Script[None]:
        """Leave a rank a quarter of its time until it is reported, or should have been."""
        first, (injector, when) = self._monitor.step, self._inject("slow")
        last, end = first + 4 * CHECKS, when + 3 * LASTING
        yield from wait_for(lambda: self._monitor.event_after(when, "rank-slow") or (self._monitor.step > last and time.time() > end))
        result.keeps_running = True
        if detected := self._monitor.event_after(when, "rank-slow"):
            result.detected = detected.time - when
            result.note = f"{detected.details['ratio']:.1f} times slower, reported with its node"
        else:
            result.note = f"not reported within {time.time() - when:.0f} s: other programs may slow down all ranks"
        self._clear(injector)

    def _disk_full(self, result: FaultResult) -> Script[None]:
        """Leave no room for checkpoints until a save has failed."""
        injector, when = self._inject("full")
        lines = self._monitor.lines
        failed = yield from wait_for(lambda: next((one for one in lines if one["time"] > when and one.get("checkpoint/failures")), None))
        result.detected = failed["time"] - when
        self._clear(injector)
        before = self._monitor.newest_checkpoint
        yield from wait_for(lambda: self._monitor.newest_checkpoint != before)
        result.resumed = time.time() - when
        result.note = "kept training, saved once there was space"

    def _bit_flipped(self, result: FaultResult) -> Script[None]:
        """Flip a bit in the newest checkpoint, and kill a rank, so that the run loads it."""
        checkpoints, attempt = self._monitor.run.open_checkpoints(), self._monitor.attempt
        bad = set(checkpoints.bad())
        _, when = self._inject("kill")
        time.sleep(COMMIT_TIME)
        corrupt = self._monitor.newest_checkpoint
        flip_bit(Path(checkpoints.location(corrupt)))
        yield from self._resume(result, attempt, when)
        if set(checkpoints.bad()) - bad:
            result.detected = result.resumed
            result.note = f"{corrupt} was rejected, the one before it loaded"

    def _node_lost(self, result: FaultResult) -> Script[None]:
        """Kill a raylet: every process of its node ends with it."""
        ranks = len(self._monitor.ranks)
        yield from self._restart_after(result, "node")
        if (remaining := len(self._monitor.ranks)) == ranks:
            return
        result.note = f"resumed on {remaining} of {ranks} ranks"
        try:
            yield from wait_for(lambda: len(self._monitor.ranks) == ranks, NODE_RETURN_TIMEOUT)
        except TimeoutError:
            result.note += f", the node did not return within {NODE_RETURN_TIMEOUT:.0f} s"
        else:
            result.note += ", then on all"

    def _settle(self) -> Script[None]:
        """Wait for some steps, and for a checkpoint to resume from."""
        start = self._monitor.step
        yield from wait_for(lambda: self._monitor.step >= start + STEPS_BETWEEN and self._monitor.newest_checkpoint)

    def _inject(self, fault: Fault) -> tuple[Any, float]:
        """Inject a fault into the last rank; return the actor that did it, and when.

        Waits for the actor to start before that, so that the fault follows at once.
        """
        import ray

        from manta.cluster.nodes.node_group import on_machine

        rank = self._monitor.ranks[-1]
        injector = on_machine(FaultInjector, self._monitor.node_id(rank["node"])).remote()
        ray.get(injector.ready.remote(), timeout=ACTOR_TIMEOUT)
        when = time.time()
        done = injector.inject.remote(fault, rank["pid"], str(self._monitor.run.open_checkpoints()))
        if fault not in {"slow", "node"}:  # the one lasts, the other ends the actor
            ray.get(done, timeout=ACTOR_TIMEOUT)
        return injector, when

    def _clear(self, injector: Any) -> None:
        import ray

        ray.get(injector.clear.remote(self._monitor.ranks[-1]["pid"]), timeout=ACTOR_TIMEOUT)
        ray.kill(injector)


def flip_bit(checkpoint: Path) -> None:
    """Flip a bit in the middle of the largest file."""
    file = max(checkpoint.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))
