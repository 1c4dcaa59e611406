"""Random kills: whatever dies, and whenever, the run ends bitwise as an undisturbed one, and leaves nothing behind.

A round is determined by its number of nodes and its seed, apart from the machine's speed. To repeat one that failed:
`SOAK=3:17 pytest -m slow tests/cluster/test_kill_soak.py` (nodes:seed; or several, separated by commas).
"""

import json
import os
import random
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from run_process import RunProcess, exact_values, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROUNDS = [(int(nodes), int(seed)) for nodes, _, seed in (part.partition(":") for part in os.environ.get("SOAK", "").split(",") if part)]
CHUNKS = [[each] for each in ROUNDS] or [[(nodes, 3 * chunk + n) for n in range(3)] for nodes in (1, 3) for chunk in range(7)]
STEPS = 250
SETTINGS = (
    *(f"train.steps={STEPS}", "train.global_batch=12", "train.micro_batch=2", "checkpoint.every_steps=10", "evaluate.every_steps=50"),
    *("evaluate.samples=8", "cluster.hot_standby=true", "cluster.node_timeout=10", "cluster.max_restarts_without_progress=5"),
)
VICTIMS = ("rank", "agent", "standby", "raylet", "gcs", "controller", "host")
FOLDERS = re.compile(rb"(/tmp|/var/tmp|/dev/shm)/manta-(?:ray|host|agent)-\w+")


def settings_of(nodes: int) -> tuple[str, ...]:
    # `3..3`: a run that loses a node waits for it, because two nodes would add gradients in another order.
    return (*SETTINGS, f"cluster.nodes={nodes}..{nodes}", f"cluster.ranks_per_node={2 if nodes == 1 else 1}")


@pytest.fixture(scope="module")
def references(workspace) -> dict[int, list[list]]:
    values = {}
    for nodes in {nodes for chunk in CHUNKS for nodes, _ in chunk}:
        with RunProcess(workspace, f"undisturbed on {nodes}", *settings_of(nodes)) as run:
            code, output = run.end()
            assert code == 0, output
            values[nodes] = exact_values(run.lines())
    return values


@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: ",".join(f"{nodes}:{seed}" for nodes, seed in chunk))
def test_a_run_with_random_kills_ends_as_an_undisturbed_one(workspace, references, chunk):
    for nodes, seed in chunk:
        soak(workspace, nodes, seed, references[nodes])


def soak(workspace, nodes: int, seed: int, reference: list[list]) -> None:
    dice = random.Random(f"{nodes}:{seed}")
    victims = dice.sample(VICTIMS if nodes > 1 else VICTIMS[:-1], dice.choice([1, 1, 2]))
    moment = dice.choice([dice.uniform(0, 9), f"step {dice.randrange(1, STEPS - 20)}", f"step {dice.randrange(1, STEPS - 20)}"])
    print(f"SOAK={nodes}:{seed}: kills {' and '.join(victims)} at {moment}", flush=True)  # noqa: T201  to repeat it
    shared_memory, folders = entries(), set[str]()
    name = f"soak {nodes} {seed}"
    with RunProcess(workspace, name, *settings_of(nodes)) as run:
        wait_for(run, moment)
        folders |= folders_of(run)
        killed = list[str]()
        while not killed and run.process.poll() is None:
            killed = kill(run, victims, dice)
        code = run.process.wait(300)
        until(lambda: not run.processes(), within=90, report=lambda: f"{name}: orphans: {run.processes()}")
    print(f"SOAK={nodes}:{seed}: killed {' and '.join(killed) or 'nothing'}, exit code {code}", flush=True)  # noqa: T201
    # Ray ends the controller, too, if it loses a part of itself while the controller connects to it (docs/recovery.md).
    is_ray_lost = {"gcs", "raylet"} & {*killed} and not run.events("attempt-started")
    may_end = "controller" in killed or (is_ray_lost and "got one with processes that ended" in run.stderr.read_text())
    assert code == 0 or may_end, f"{name}: killed {killed}, exit code {code}: {run.story()}"
    if code:
        with RunProcess(workspace, name, *settings_of(nodes)) as again:
            wait_for(again, f"step {STEPS}")
            folders |= folders_of(again)
            code, output = again.end()
            assert code == 0, f"{name}: killed {killed}, then: {output}"
    assert exact_values(run.lines()) == reference, f"{name}: killed {killed}: {run.story()}"
    left = [folder for folder in folders if Path(folder).exists()]
    assert not left, f"{name}: killed {killed}, left {left}"
    until(lambda: entries() <= shared_memory, within=30, report=lambda: f"{name}: left {entries() - shared_memory} in shared memory")


def wait_for(run: RunProcess, moment: float | str) -> None:
    """Wait for some seconds, or for a step, or for the end of the run."""
    metrics = run.directory / "metrics.jsonl"
    step, deadline = int(str(moment).removeprefix("step ")) if isinstance(moment, str) else 0, time.monotonic() + 120
    if not step:
        time.sleep(float(moment))
    while step and run.process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.stat().st_size and json.loads(metrics.read_bytes().splitlines()[-1])["step"] >= step:
            return
        time.sleep(0.005)


def kill(run: RunProcess, victims: list[str], dice: random.Random) -> list[str]:
    """Kill one process of each kind, all at once; return the kinds of which there was one."""
    commands, ranks = run.command_lines(), {rank["pid"] for event in run.events("attempt-started") for rank in event["ranks"]}
    workers = {pid for pid, command in commands.items() if "manta.trainer" in command and "die_with_parent" not in command}
    found = {
        "rank": workers & ranks,
        "standby": workers - ranks,
        "agent": {pid for pid, command in commands.items() if command.startswith("ray::NodeAgent")},
        "raylet": {pid for pid, command in commands.items() if "/raylet --" in command},
        "gcs": {pid for pid, command in commands.items() if "/gcs_server " in command},
        "host": {pid for pid, command in commands.items() if "manta.cluster.ray.host" in command},
        "controller": {run.process.pid} if run.process.poll() is None else set(),
    }
    chosen = {victim: dice.choice(sorted(found[victim])) for victim in victims if found[victim]}
    for pid in chosen.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return list(chosen)


def entries() -> set[str]:
    """Return the names of what is in shared memory."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def folders_of(run: RunProcess) -> set[str]:
    """Return the folders for temporary files that the run's processes know."""
    folders = set[str]()
    for pid in [run.process.pid, *run.processes()]:
        for name in ("environ", "cmdline"):
            with suppress(OSError, psutil.Error):
                folders |= {match[0].decode() for match in FOLDERS.finditer(Path(f"/proc/{pid}/{name}").read_bytes())}
    return folders
