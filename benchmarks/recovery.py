"""How long a run needs to start and to recover from each fault, under manta and under Ray Train v2. Writes it into docs/drill.md.

python benchmarks/recovery.py [--times N] [--patience SECONDS] [--results FILE] [--systems NAME...] [FAULT...]

Three nodes of one rank each, on this machine; each fault N times, each time in a new run. Exits with 1 if manta misses a bound. With names
of faults, only these are measured, and nothing is written. Measurements are appended to FILE, and those in it are not repeated, so that it
can be done in parts.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

import psutil

from manta.trainer.metrics import parse_lines

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs/drill.md"
START, END = "<!-- what follows is written by `python benchmarks/recovery.py` -->\n", "<!-- here it ends -->\n"
MANTA = Path(sys.executable).with_name("manta")
EXAMPLE = HERE.parent / "examples/gpt-tiny.yaml"
LIMIT = 3.0  # seconds: node_timeout and step_timeout, for the faults that they detect
WARM_UP = 30.0  # seconds in which standby processes have imported everything, while training uses both cores
SAVE_EVERY = 10  # steps
GIVE_UP = 120.0  # seconds
BUSY = 15.0  # percent of the machine that other processes may use
START_TIMEOUT = 600.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`victims`: the processes that it hits, from a rank of the run. `bound`: seconds until the next optimizer step is done."""

    name: str
    victims: Callable[[psutil.Process], list[psutil.Process]]
    bound: float
    number: signal.Signals = signal.SIGKILL
    settings: tuple[str, ...] = ()
    has_counterpart: bool = True  # under Ray Train


def itself(rank: psutil.Process) -> list[psutil.Process]:
    return [rank]


def agent(rank: psutil.Process) -> list[psutil.Process]:
    return [process for process in rank.parents() if process.cmdline()[0].startswith("ray::NodeAgent")]


def raylet(rank: psutil.Process) -> list[psutil.Process]:
    return [process for process in rank.parents() if process.name() == "raylet"]


def node(rank: psutil.Process) -> list[psutil.Process]:
    """The host program, which would restart the raylet, and its descendants."""
    (host,) = [process for process in rank.parents() if "manta.cluster.ray.host" in process.cmdline()]
    return [host, *host.children(recursive=True)]


