"""The run from outside: attempt after attempt, until it is done, told to leave, or beyond help."""

import contextlib
import os
import signal
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manta.cluster.attempt import Attempt, Done, Left, Outcome
from manta.cluster.config import ClusterConfig
from manta.cluster.failure import Cause, Failure, GiveUp, Policy, decide
from manta.cluster.job import Job
from manta.cluster.journal import POLL, Event, Journal
from manta.cluster.logs import forget
from manta.cluster.orders import Orders
from manta.cluster.runtime import ADDRESS, local_ray

if TYPE_CHECKING:
    from manta.cluster.nodes import Nodes

LEFT_SAVED, LEFT_UNSAVED, INTERRUPTED = 75, 143, 130
USERS_CHOICE = ("OMP_NUM_THREADS",)  # Ray sets it for its workers, so what the user said must be handed over


class Controller:
    """Supervises a job from this process's main thread. `run` yields what happens; the last event, run-ended, has the exit code."""

    def __init__(self, job: Job, config: ClusterConfig) -> None:
        said = {name: os.environ[name] for name in USERS_CHOICE if name in os.environ}
        self._job = replace(job, directory=job.directory.absolute(), environment={**said, **job.environment})
        self._config = config
        self._orders = Orders(self._job.directory / "stop-now")
        self._history: list[Failure] = []
        self._attempt = 0
        self._step = 0

    def run(self) -> Iterator[Event]:
        """Close it early and everything is ended at once."""
        journal = Journal(self._job.directory / "events.jsonl")
        with journal, self._orders, contextlib.closing(self._events()) as events:
            self._attempt = journal.last_attempt
            for event in events:
                if event.kind == POLL:
                    self._step = max((rank["step"] for rank in event.details["ranks"]), default=0)
                else:
                    journal.write(event)
                yield event

    def _events(self) -> Generator[Event, None, None]:
        yield self._event("run-started", ranks=self._job.ranks, command=list(self._job.command))
        code = None
        try:
            while code is None:
                with local_ray(nodes=self._job.nodes) as scratch:
                    code = yield from self._supervise(scratch)
        except SystemExit:  # a SIGTERM met Ray's own handler, which stands while it starts
            self._orders.note(signal.SIGTERM)
            code = self._left(saved=False)
        yield self._event("run-ended", exit_code=code)

    def _supervise(self, scratch: Path) -> Generator[Event, None, int | None]:
        """The exit code, or None when it is Ray itself that is gone and must be started anew."""
        from manta.cluster.nodes import Nodes  # Ray is up

        policy = Policy(restarts_without_progress=self._config.restarts_without_progress)
        with contextlib.closing(Nodes(self._job, address=ADDRESS, scratch=scratch)) as nodes:
            while self._orders.leave is None:
                outcome = yield from self._try(nodes)
                if isinstance(outcome, Done):
                    return 0
                if isinstance(outcome, Left):
                    return self._left(saved=outcome.saved)
                if self._orders.leave:
                    break
                self._history.append(outcome)
                decision = decide(self._history, policy)
                if isinstance(decision, GiveUp):
                    yield self._event("decided", decision="give up", reason=decision.reason)
                    return decision.exit_code
                yield self._event("decided", decision="restart", after=decision.after)
                nodes.warm()
                self._pause(decision.after)
                if outcome.cause is Cause.NODE_LOST and not nodes.have_machines:
                    return None
            return INTERRUPTED if self._orders.leave is signal.SIGINT else LEFT_UNSAVED

    def _try(self, nodes: "Nodes") -> Generator[Event, None, Outcome]:
        from manta.cluster.nodes import NodeLostError

        self._attempt += 1
        forget(self._job.directory / "logs", attempt=self._attempt, keep=self._config.keep_logs)
        attempt = Attempt(number=self._attempt, nodes=nodes, job=self._job, config=self._config, orders=self._orders)
        try:
            outcome = yield from attempt.run()
        except NodeLostError as lost:
            nodes.replace(lost.node)
            yield self._event("node-lost", node=lost.node, message=lost.reason)
            outcome = Failure(cause=Cause.NODE_LOST, rank=None, step=self._step, message=str(lost))
        yield self._event("attempt-stopped", outcome=type(outcome).__name__.lower())
        return outcome

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._orders.leave is None and (left := until - time.monotonic()) > 0:
            time.sleep(min(0.1, left))

    def _left(self, *, saved: bool) -> int:
        if self._orders.at_once or (saved and self._orders.leave is signal.SIGINT):
            return INTERRUPTED
        return LEFT_SAVED if saved else LEFT_UNSAVED

    def _event(self, kind: str, **details: Any) -> Event:
        return Event(kind=kind, attempt=self._attempt, time=time.time(), details=details)
