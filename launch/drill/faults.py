"""The faults of a drill: each is done to a run that runs, noticed, and come through."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manta.cluster.ray.runtime import JoinedRay, Ray
from manta.cluster.supervise.fault_injection import Fault, Hand
from manta.cluster.supervise.stragglers import KNOWN
from manta.data.storage.store import open_store
from manta.launch.config import RunConfig
from manta.launch.drill.watch import Wait, Watch, wait
from manta.trainer.metrics import Line

PATIENCE = 600.0  # seconds until a fault counts as not noticed, or as not come through
BACK = 60.0  # seconds that a lost node is waited for
ANSWER = 30.0  # seconds that Ray has to place a hand
CALM = 3  # steps between two faults
COMMIT = 0.2  # seconds in which a save that all ranks have written is there


@dataclass(slots=True, kw_only=True)
class Row:
    """What came of a fault. Seconds after it, None where it did not come to that; `again`: steps that were done twice.

    `begun`: how many lines the run had written by then. `left_out`: why it was not done. `stays_up`: whether the run never stopped.
    """

    fault: str
    left_out: str = ""
    begun: int = 0
    noticed: float | None = None
    recovered: float | None = None
    stays_up: bool = False
    again: int = 0
    note: str = ""

    @property
    def is_come_through(self) -> bool:
        return self.noticed is not None and (self.stays_up or self.recovered is not None)


class Faults:
    """Done to the last rank: the last node is not that of Ray's head. The node's loss comes last: from there on ranks may be fewer."""

    def __init__(self, config: RunConfig, ray: Ray, watch: Watch, tell: Callable[[Row], None]) -> None:
        self._config, self._ray, self._watch, self._tell = config, ray, watch, tell
        self.rows: list[Row] = []

    def script(self) -> Wait[None]:
        """All, one after the other. Raises TimeoutError where the run stands still."""
        yield from wait(lambda: self._watch.lines or None, PATIENCE)
        for name, hindrance, fault in self._all():
            row = Row(fault=name, left_out=hindrance)
            self.rows.append(row)
            if not hindrance:
                yield from self._calm()
                row.begun = len(self._watch.lines)
                yield from fault(row)
            self._tell(row)
        yield from self._calm()

    def _all(self) -> list[tuple[str, str, Callable[[Row], Wait[None]]]]:
        """Each with why it can not be done here, where it can not."""
        checkpoints = self._config.checkpoint
        in_bucket = f"checkpoints lie in {checkpoints.directory}" if not open_store(checkpoints.directory or "").is_local else ""
        unread = "checkpoint.verify is sizes" if checkpoints.verify == "sizes" else ""
        alone = "there is but one rank" if len(self._ranks) == 1 else ""
        shared = "Ray is not the run's own" if isinstance(self._ray, JoinedRay) else ""
        return [
            ("rank killed", "", lambda row: self._restarts(row, "kill")),
            ("disk full", in_bucket, self._disk_full),
            ("rank hung", "", self._hung),
            ("rank slowed", alone, self._slowed),
            ("bit flipped in a checkpoint", in_bucket or unread, self._bit_flipped),
            ("agent killed", "", lambda row: self._restarts(row, "agent")),
            ("node lost", shared, self._node_lost),
        ]

    def _restarts(self, row: Row, fault: Fault) -> Wait[None]:
        """What the run is started anew after."""
        yield from self._comes_back(row, self._hand(), fault)

    def _comes_back(self, row: Row, hand: Any, fault: Fault) -> Wait[None]:
        attempt = self._watch.attempt.attempt
        when = self._harm(hand, fault)
        noticed = yield from wait(lambda: self._watch.since(when, "rank-failed", "node-lost"), PATIENCE)
        row.noticed = noticed.time - when
        line = yield from wait(lambda: self._watch.beyond(attempt), PATIENCE)
        row.recovered = line["time"] - when
        row.again = self._again(attempt, line)

    def _hung(self, row: Row) -> Wait[None]:
        """Once it is known how long this attempt's steps are silent: they are the measure."""
        attempt = self._watch.attempt.attempt
        yield from wait(lambda: sum(line["attempt"] == attempt for line in self._watch.lines) > KNOWN + CALM or None, PATIENCE)
        row.begun = len(self._watch.lines)
        yield from self._restarts(row, "stop")

    def _again(self, attempt: int, line: Line) -> int:
        """How many steps an attempt had done beyond where the next went on, with this line."""
        done = [each["step"] for each in self._watch.lines if each["attempt"] == attempt]
        return done[-1] - (line["step"] - 1) if done else 0

    def _slowed(self, row: Row) -> Wait[None]:
        """A fourth of its time is left to a rank, until it is told of."""
        hand = self._hand()
        when = self._harm(hand, "slow")
        noticed = yield from wait(lambda: self._watch.since(when, "rank-slow"), PATIENCE)
        row.noticed, row.stays_up = noticed.time - when, True
        row.note = f"{noticed.details['times']:.1f} times slower, and named with its node"
        self._heal(hand)

    def _disk_full(self, row: Row) -> Wait[None]:
        """No file of a rank may grow, until a save has failed."""
        hand = self._hand()
        when = self._harm(hand, "full")
        noticed = yield from wait(lambda: self._line(when, "checkpoint/failures"), PATIENCE)
        row.noticed = noticed["time"] - when
        self._heal(hand)
        before = self._newest()
        yield from wait(lambda: self._newest() != before or None, PATIENCE)
        row.recovered = time.time() - when
        row.note = "trained on, and saved once there was room"

    def _bit_flipped(self, row: Row) -> Wait[None]:
        """In the newest checkpoint, and a rank killed, so that it is wanted."""
        hand, bad = self._hand(), set(self._watch.home.checkpoints.bad())
        attempt = self._watch.attempt.attempt
        when = self._harm(hand, "kill")
        time.sleep(COMMIT)
        spoilt = self._newest()
        flip_a_bit(Path(self._watch.home.checkpoints.location(spoilt)))
        line = yield from wait(lambda: self._watch.beyond(attempt), PATIENCE)
        if set(self._watch.home.checkpoints.bad()) - bad:
            row.noticed = row.recovered = line["time"] - when
            row.again = self._again(attempt, line)
            row.note = f"{spoilt} was refused, the one before it taken"

    def _node_lost(self, row: Row) -> Wait[None]:
        """Its raylet is killed, and all that ran there dies with it."""
        ranks = len(self._ranks)
        yield from self._comes_back(row, self._hand(), "node")
        if (left := len(self._ranks)) == ranks:
            return
        row.note = f"went on on {left} of {ranks} ranks"
        try:
            yield from wait(lambda: len(self._ranks) == ranks or None, BACK)
        except TimeoutError:
            row.note += f", the node had not come back within {BACK:.0f} s"
        else:
            row.note += ", then on all again"

    def _calm(self) -> Wait[None]:
        """Some steps, and a checkpoint to go back to."""
        begun = self._watch.step
        yield from wait(lambda: (self._watch.step >= begun + CALM and self._newest()) or None, PATIENCE)

    def _hand(self) -> Any:
        """On the node of the last rank. Waits until it can be told what to do: it is then done at once."""
        import ray

        from manta.cluster.nodes.node_group import alone

        hand = alone(Hand, self._watch.nodes[self._ranks[-1]["node"]]["id"])
        ray.get(hand.ready.remote(), timeout=ANSWER)
        return hand

    def _harm(self, hand: Any, fault: Fault) -> float:
        """Gives when."""
        import ray

        when = time.time()
        done = hand.harm.remote(fault, self._ranks[-1]["pid"])
        if fault not in {"slow", "node"}:  # the one goes on, the other ends who would answer
            ray.get(done, timeout=ANSWER)
        return when

    def _heal(self, hand: Any) -> None:
        import ray

        ray.get(hand.heal.remote(self._ranks[-1]["pid"]), timeout=ANSWER)
        ray.kill(hand)

    @property
    def _ranks(self) -> list[dict[str, Any]]:
        return self._watch.attempt.details["ranks"]

    def _newest(self) -> str:
        """The name of the newest checkpoint."""
        return next(iter(self._watch.home.checkpoints.names()), "")

    def _line(self, when: float, key: str) -> Line | None:
        return next((line for line in self._watch.lines if line["time"] > when and line.get(key)), None)


def flip_a_bit(checkpoint: Path) -> None:
    """In the midst of the largest file."""
    file = max(checkpoint.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))
