"""The run from outside: attempt after attempt, until it is done, told to leave, or beyond help.

How it stands follows from its events alone (run_state.py), and every event is in the journal before anything comes of it.
"""

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manta.cluster.config import ClusterConfig
from manta.cluster.job import Job
from manta.cluster.nodes.capacity import Room
from manta.cluster.nodes.placement import PlacementError
from manta.cluster.protocol import ExitCode
from manta.cluster.ray.runtime import Ray
from manta.cluster.supervise.attempt import Attempt, Done, Left, Outcome, Regrouped
from manta.cluster.supervise.event_log import POLL, Event, Journal, read_events
from manta.cluster.supervise.failure import Cause, Failure, GiveUp, Policy, decide
from manta.cluster.supervise.log_retention import forget
from manta.cluster.supervise.requests import Orders
from manta.cluster.supervise.run_state import advance, replay

if TYPE_CHECKING:
    from manta.cluster.nodes.node_group import Nodes

USERS_CHOICE = ("OMP_NUM_THREADS",)  # Ray sets it for its workers, so what the user said must be handed over
LOOK = 0.25  # seconds between two looks for nodes


class Controller:
    """Supervises a job from this process's main thread. `run` yields what happens; the last event, run-ended, has the exit code."""

    def __init__(self, job: Job, config: ClusterConfig, ray: Ray) -> None:
        said = {name: os.environ[name] for name in USERS_CHOICE if name in os.environ}
        self._job = replace(job, directory=job.directory.absolute(), environment={**said, **job.environment})
        self._config, self._ray = config, ray
        self._policy = Policy(max_restarts_without_progress=config.max_restarts_without_progress)
        self._orders = Orders(self._job.directory / "stop-now", seconds=config.stop_after_seconds)

    def run(self) -> Generator[Event, None, None]:
        """Close it early and everything is ended at once."""
        file = self._job.directory / "events.jsonl"
        self._state = replay(read_events(file))
        self._job.seal.write_text(secrets.token_hex(16))
        with Journal(file) as journal, self._orders, contextlib.closing(self._events()) as events:
            for event in events:
                self._state = advance(self._state, event)
                if event.kind != POLL:
                    journal.write(event)
                yield event

    def _events(self) -> Generator[Event, None, None]:
        yield self._event("run-started", program=list(self._job.program), took_over=self._state.phase != "ended")
        code = None
        try:
            while code is None:
                with self._ray.connected() as scratch:
                    code = yield from self._supervise(scratch)
        except SystemExit:  # a SIGTERM met Ray's own handler, which stands while it starts
            self._orders.note(signal.SIGTERM)
            code = self._left(saved=False)
        yield self._event("run-ended", exit_code=code)

    def _supervise(self, scratch: Path | None) -> Generator[Event, None, int | None]:
        """The exit code, or None when it is Ray itself that is gone and must be started anew."""
        from manta.cluster.nodes.node_group import Nodes  # Ray is up

        room = Room(self._job, self._config)
        with contextlib.closing(Nodes(self._job, scratch=scratch, timeout=self._config.node_timeout)) as nodes:
            while self._orders.leave is None:
                if (code := (yield from self._gather(nodes, room))) is not None:
                    return code
                if self._orders.leave:
                    break
                outcome = yield from self._try(nodes, room)
                if isinstance(outcome, Done):
                    return ExitCode.DONE
                if isinstance(outcome, Left):
                    return self._left(saved=outcome.saved)
                if isinstance(outcome, Regrouped):
                    yield self._event("decided", decision="regroup")
                elif self._orders.leave:
                    break
                else:
                    decision = decide(self._state.history, self._policy)
                    if isinstance(decision, GiveUp):
                        yield self._event("decided", decision="give up", reason=decision.reason)
                        return decision.exit_code
                    leave_out = room.leave_out(self._state.history)
                    yield self._event("decided", decision="restart", after=decision.after, leave_out=sorted(leave_out))
                    nodes.warm()
                    self._pause(decision.after)
                if self._is_gone(room, outcome):
                    return None
        return ExitCode.INTERRUPTED if self._orders.leave is signal.SIGINT else ExitCode.UNSAVED

    def _is_gone(self, room: Room, outcome: Failure | Regrouped) -> bool:
        """Whether it is Ray that has to be started anew: its head is gone, or its only node."""
        if room.is_headless:
            return True
        is_lost = isinstance(outcome, Failure) and outcome.cause is Cause.NODE_LOST
        return is_lost and self._ray.on_one_node and not room.left(self._state.suspects)

    def _gather(self, nodes: "Nodes", room: Room) -> Generator[Event, None, int | None]:
        """Waits for nodes to run on, and takes them; or gives the exit code with which the run ends."""
        begun, told = time.monotonic(), ""
        while self._orders.leave is None:
            try:
                placement = room.enough(time.monotonic() - begun, suspects=self._state.suspects, has_begun=self._state.has_begun)
            except PlacementError as error:
                yield self._event("decided", decision="give up", reason=str(error))
                return ExitCode.USAGE
            if room.must_leave:
                yield self._event("decided", decision="leave", reason="the node that manta runs on is to be taken away")
                return ExitCode.SAVED
            if placement is not None:
                machines = [{"id": p.machine.id, "host": p.machine.host, "address": p.machine.address} for p in placement.places]
                yield self._event("nodes-gathered", ranks=placement.ranks, nodes=machines)
                nodes.take(placement)
                return None
            if time.monotonic() - begun > self._config.start_timeout:
                yield self._event("decided", decision="give up", reason=f"{room.missing()} within {self._config.start_timeout:g} s")
                return ExitCode.SAVED if room.going else ExitCode.FAILED
            if room.missing() != told:
                told = room.missing()
                yield self._event("waiting", message=told)
            time.sleep(LOOK)
        return None

    def _try(self, nodes: "Nodes", room: Room) -> Generator[Event, None, Outcome]:
        from manta.cluster.nodes.node_group import NodeLostError
        from manta.cluster.ray.view import answers

        forget(self._job.directory / "logs", attempt=self._state.attempt + 1, keep=self._config.keep_logs)
        attempt = Attempt(number=self._state.attempt + 1, nodes=nodes, job=self._job, config=self._config, orders=self._orders, room=room)
        try:
            outcome = yield from attempt.run()
        except NodeLostError as lost:
            machine = nodes.drop(lost.node).machine
            suspect = lost.is_silent or not answers(machine)
            where = {"host": machine.host, "address": machine.address, "machine": machine.id}
            yield self._event(
                "node-lost",
                attempt.number,
                node=lost.node,
                message=f"{machine}: {lost.reason}",
                **where,
                suspect=suspect,
                trusted_again=None if machine.id in self._state.suspects else time.time() + self._config.quarantine,
                announced=machine.id in room.going,
            )
            outcome = self._state.history[-1]
        yield self._event("attempt-stopped", attempt.number, outcome=type(outcome).__name__.lower())
        return outcome

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._orders.leave is None and (left := until - time.monotonic()) > 0:
            time.sleep(min(0.1, left))

    def _left(self, *, saved: bool) -> int:
        if self._orders.at_once or (saved and self._orders.leave is signal.SIGINT):
            return ExitCode.INTERRUPTED
        return ExitCode.SAVED if saved else ExitCode.UNSAVED

    def _event(self, kind: str, attempt: int | None = None, **details: Any) -> Event:
        return Event(kind=kind, attempt=self._state.attempt if attempt is None else attempt, time=time.time(), details=details)
