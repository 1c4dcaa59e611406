"""The cost of a controller at scale: the real one, with simulated agents and a simulated clock, in one process without Ray.

python benchmarks/scale.py [nodes [ranks_per_node]]

Every rank sends a heartbeat twice a second; after a while one is killed. Prints the processor time that the controller spends per second of
that clock, how long it takes to detect the failure, and how many calls a start takes. Of Ray only the pickling of answers is included.
"""

import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from manta.cluster.config import ClusterConfig
from manta.cluster.job import Job
from manta.cluster.nodes.report import NodeFacts, RankStatus
from manta.cluster.supervise import attempt, controller

RAY = ("ray", "ray.exceptions", "ray._private", "ray._private.state", "ray.util", "ray.util.scheduling_strategies")
STEPS, STEP, KILLED_AT = 120, 0.5, 40.0  # steps, seconds each, seconds after the first


class Clock:
    """Replaces the module `time` in the measured modules."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()
CALLS: Counter[str] = Counter()


@dataclass(eq=False)
class Ref:
    """An answer that is available at a time."""

    at: float
    make: Callable[[], Any]


@dataclass(eq=False)
class Agent:
    machine: int
    ranks: range = range(0)
    started: float = 0.0
    killed: int | None = None
    killed_at: float = float("inf")

    def answer(self, method: str, arguments: Sequence[Any]) -> Ref:
        now = CLOCK.now
        match method:
            case "describe":
                return Ref(
                    now,
                    lambda: NodeFacts(
                        host=f"n{self.machine}",
                        address=_address(self.machine),
                        versions={},
                        directory_token=arguments[1].read_text(),
                    ),
                )
            case "free_port":
                return Ref(now, lambda: 29500)
            case "start":
                environments = arguments[1]
                self.ranks = range(int(environments[0]["RANK"]), int(environments[-1]["RANK"]) + 1)
                self.started, self.killed, self.killed_at = now, None, float("inf")
                return Ref(now, lambda: list(self.ranks))
            case "poll":
                end = self.started + STEPS * STEP
                change = min(moment for moment in (self.killed_at, end, float("inf")) if moment > now or moment == float("inf"))
                return Ref(min(now + arguments[0], change), lambda: pickle.loads(pickle.dumps(self.statuses())))
            case "sentinel":
                return Ref(float("inf"), lambda: None)
            case _:
                return Ref(now, lambda: None)

    def statuses(self) -> list[RankStatus]:
        elapsed = CLOCK.now - self.started
        step = min(STEPS, int(elapsed / STEP))
        return [
            RankStatus(
                rank=rank,
                pid=rank,
                step=step,
                phase="step",
                silent_seconds=elapsed % STEP,
                has_stepped=step > 0,
                state="S",
                code=-9 if rank == self.killed and CLOCK.now >= self.killed_at else 0 if step == STEPS else None,
                exited_at=self.killed_at if rank == self.killed else 0.0,
                work=0.4 + 0.001 * (rank % 7),
                intervals=step,
                longest=STEP,
            )
            for rank in self.ranks
        ]


@dataclass(eq=False)
class Method:
    agent: Agent
    name: str

    def remote(self, *arguments: Any) -> Ref:
        CALLS[self.name] += 1
        return self.agent.answer(self.name, arguments)


@dataclass(eq=False)
class Handle:
    agent: Agent

    def __getattr__(self, name: str) -> Method:
        return Method(self.agent, name)


@dataclass
class FakeRay:
    """Replaces Ray."""

    count: int
    agents: dict[int, Agent] = field(default_factory=dict)

    on_one_node = False

    @contextmanager
    def connected(self) -> Generator[None]:
        yield

    def nodes(self) -> list[dict[str, Any]]:
        common = {"Alive": True, "NodeManagerPort": 1, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        return [common | {"NodeID": str(n), "NodeManagerHostname": f"n{n}", "NodeManagerAddress": _address(n)} for n in range(self.count)]

    def wait(self, refs: list[Ref], *, num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        if num_returns == 1:
            CLOCK.now = max(CLOCK.now, min(CLOCK.now + timeout, *(ref.at for ref in refs)))
        else:
            CLOCK.now += timeout
        return [ref for ref in refs if ref.at <= CLOCK.now], []

    def get(self, ref: Ref, timeout: float) -> Any:
        CLOCK.now = max(CLOCK.now, min(ref.at, CLOCK.now + timeout))
        return ref.make()

    def start(self, strategy: "Affinity") -> Handle:
        CALLS["start an agent"] += 1
        number = int(strategy.node)
        self.agents[number] = Agent(number)
        return Handle(self.agents[number])


@dataclass
class Affinity:
    node: str
    soft: bool


def install(fake: FakeRay) -> None:
    """Replace the modules of Ray."""

    class ActorClass:
        def options(self, *, scheduling_strategy: Affinity, **_: Any) -> "ActorClass":
            self.strategy = scheduling_strategy
            return self

        def remote(self, **_: Any) -> Handle:
            return fake.start(self.strategy)

    modules = {name: ModuleType(name) for name in RAY}
    ray: Any = modules["ray"]
    ray.nodes, ray.wait, ray.get, ray.kill = fake.nodes, fake.wait, fake.get, lambda _: None
    ray.remote = lambda _: ActorClass()
    ray.ObjectRef, ray.exceptions = list, modules["ray.exceptions"]
    for error in ("GetTimeoutError", "RayActorError", "RayTaskError", "ActorUnschedulableError"):
        setattr(modules["ray.exceptions"], error, type(error, (Exception,), {}))
    modules["ray.util.scheduling_strategies"].NodeAffinitySchedulingStrategy = Affinity  # type: ignore[attr-defined]
    modules["ray._private"].worker = SimpleNamespace(_global_node=None)  # type: ignore[attr-defined]
    modules["ray._private.state"].state = SimpleNamespace(get_draining_nodes=dict)  # type: ignore[attr-defined]
    sys.modules.update(modules)


def _address(number: int) -> str:
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


def main(count: int, each: int) -> None:
    fake = FakeRay(count)
    install(fake)
    from manta.cluster.nodes import capacity, node_group

    for module in (attempt, controller, node_group, capacity):
        module.time = CLOCK  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        config = ClusterConfig(nodes=count, hot_standby=False)
        job = Job(program=("-c", ""), environment={}, directory=Path(folder), sizes=(count * each,), ranks_per_node=each)
        started = failed = None
        spent = 0.0
        clock_start, real = CLOCK.now, time.process_time()
        for event in controller.Controller(job, config, fake).run():
            if event.kind == "first-step" and started is None:
                started, calls, starting = CLOCK.now, sum(CALLS.values()), time.process_time() - real
                spent, real = 0.0, time.process_time()
                victim = fake.agents[count // 2]
                victim.killed, victim.killed_at = victim.ranks[-1], CLOCK.now + KILLED_AT
            if event.kind == "rank-failed":
                failed, spent = event, time.process_time() - real
                detected = CLOCK.now - victim.killed_at
                running = CLOCK.now - (started or clock_start)
    assert started is not None
    assert failed is not None
    assert failed.details["rank"] == victim.killed or failed.details["rank"] == victim.ranks[-1]
    print(f"{count:,} nodes, {count * each:,} ranks")
    print(f"  start-up                    {calls:8,} calls, {calls / count:.1f} per node; {starting:.2f} s of processor time")
    print(f"  a second of heartbeats      {spent / running:8.3f} s of processor time")
    print(f"  a killed rank is detected   {detected:8.3f} s after; rank {failed.details['rank']}, {failed.details['message']}")


if __name__ == "__main__":
    sizes = [int(argument) for argument in sys.argv[1:]]
    main(sizes[0] if sizes else 1250, sizes[1] if len(sizes) > 1 else 8)
