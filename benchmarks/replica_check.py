"""The cost of the replica check: seconds of a check and of a step, on two ranks of this machine.

python benchmarks/replica_check.py [rounds]
"""

import os
import socket
import statistics
import sys
import time
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.distributed as dist
from torch import multiprocessing

from manta.trainer.config.model import ModelConfig
from manta.trainer.config.sections import OptimizerConfig, ParallelConfig, Precision, TrainConfig
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dist.layout import layout_for
from manta.trainer.dist.world import World
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.model.build import build_model

RANKS, LENGTH, VOCABULARY = 2, 128, 4096
MODELS: list[tuple[dict[str, Any], Precision]] = [
    ({"layers": 4, "width": 256, "heads": 4}, "fp32"),
    ({"layers": 4, "width": 256, "heads": 4}, "bf16"),
    ({"layers": 8, "width": 768, "heads": 12}, "bf16"),
]


def main(rounds: int) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]), OMP_NUM_THREADS="1")
    multiprocessing.spawn(rank, (rounds,), nprocs=RANKS)
    return 0


def rank(number: int, rounds: int) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
    torch.set_num_threads(1)
    world = World.from_environment()
    world.join()
    for sizes, precision in MODELS:
        model = build_model(ModelConfig(**sizes), vocabulary=VOCABULARY, sequence_length=LENGTH)
        model.initialize(1)
        layout = layout_for(TrainConfig(steps=1, global_batch=32, micro_batch=16), ParallelConfig(), RANKS)
        engine = Engine(model, mesh=world.mesh(layout), optimizer=OptimizerConfig(), precision=precision)
        text, places = torch.randint(0, VOCABULARY, (16, LENGTH + 1)), torch.arange(LENGTH).expand(16, LENGTH)
        fields = {"positions": places, "documents": torch.zeros_like(places), "keys": torch.arange(16)}
        batch = Batch(tokens=text[:, :-1].contiguous(), targets=text[:, 1:].contiguous(), **fields)
        steps, checks = [], []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            engine.step([batch], learning_rate=1e-4)
            dist.barrier()
            between = time.perf_counter()
            engine.replica_check.run(1)
            steps.append(between - started)
            checks.append(time.perf_counter() - between)
        if number == 0:
            step, check = statistics.median(steps[1:]), statistics.median(checks[1:])
            weights = sum(parameter.numel() for parameter in model.parameters())
            print(
                f"{weights / 1e6:6.1f} M weights, {precision}: step {step:.3f} s, check {check * 1000:.2f} ms: {check / step:.2%} of a step"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
