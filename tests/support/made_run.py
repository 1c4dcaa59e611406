"""Made-up run directories, as a run leaves them: config, manifest, metrics and events, for tests of what reads them."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from manta.launch.config import load

START = 1_790_000_000.0
CONFIG = {
    "data": {"sources": ["texts/*.txt"], "sequence_length": 128},
    "model": {"preset": "llama-tiny"},
    "train": {"steps": 100, "global_batch": 32, "micro_batch": 16},
    "checkpoint": {"every_steps": 10},
    "precision": "fp32",
}


def make_run(
    directory: Path,
    *,
    steps: int = 100,
    failures: Sequence[tuple[int, int]] = (),
    experts: int = 0,
    more: Mapping[str, float] | None = None,
    config: Mapping[str, Mapping[str, Any]] | None = None,
    manifest: Mapping[str, Any] | None = None,
    seed: int = 1,
    message: str = "killed by SIGKILL",
) -> Path:
    """failures: steps at which rank 1 dies, and the step of the checkpoint from which the next attempt resumes. more: of each line."""
    directory.mkdir(parents=True)
    tree = {key: {**CONFIG.get(key, {}), **(config or {}).get(key, {})} for key in [*CONFIG, *(config or {})] if key != "precision"}
    tree |= {"run": {"dir": str(directory), **tree.get("run", {})}, "precision": CONFIG["precision"]}
    tree["train"]["steps"] = steps
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    file.write_text(load(file).to_yaml())
    recorded = {"manta": "0.1.0", "versions": {"torch": "2.13.0"}, "corpus": {"tokenizer": "t.json", "corpora": ["c"], "fingerprint": "f0"}}
    (directory / "manifest.json").write_text(json.dumps(recorded | dict(manifest or {})))
    events, lines, time = list[dict](), list[dict](), START

    def event(kind: str, attempt: int, **details: Any) -> None:
        events.append({"time": time, "event": kind, "attempt": attempt, **details})

    event("run-started", 0, took_over=False)
    event("nodes-gathered", 0, ranks=2, nodes=[{"address": "127.0.0.1"}])
    first = 0
    for attempt, (last, resumed) in enumerate([*failures, (steps, steps)], start=1):
        event("attempt-started", attempt, ranks=[{"rank": 0}, {"rank": 1}])
        time += 5.0
        event("loaded", attempt, step=first)
        seconds = {"start": 3.0, "load": 2.0}
        for step in range(first + 1, last + 1):
            phase = "compile" if step == first + 1 else "step"
            seconds[phase] = seconds.get(phase, 0.0) + 0.5
            time += 0.5
            lines.append(line(step, attempt, seed, experts, more or {}) | {"time": time, "seconds": dict(seconds)})
        if last < steps or attempt <= len(failures):
            time += 1.0
            event("rank-failed", attempt, rank=1, cause="SIGNAL", step=last, message=message, noticed_after=0.2)
            event("attempt-stopped", attempt, outcome="failure")
            event("decided", attempt, decision="restart")
        first = resumed
    event("attempt-stopped", len(failures) + 1, outcome="done")
    event("run-ended", len(failures) + 1, exit_code=0)
    (directory / "events.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in events))
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    return directory


def line(step: int, attempt: int, seed: int, experts: int, more: Mapping[str, float]) -> dict[str, Any]:
    chance = random.Random(f"{seed} {step}")
    loss = 4 + 4 * math.exp(-step / 60) + chance.gauss(0, 0.05)
    loads = {}
    for layer in range(2 if experts else 0):
        shares = [1 + 0.5 * math.sin(expert + step / 40) + layer * (expert == 1) for expert in range(experts)]
        loads[f"load/blocks.{layer}.mlp.router"] = [round(share / sum(shares), 4) for share in shares]
    return {
        "step": step,
        "tokens": 4096 * step,
        "train/loss": loss,
        "global_batch": 32,
        "sequence_length": 128,
        "learning_rate": 4e-3 * min(1.0, step / 40),
        "grad_norm": 0.5 + chance.random(),
        "tokens_per_second": round(8000 + chance.gauss(0, 300), 1),
        "mfu": 0.4,
        "step_time": 0.5,
        "memory/peak": 600_000_000 + step,
        "data/digest": 1000 * seed + step,
        "world_size": 2,
        "layout": "data 2, ZeRO-1",
        "attempt": attempt,
        **({"eval/loss": loss + 0.1, **more} if step % 25 == 0 else more),
        **loads,
    }