FAULTS = {
    "rank-killed": Fault(name="a rank is killed", victims=itself, bound=2.0),
    "agent-killed": Fault(name="an agent is killed", victims=agent, bound=3.0, has_counterpart=False),
    "raylet-killed": Fault(name="a raylet is killed", victims=raylet, bound=6.0),
    "node-killed": Fault(name="all processes of a node are killed", victims=node, bound=6.0),
    "node-frozen": Fault(
        name=f"a node is frozen; node_timeout is {LIMIT:g} s",
        victims=node,
        bound=LIMIT + 4,
        number=signal.SIGSTOP,
        settings=(f"cluster.node_timeout={LIMIT}",),
    ),
    "rank-frozen": Fault(
        name=f"a rank hangs (SIGSTOP); step_timeout is {LIMIT:g} s",
        victims=itself,
        bound=LIMIT + 3,
        number=signal.SIGSTOP,
        settings=(f"cluster.step_timeout={LIMIT}",),
    ),
}
SIZE = ("train.global_batch=12", "train.micro_batch=2", "train.steps=100000", "evaluate.every_steps=100000")
NODES = (f"checkpoint.every_steps={SAVE_EVERY}", "cluster.nodes=3", "cluster.ranks_per_node=1")
SYSTEMS: dict[str, Callable[[Path, Fault], list[Any]]] = {
    "manta": lambda run, fault: [MANTA, "train", EXAMPLE, f"run.dir={run}", *SIZE, *NODES, *fault.settings],
    "Ray Train": lambda run, _: [sys.executable, "-P", HERE / "recovery_ray_train.py", run, "default"],
    "Ray Train, tuned": lambda run, _: [sys.executable, "-P", HERE / "recovery_ray_train.py", run, "tuned"],
}


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Seconds after the fault, infinite if it did not happen in time; steps that were recomputed; percent that others used."""

    fault: str
    system: str
    detected: float
    resumed: float
    recomputed: int
    busy: float


def measure(name: str, system: str, number: int, *, patience: float) -> Recovery:
    """Inject one fault into a new run. It hits another rank each time."""
    fault, busy = FAULTS[name], wait_until_quiet(patience)
    with tempfile.TemporaryDirectory() as directory, (Path(directory) / "log").open("w+b") as log:
        run = Path(directory) / "run"
        training = subprocess.Popen(SYSTEMS[system](run, fault), stdout=log, stderr=log, cwd=HERE.parent, start_new_session=True)
        victims: list[psutil.Process] = []
        try:
            if not wait_for(lambda: lines(run), training, within=START_TIMEOUT):
                raise SystemExit(f"{system}: no step\n{Path(log.name).read_text(errors='replace')}")
            time.sleep(WARM_UP)
            wait_for(lambda: lines(run)[SAVE_EVERY + 1 :], training, within=START_TIMEOUT)  # there is a checkpoint
            (attempt,) = events(run, "attempt-started")
            victims = fault.victims(psutil.Process(attempt["ranks"][number % len(attempt["ranks"])]["pid"]))
            assert victims
            when = time.time()
            for victim in victims:
                victim.send_signal(fault.number)
            after = wait_for(lambda: [line for line in lines(run) if line["attempt"] > attempt["attempt"]], training, within=GIVE_UP)
            detected = [event["time"] - when for event in events(run, "rank-failed", "node-lost") if event["time"] > when]
            before = [line["step"] for line in lines(run) if line["attempt"] == attempt["attempt"]]
        finally:
            end(training, victims)
    return Recovery(
        fault=name,
        system=system,
        detected=detected[0] if detected else inf,
        resumed=after[0]["time"] - when if after else inf,
        recomputed=max(before) - after[0]["step"] + 1 if after else 0,
        busy=busy,
    )


def wait_until_quiet(patience: float) -> float:
    """Wait until other processes use little of the machine, at most `patience` seconds; return the percentage that they use."""
    deadline = time.monotonic() + patience
    while (busy := psutil.cpu_percent(5.0)) > BUSY and time.monotonic() < deadline:
        pass
    return busy


def wait_for(find: Callable[[], list[dict[str, Any]]], training: subprocess.Popen[bytes], *, within: float) -> list[dict[str, Any]]:
    """Return what `find` returns; an empty list if the run ended first, or the time did."""
    deadline = time.monotonic() + within
    while not (result := find()) and training.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return result


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the metrics in the order of writing: a step that was recomputed has two."""
    text = file.read_text() if (file := run / "metrics.jsonl").exists() else ""
    return parse_lines(text[: text.rfind("\n") + 1])


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["event"] in kinds]


def end(training: subprocess.Popen[bytes], victims: Sequence[psutil.Process]) -> None:
    """End all processes of a run, whatever state it is in."""
    for victim in victims:
        if victim.is_running():
            victim.kill()
    children = psutil.Process(training.pid).children(recursive=True) if training.poll() is None else []
    training.terminate()
    try:
        training.wait(60)
    except subprocess.TimeoutExpired:
        training.kill()
        training.wait()
    for process in children:
        if process.is_running():
            process.kill()


def start_and_stop(patience: float) -> dict[str, Any]:
    """Run the example; return the seconds to its first step, and from SIGTERM until it has saved and ended."""
    busy = wait_until_quiet(patience)
    with tempfile.TemporaryDirectory() as directory:
        run, when = Path(directory) / "run", time.time()
        command = [MANTA, "train", EXAMPLE, f"run.dir={run}", "train.steps=100000"]
        training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=HERE.parent)
        try:
            first = wait_for(lambda: lines(run), training, within=START_TIMEOUT)[0]["time"] - when
            time.sleep(WARM_UP)
            when = time.time()
            training.terminate()
            return {"first_step": first, "code": training.wait(60), "stopped": time.time() - when, "busy": busy}
        finally:
            end(training, [])


def median_and_slowest(measured: Sequence[float]) -> str:
    if inf in measured:
        return f"not within {GIVE_UP:g}"
    return f"{statistics.median(measured):.2f} ({max(measured):.2f})"


def meets_bound(results: Sequence[Recovery], name: str) -> bool:
    return all(one.resumed <= FAULTS[name].bound for one in results if (one.fault, one.system) == (name, "manta"))


