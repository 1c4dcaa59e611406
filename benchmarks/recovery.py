"""How long a run needs to start, and to come back from each fault: manta's, and one under Ray Train v2. Writes it into docs/recovery.md.

python benchmarks/recovery.py [--times N] [--patience SECONDS] [--results FILE] [--systems NAME...] [FAULT...]

Three nodes of one rank each, on this machine; each fault N times, each time in a run of its own. Exits 1 where manta does not come back in
time. With names of faults only these are measured, and nothing is written. What was measured is added to FILE, and what stands there is not
measured again: so it can be done in parts.
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
DOCUMENT = HERE.parent / "docs/recovery.md"
BEGIN, END = "<!-- what follows is written by `python benchmarks/recovery.py` -->\n", "<!-- here it ends -->\n"
MANTA = Path(sys.executable).with_name("manta")
EXAMPLE = HERE.parent / "examples/gpt-tiny.yaml"
LIMIT = 3.0  # seconds that a node or a rank may be silent, where that is the fault
WARM = 30.0  # seconds in which spares have imported everything, while training has both cores
SAVE_EVERY = 10  # steps
GIVE_UP = 120.0  # seconds
BUSY = 15.0  # percent of the machine that others may use
COMING = 600.0  # seconds in which a run starts


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`victims`: the processes that it hits, found from a rank of the run. `within`: seconds until the next optimizer step is done."""

    what: str
    victims: Callable[[psutil.Process], list[psutil.Process]]
    within: float
    number: signal.Signals = signal.SIGKILL
    settings: tuple[str, ...] = ()
    has_counterpart: bool = True  # under Ray Train


def itself(rank: psutil.Process) -> list[psutil.Process]:
    return [rank]


def agent(rank: psutil.Process) -> list[psutil.Process]:
    return [found for found in rank.parents() if found.cmdline()[0].startswith("ray::NodeAgent")]


def raylet(rank: psutil.Process) -> list[psutil.Process]:
    return [found for found in rank.parents() if found.name() == "raylet"]


def node(rank: psutil.Process) -> list[psutil.Process]:
    """All that came of the program that keeps its raylet up, and this first: it would start another."""
    (keeper,) = [found for found in rank.parents() if "manta.cluster.ray.host" in found.cmdline()]
    return [keeper, *keeper.children(recursive=True)]


