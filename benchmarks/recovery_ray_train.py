"""A run under Ray Train v2 for recovery.py, which injects faults into it. It logs in the format of a manta run.

python benchmarks/recovery_ray_train.py DIRECTORY default|tuned

It uses the cluster that manta starts on one machine, whose raylets are restarted when they end; a model of the size of gpt-tiny, in
plain PyTorch; a checkpoint every ten steps, and unlimited restarts. It may resume with two of its three workers, so that it need not wait
for a node. `tuned` has Ray's health checks as manta sets them, and the shortest timeouts that Ray Train's settings allow.
"""

import json
import os
import signal
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

from manta.cluster.ray import private_ray, runtime

NODES, SEQUENCES, LENGTH, VOCABULARY, WIDTH, LAYERS, HEADS, SAVE_EVERY = 3, 12, 128, 4096, 128, 4, 4, 10
LIMIT = "3"  # seconds, as in recovery.py
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": private_ray.HEALTH
    | {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # 2: how often it checks its workers
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": LIMIT,  # 600: how long one may not answer a check
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # 60: how long it waits for a node that Ray still lists
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": LIMIT,  # 30: how long workers may take to shut their process group down
    },
}


def main(directory: Path, settings: str) -> None:
    directory.mkdir()
    private_ray.HEALTH = SETTINGS[settings] | {"RAY_TRAIN_V2_ENABLED": "1"}
    with runtime.LocalRay(NODES).connected():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        import ray

        while ray.cluster_resources().get("CPU", 0) < NODES:
            time.sleep(0.1)
        from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
        from ray.train.torch import TorchConfig, TorchTrainer

        class FailureLog(UserCallback):
            def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002  Ray Train sets its name
                message = "; ".join(str(error).strip().splitlines()[-1] for error in worker_exceptions.values())
                append(directory / "events.jsonl", event="rank-failed", ranks=sorted(worker_exceptions), message=message)

        TorchTrainer(
            train,
            train_loop_config={"directory": str(directory)},
            scaling_config=ScalingConfig(num_workers=(NODES - 1, NODES)),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(
                name="run",
                storage_path=str(directory / "storage"),
                failure_config=FailureConfig(max_failures=-1),
                callbacks=[FailureLog()],
            ),
        ).fit()


def append(file: Path, **values: Any) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps({**values, "time": time.time()}) + "\n")


def train(config: dict[str, Any]) -> None:
    """Train on one worker."""
    import torch
    import torch.distributed as dist
    from ray import train
    from ray.train.torch import prepare_model

    directory, world = Path(config["directory"]), train.get_context().get_world_size()
    is_first = train.get_context().get_world_rank() == 0
    block = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    layers = torch.nn.TransformerEncoder(block, LAYERS, enable_nested_tensor=False)
    plain = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, WIDTH), layers, torch.nn.Linear(WIDTH, VOCABULARY, bias=False))
    plain[2].weight = plain[0].weight
    model = prepare_model(plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    start = 0
    if checkpoint := train.get_checkpoint():
        with checkpoint.as_directory() as directory_name:
            state = torch.load(Path(directory_name) / "state.pt", weights_only=True)
        plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    pids: list[Any] = [None] * world
    dist.all_gather_object(pids, os.getpid())
    events = directory / "events.jsonl"
    attempt = 1 + (events.read_text().count('"attempt-started"') if events.exists() else 0)
    if is_first:
        append(events, event="attempt-started", attempt=attempt, ranks=[{"rank": rank, "pid": pid} for rank, pid in enumerate(pids)])
    for step in count(start + 1):
        text = torch.randint(0, VOCABULARY, (SEQUENCES // world, LENGTH + 1))
        logits = model(text[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if is_first:
            append(directory / "metrics.jsonl", step=step, attempt=attempt)
        if step % SAVE_EVERY == 0:
            with tempfile.TemporaryDirectory() as directory_name:
                if is_first:
                    state = {"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    torch.save(state, Path(directory_name) / "state.pt")
                train.report({"step": step}, checkpoint=train.Checkpoint.from_directory(directory_name) if is_first else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