def counts(results: Sequence[Recovery], systems: Sequence[str]) -> str:
    """Return how often each fault was measured, without those that were never recovered from, which are not repeated."""
    per_fault = Counter((one.fault, one.system) for one in results if one.system in systems and one.resumed < inf)
    return " to ".join(map(str, sorted({*per_fault.values()})))


def table(results: Sequence[Recovery], start: dict[str, Any], machine: str) -> str:
    """Return the part of docs/drill.md. start: what start_and_stop returned."""
    measured = f"{counts(results, ['manta'])} runs (for Ray Train, of {counts(results, [*SYSTEMS][1:])})"
    text = f"""On {machine}. Times are in seconds from the fault: the median of {measured}, with the slowest in parentheses.

| fault | detected after | recovered after | limit | steps recomputed | Ray Train v2 recovered after | Ray Train v2 tuned |
|---|---|---|---|---|---|---|
"""
    for name, fault in FAULTS.items():
        by_system = {system: [one for one in results if (one.fault, one.system) == (name, system)] for system in SYSTEMS}
        manta = by_system.pop("manta")
        bound = f"{fault.bound:g}" if meets_bound(results, name) else f"{fault.bound:g}, MISSED"
        cells = [median_and_slowest([one.detected for one in manta]), median_and_slowest([one.resumed for one in manta]), bound]
        cells.append(f"{statistics.median(one.recomputed for one in manta):g}")
        for others in ([one.resumed for one in of_system] for of_system in by_system.values()):
            ratio = statistics.median(others) / statistics.median(one.resumed for one in manta) if others else inf
            cells.append(median_and_slowest(others) + (f", {ratio:.0f}x slower" if ratio < inf else "") if others else "-")
        text += f"| {fault.name} | {' | '.join(cells)} |\n"
    busy = max(start["busy"], *(one.busy for one in results))
    if busy > BUSY:
        text += f"\nThe machine was not quiet: other processes used up to {busy:.0f} % of it right before a run.\n"
    return text + (
        f"\n`manta train examples/gpt-tiny.yaml`, two ranks on one node, corpus already prepared: the first optimizer step is done after"
        f" {start['first_step']:.1f} s. From SIGTERM until it has saved and exited with {start['code']}: {start['stopped']:.1f} s.\n"
    )


def replace_in(document: str, part: str) -> str:
    before, _, rest = document.partition(START)
    _, end_marker, after = rest.partition(END)
    assert end_marker, f"{DOCUMENT} has no markers for the table"
    return f"{before}{START}{part}{END}{after}"


def machine() -> str:
    """Describe this machine and its packages."""
    model = next(line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    packages = ", ".join(f"{name} {version(package)}" for name, package in (("Ray", "ray"), ("torch", "torch"), ("DeepSpeed", "deepspeed")))
    return f"{len(os.sched_getaffinity(0))} cores ({model}), {packages}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--patience", type=float, default=600.0, help="seconds to wait, each time, until other processes are idle")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    options = parser.parse_args()
    subprocess.run([MANTA, "prepare", EXAMPLE], check=True, cwd=HERE.parent)
    file = options.results or Path(tempfile.mkdtemp()) / "results.jsonl"
    results = [Recovery(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    for name in options.faults or FAULTS:
        for system in options.systems if FAULTS[name].has_counterpart else ["manta"]:
            for number in range(sum((one.fault, one.system) == (name, system) for one in results), options.times):
                if any((one.fault, one.system, one.resumed) == (name, system, inf) for one in results):
                    break  # it would take as long again, with the same result
                results.append(one := measure(name, system, number, patience=options.patience))
                times = f"detected after {one.detected:.2f} s, next step after {one.resumed:.2f} s, {one.recomputed} steps recomputed"
                print(f"{name}, {system}: {times}; other processes used {one.busy:.0f} %", flush=True)
                with file.open("a") as stream:
                    stream.write(json.dumps(asdict(one)) + "\n")
    if not options.faults:
        DOCUMENT.write_text(replace_in(DOCUMENT.read_text(), part := table(results, start_and_stop(options.patience), machine())))
        print(part)
    return 0 if all(meets_bound(results, name) for name in FAULTS) else 1


if __name__ == "__main__":
    sys.exit(main())