FAULTS = {
    "rank-killed": Fault(what="a rank is killed", victims=itself, within=2.0),
    "agent-killed": Fault(what="an agent is killed", victims=agent, within=3.0, has_counterpart=False),
    "raylet-killed": Fault(what="a raylet is killed", victims=raylet, within=6.0),
    "node-killed": Fault(what="all processes of a node are killed", victims=node, within=6.0),
    "node-frozen": Fault(
        what=f"a node is frozen; it may be silent for {LIMIT:g} s",
        victims=node,
        within=LIMIT + 4,
        number=signal.SIGSTOP,
        settings=(f"cluster.node_timeout={LIMIT}",),
    ),
    "rank-frozen": Fault(
        what=f"a rank is stopped; it may be silent for {LIMIT:g} s",
        victims=itself,
        within=LIMIT + 3,
        number=signal.SIGSTOP,
        settings=(f"cluster.step_timeout={LIMIT}",),
    ),
}
SIZE = (
    "train.global_batch=12",
    "train.micro_batch=2",
    "train.steps=100000",
    f"checkpoint.every_steps={SAVE_EVERY}",
    "evaluate.every_steps=100000",
)
NODES = ("cluster.nodes=3", "cluster.ranks_per_node=1")
SYSTEMS: dict[str, Callable[[Path, Fault], list[Any]]] = {
    "manta": lambda run, fault: [MANTA, "train", EXAMPLE, f"run.dir={run}", *SIZE, *NODES, *fault.settings],
    "Ray Train": lambda run, _: [sys.executable, "-P", HERE / "recovery_ray_train.py", run, "default"],
    "Ray Train, tuned": lambda run, _: [sys.executable, "-P", HERE / "recovery_ray_train.py", run, "tuned"],
}


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Seconds after the fault, infinite where it was waited for in vain; steps done `again`; percent of the machine used by others."""

    fault: str
    system: str
    noticed: float
    resumed: float
    again: int
    busy: float


def measure(name: str, system: str, number: int, *, patience: float) -> Recovery:
    """One fault, in a run of its own. It hits another rank each time."""
    fault, busy = FAULTS[name], quiet(patience)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+b") as log:
        run = Path(folder) / "run"
        training = subprocess.Popen(SYSTEMS[system](run, fault), stdout=log, stderr=log, cwd=HERE.parent, start_new_session=True)
        victims: list[psutil.Process] = []
        try:
            if not until(lambda: lines(run), training, within=COMING):
                raise SystemExit(f"{system}: no step\n{Path(log.name).read_text(errors='replace')}")
            time.sleep(WARM)
            until(lambda: lines(run)[SAVE_EVERY + 1 :], training, within=COMING)  # there is a checkpoint
            (attempt,) = of_kinds(run, "attempt-started")
            victims = fault.victims(psutil.Process(attempt["ranks"][number % len(attempt["ranks"])]["pid"]))
            assert victims
            when = time.time()
            for victim in victims:
                victim.send_signal(fault.number)
            after = until(lambda: [line for line in lines(run) if line["attempt"] > attempt["attempt"]], training, within=GIVE_UP)
            noticed = [event["time"] - when for event in of_kinds(run, "rank-failed", "node-lost") if event["time"] > when]
            before = [line["step"] for line in lines(run) if line["attempt"] == attempt["attempt"]]
        finally:
            end(training, victims)
    return Recovery(
        fault=name,
        system=system,
        noticed=noticed[0] if noticed else inf,
        resumed=after[0]["time"] - when if after else inf,
        again=max(before) - after[0]["step"] + 1 if after else 0,
        busy=busy,
    )


def quiet(patience: float) -> float:
    """Waits until others leave the machine alone, or patience is at its end. Percent of it that they use."""
    deadline = time.monotonic() + patience
    while (busy := psutil.cpu_percent(5.0)) > BUSY and time.monotonic() < deadline:
        pass
    return busy


def until(look: Callable[[], list[dict[str, Any]]], training: subprocess.Popen[bytes], *, within: float) -> list[dict[str, Any]]:
    """What was looked for; nothing where the run ended before, or the time did."""
    deadline = time.monotonic() + within
    while not (found := look()) and training.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def lines(run: Path) -> list[dict[str, Any]]:
    """The steps as they were written, one that was done again twice."""
    text = file.read_text() if (file := run / "metrics.jsonl").exists() else ""
    return parse_lines(text[: text.rfind("\n") + 1])


def of_kinds(run: Path, *kinds: str) -> list[dict[str, Any]]:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] in kinds]


def end(training: subprocess.Popen[bytes], victims: Sequence[psutil.Process]) -> None:
    """Nothing is left of a run, whatever state it is in."""
    for victim in victims:
        if victim.is_running():
            victim.kill()
    started = psutil.Process(training.pid).children(recursive=True) if training.poll() is None else []
    training.terminate()
    try:
        training.wait(60)
    except subprocess.TimeoutExpired:
        training.kill()
        training.wait()
    for process in started:
        if process.is_running():
            process.kill()


def start_and_stop(patience: float) -> dict[str, Any]:
    """Seconds of the example as it is: until its first step is done; from SIGTERM until it has saved and is gone."""
    busy = quiet(patience)
    with tempfile.TemporaryDirectory() as folder:
        run, when = Path(folder) / "run", time.time()
        command = [MANTA, "train", EXAMPLE, f"run.dir={run}", "train.steps=100000"]
        training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=HERE.parent)
        try:
            first = until(lambda: lines(run), training, within=COMING)[0]["time"] - when
            time.sleep(WARM)
            when = time.time()
            training.terminate()
            return {"first_step": first, "code": training.wait(60), "gone": time.time() - when, "busy": busy}
        finally:
            end(training, [])


def in_words(measured: Sequence[float]) -> str:
    """Median and slowest."""
    if inf in measured:
        return f"not within {GIVE_UP:g}"
    return f"{statistics.median(measured):.2f} ({max(measured):.2f})"


def holds(results: Sequence[Recovery], name: str) -> bool:
    return all(one.resumed <= FAULTS[name].within for one in results if (one.fault, one.system) == (name, "manta"))


def times(results: Sequence[Recovery], systems: Sequence[str]) -> str:
    """How often each fault was measured. One that was waited for in vain is not tried again."""
    counts = Counter((one.fault, one.system) for one in results if one.system in systems and one.resumed < inf)
    return " to ".join(map(str, sorted({*counts.values()})))


def table(results: Sequence[Recovery], around: dict[str, Any], machine: str) -> str:
    """What docs/recovery.md says of them."""
    often = f"{times(results, ['manta'])} (Ray Train: of {times(results, [*SYSTEMS][1:])})"
    text = f"""On {machine}. Seconds: the median of {often}, in brackets the slowest.

