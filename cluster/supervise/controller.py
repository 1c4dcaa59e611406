"""The controller of a run: it runs attempt after attempt, until the run is done, is asked to stop, or cannot succeed.

The state follows from the events alone (run_state.py); every event is in the event log before the controller acts on it.
"""

import contextlib
import os
import secrets
import shutil
import signal
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manta.cluster.config import ClusterConfig
from manta.cluster.environment import taken_along
from manta.cluster.job import Job
from manta.cluster.nodes.placement import PlacementError
from manta.cluster.protocol import ExitCode
from manta.cluster.ray.connection import Connection
from manta.cluster.ray.errors import RayStartError
from manta.cluster.ray.runtime import Ray
from manta.cluster.supervise.attempt import OUTCOME_NAMES, Attempt, Completed, Outcome, Reallocated, Stopped, location
from manta.cluster.supervise.companion import Companion
from manta.cluster.supervise.event_log import POLL, Event, EventLog, event_of, line_of, parse_event, read_events
from manta.cluster.supervise.failure import Cause, Failure, GiveUp, decide, failing_machines
from manta.cluster.supervise.rank_list import RankList
from manta.cluster.supervise.requests import StopRequests
from manta.cluster.supervise.run_state import TRANSITIONS, advance, replay
from manta.cluster.supervise.witness import witness
from manta.cluster.tail import Tail

if TYPE_CHECKING:
    from manta.cluster.nodes.capacity import Capacity
    from manta.cluster.nodes.node_group import NodeGroup, NodeLostError

POLL_INTERVAL = 0.25  # seconds between two checks for nodes
RAY_RESTARTS = 2  # in a row, after Ray did not start
MIN_QUARANTINE = 60.0  # seconds that a lost node is excluded although Ray, which checks it every second, lists it as alive