| what happens | noticed after | next optimizer step after | to hold | steps done again | Ray Train v2 | Ray Train v2, tuned |
|---|---|---|---|---|---|---|
"""
    for name, fault in FAULTS.items():
        of = {system: [one for one in results if (one.fault, one.system) == (name, system)] for system in SYSTEMS}
        ours = of["manta"]
        held = f"{fault.within:g}" if holds(results, name) else f"{fault.within:g}, NOT HELD"
        cells = [in_words([one.noticed for one in ours]), in_words([one.resumed for one in ours]), held]
        cells.append(f"{statistics.median(one.again for one in ours):g}")
        for theirs in ([one.resumed for one in of[system]] for system in SYSTEMS if system != "manta"):
            times_longer = statistics.median(theirs) / statistics.median(one.resumed for one in ours) if theirs else inf
            cells.append(in_words(theirs) + (f", {times_longer:.0f} times" if times_longer < inf else "") if theirs else "-")
        text += f"| {fault.what} | {' | '.join(cells)} |\n"
    busy = max(around["busy"], *(one.busy for one in results))
    if busy > BUSY:
        text += f"\nThe machine was not quiet: others used up to {busy:.0f} % of it right before a run began.\n"
    return text + (
        f"\n`manta train examples/gpt-tiny.yaml`, two ranks on one node, corpus prepared: the first optimizer step is done after"
        f" {around['first_step']:.1f} s. SIGTERM to saved and gone, exit {around['code']}: {around['gone']:.1f} s.\n"
    )


def replace_in(document: str, part: str) -> str:
    before, _, rest = document.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{DOCUMENT} has no place for the table"
    return f"{before}{BEGIN}{part}{END}{after}"


def machine() -> str:
    """The one that this runs on, in words."""
    model = next(line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    packages = ", ".join(f"{name} {version(package)}" for name, package in (("Ray", "ray"), ("torch", "torch"), ("DeepSpeed", "deepspeed")))
    return f"{len(os.sched_getaffinity(0))} cores ({model}), {packages}"


def main() -> int:
    asked = argparse.ArgumentParser()
    asked.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    asked.add_argument("--times", type=int, default=3)
    asked.add_argument("--patience", type=float, default=600.0, help="seconds to wait, each time, until others leave the machine alone")
    asked.add_argument("--results", type=Path)
    asked.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    told = asked.parse_args()
    subprocess.run([MANTA, "prepare", EXAMPLE], check=True, cwd=HERE.parent)
    file = told.results or Path(tempfile.mkdtemp()) / "results.jsonl"
    results = [Recovery(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    for name in told.faults or FAULTS:
        for system in told.systems if FAULTS[name].has_counterpart else ["manta"]:
            for number in range(sum((one.fault, one.system) == (name, system) for one in results), told.times):
                if any((one.fault, one.system, one.resumed) == (name, system, inf) for one in results):
                    break  # it would take as long again to see the same
                results.append(one := measure(name, system, number, patience=told.patience))
                print(
                    f"{name}, {system}: noticed after {one.noticed:.2f} s, next step after {one.resumed:.2f} s, {one.again} steps again"
                    f"; others used {one.busy:.0f} %",
                    flush=True,
                )
                with file.open("a") as kept:
                    kept.write(json.dumps(asdict(one)) + "\n")
    if not told.faults:
        DOCUMENT.write_text(replace_in(DOCUMENT.read_text(), part := table(results, start_and_stop(told.patience), machine())))
        print(part)
    return 0 if all(holds(results, name) for name in FAULTS) else 1


if __name__ == "__main__":
    sys.exit(main())