class Controller:
    """Supervises a job from this process's main thread. `run` yields events; the last one, run-ended, has the exit code."""

    def __init__(self, job: Job, config: ClusterConfig, ray: Ray) -> None:
        self._job = replace(
            job, directory=job.directory.absolute(), environment={**taken_along(os.environ), **config.environment, **job.environment}
        )
        self._config, self._ray = config, ray
        self._disk_error: OSError | None = None  # as it was reported
        self._requests = StopRequests(self._job.directory / "stop-now", seconds=config.stop_after_seconds)

    def run(self) -> Generator[Event, None, None]:
        """Run the job. A caller that closes the generator early ends everything at once."""
        file = self._job.directory / "events.jsonl"
        past = read_events(file)
        self._state = replay(past)
        self._copied = max((line["number"] for line in past if isinstance(line.get("number"), int)), default=0)
        self._rank_events, self._rank_event = Tail(self._job.rank_events) if self._job.rank_events else None, 0
        token = secrets.token_hex(16).encode()
        self._job.directory_token.write_bytes(token)
        self._files = {**self._job.files, self._job.directory_token: token}
        companion = Companion(self._job.companion, self._job.directory)
        with (
            contextlib.closing(RankList(self._job.directory)) as rank_list,
            contextlib.closing(EventLog(file)) as log,
            self._requests,
            contextlib.closing(companion),
            contextlib.closing(self._events()) as events,
        ):
            for event in events:
                yield from self._copy_rank_events(log, event.time)
                self._state = advance(self._state, event)
                if event.kind == POLL:
                    rank_list.write(event.details["ranks"])
                    yield event
                    yield from self._check_disk(log, event)
                    yield from self._check_companion(log, companion)
                    continue
                log.write(event)
                if event.kind == "run-ended":
                    self._restore_files()
                if event.kind == "run-ended" and (message := log.file.problem()):
                    code = event.details["exit_code"] or ExitCode.FAILED
                    event = replace(event, details={"exit_code": code, "message": message})  # noqa: PLW2901  what it stands for
                yield event
            companion.finish(lambda: self._requests.at_once)

    def _check_disk(self, log: EventLog, poll: Event) -> Generator[Event, None, None]:
        """Report once that the event log, or a file of a rank's, has no room, and once that everything is written."""
        log.file.flush()
        ranks = [rank for rank in poll.details["ranks"] if rank["unwritten"]]
        error = log.file.error or (OSError(code := ranks[0]["disk_error"], os.strerror(code)) if ranks else None)
        is_known = bool(poll.details["ranks"]) and all(rank["has_stepped"] for rank in poll.details["ranks"])
        if (error is None) == (self._disk_error is None) or (error is None and not is_known):
            return
        self._disk_error = error
        unwritten = log.file.unwritten + sum(rank["unwritten"] for rank in ranks)
        event = self._event("disk-full", message=error.strerror, unwritten=unwritten) if error else self._event("disk-free")
        log.write(event)
        yield event

    def _copy_rank_events(self, log: EventLog, now: float) -> Generator[Event, None, None]:
        """Copy what the ranks report to the event log. `number` counts these events: none is copied twice."""
        for line in self._rank_events.lines(parse_event) if self._rank_events else ():
            self._rank_event += 1
            if self._rank_event > self._copied and line["event"] not in TRANSITIONS:  # which are the controller's own
                event = replace(event_of(line), time=now, details=event_of(line).details | {"number": self._rank_event})
                log.write(event)
                yield event

    def _check_companion(self, log: EventLog, companion: Companion) -> Generator[Event, None, None]:
        if message := companion.check():
            event = self._event("tracker-ended", message=message, starts=companion.starts)
            log.write(event)
            yield event

    def _events(self) -> Generator[Event, None, None]:
        yield self._event("run-started", program=list(self._job.program), took_over=self._state.phase != "ended")
        code, failed_starts = None, 0
        while code is None:
            try:
                with Connection(self._ray) as connection:
                    with witness(self._job.directory / "events.jsonl", line_of(self._event("run-ended", exit_code=ExitCode.FAILED))):
                        while not connection.is_ready(POLL_INTERVAL) and not self._requests.stop_signal:
                            yield self._waiting("Ray")
                    self._requests.install()
                    code = self._unsaved_code if self._requests.stop_signal else (yield from self._supervise(connection.scratch))
                failed_starts = 0
            except RayStartError as error:
                failed_starts += 1  # in a row
                if failed_starts > RAY_RESTARTS or not error.is_transient:
                    yield self._event("decided", decision="give up", reason=str(error))
                    code = ExitCode.FAILED
                else:
                    yield self._event("waiting", message=f"{error} It is started again.")
        yield self._event("run-ended", exit_code=code)

    def _supervise(self, scratch: Path | None) -> Generator[Event, None, int | None]:
        """Run attempts under one Ray cluster. Returns the exit code; None if Ray is lost and must be started again."""
        from manta.cluster.nodes.capacity import Capacity  # they import Ray, which has started by now
        from manta.cluster.nodes.node_group import NodeGroup

        capacity = Capacity(self._job, self._config)
        with contextlib.closing(NodeGroup(self._job, scratch=scratch, timeout=self._config.node_timeout)) as nodes:
            while not self._requests.stop_signal:
                if (code := (yield from self._gather_nodes(nodes, capacity))) is not None:
                    return code
                if self._requests.stop_signal:
                    break
                outcome = yield from self._run_attempt(nodes, capacity)
                if isinstance(outcome, Completed):
                    return ExitCode.DONE
                if isinstance(outcome, Stopped):
                    return self._stop_code(saved=outcome.saved)
                if isinstance(outcome, Failure):
                    if self._requests.stop_signal:
                        break
                    if (code := (yield from self._handle_failure(nodes, capacity))) is not None:
                        return code
                else:
                    yield self._event("decided", decision="reallocate")
                if self._is_ray_lost(capacity, outcome):
                    return None
        return self._unsaved_code

    def _gather_nodes(self, nodes: "NodeGroup", capacity: "Capacity") -> Generator[Event, None, int | None]:
        """Wait for nodes to run on, and allocate them. Returns an exit code if the run ends instead."""
        started, reported = time.monotonic(), ""
        while not self._requests.stop_signal:
            if capacity.is_head_lost:
                raise RayStartError("Ray's head ended before ranks were started.", is_transient=True)
            waited = time.monotonic() - started
            try:
                placement = capacity.find_placement(waited, suspects=self._state.suspects, has_started=self._state.has_started)
            except PlacementError as error:
                yield self._event("decided", decision="give up", reason=str(error))
                return ExitCode.USAGE
            if capacity.is_own_node_draining:
                yield self._event("decided", decision="leave", reason="the node of the controller is draining")
                return ExitCode.SAVED
            if placement is not None:
                machines = [{"id": n.machine.id, "host": n.machine.host, "address": n.machine.address} for n in placement.nodes]
                yield self._event("nodes-gathered", ranks=placement.ranks, nodes=machines)
                nodes.allocate(placement)
                return None
            shortage = capacity.shortage()
            if waited > self._config.start_timeout:
                yield self._event("decided", decision="give up", reason=f"{shortage} within {self._config.start_timeout:g} s")
                return ExitCode.SAVED if capacity.draining else ExitCode.FAILED
            if shortage != reported:
                reported = shortage
                yield self._event("waiting", message=shortage)
            yield self._waiting("nodes")
            time.sleep(POLL_INTERVAL)
        return None

    def _run_attempt(self, nodes: "NodeGroup", capacity: "Capacity") -> Generator[Event, None, Outcome]:
        from manta.cluster.nodes.node_group import NodeLostError

        number = self._state.attempt + 1
        self._restore_files()
        delete_expired_logs(self._job.directory / "logs", attempt=number, keep=self._config.keep_logs)
        attempt = Attempt(number=number, nodes=nodes, job=self._job, config=self._config, requests=self._requests, capacity=capacity)
        try:
            outcome = yield from attempt.run()
        except NodeLostError as lost:
            yield self._node_lost(lost, number, nodes, capacity)
            outcome = self._state.history[-1]
        yield self._event("attempt-stopped", number, outcome=OUTCOME_NAMES[type(outcome)])
        return outcome

    def _restore_files(self) -> None:
        """Write deleted files again, since each attempt reads it, and so do commands after the run."""
        for path, content in self._files.items():
            with contextlib.suppress(OSError):  # the ranks report what they miss
                if not path.exists():
                    path.write_bytes(content)

    def _node_lost(self, lost: "NodeLostError", number: int, nodes: "NodeGroup", capacity: "Capacity") -> Event:
        from manta.cluster.ray.view import is_reachable

        machine = nodes.drop(lost.node).machine
        return self._event(
            "node-lost",
            number,
            node=lost.node,
            message=f"{machine}: {lost.reason}",
            **location(machine),
            suspect=lost.is_silent or not is_reachable(machine),
            trusted_again=None if machine.id in self._state.suspects else time.time() + max(MIN_QUARANTINE, 10 * self._config.node_timeout),
            announced=machine.id in capacity.draining,
        )

    def _handle_failure(self, nodes: "NodeGroup", capacity: "Capacity") -> Generator[Event, None, int | None]:
        """Decide what follows a failure. Returns an exit code if the run gives up."""
        decision = decide(self._state.history, max_restarts_without_progress=self._config.max_restarts_without_progress)
        if isinstance(decision, GiveUp):
            yield self._event("decided", decision="give up", reason=decision.reason)
            return decision.exit_code
        excluded = capacity.excludable(failing_machines(self._state.history))
        yield self._event("decided", decision="restart", after=decision.after, exclude=sorted(excluded))
        nodes.fill_standby()
        deadline = time.monotonic() + decision.after
        while not self._requests.stop_signal and (remaining := deadline - time.monotonic()) > 0:
            time.sleep(min(0.1, remaining))
        return None

    def _is_ray_lost(self, capacity: "Capacity", outcome: Failure | Reallocated) -> bool:
        """Whether Ray must be started again: its head is gone, or its only node."""
        if capacity.is_head_lost:
            return True
        is_node_lost = isinstance(outcome, Failure) and outcome.cause is Cause.NODE_LOST
        return is_node_lost and self._ray.on_one_node and not capacity.usable_machines(self._state.suspects)

    @property
    def _unsaved_code(self) -> int:
        return ExitCode.INTERRUPTED if self._requests.stop_signal is signal.SIGINT else ExitCode.UNSAVED

    def _stop_code(self, *, saved: bool) -> int:
        if self._requests.at_once or (saved and self._requests.stop_signal is signal.SIGINT):
            return ExitCode.INTERRUPTED
        return ExitCode.SAVED if saved else ExitCode.UNSAVED

    def _waiting(self, what: str) -> Event:
        return self._event(POLL, ranks=[], waiting_for=what)

    def _event(self, kind: str, attempt: int | None = None, **details: Any) -> Event:
        return Event(kind=kind, attempt=self._state.attempt if attempt is None else attempt, time=time.time(), details=details)


def delete_expired_logs(logs: Path, *, attempt: int, keep: int) -> None:
    """Keep the logs of the `keep` newest attempts, of which `attempt` is the last. A log that cannot be deleted is skipped."""
    for log in logs.glob("attempt-*"):
        number = log.name.removeprefix("attempt-")
        if number.isdecimal() and int(number) <= attempt - keep:
            shutil.rmtree(log, ignore_errors=True)
