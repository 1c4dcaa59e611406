"""Measure a config's tokens per second and MFU on this device, and write them to benchmarks/results/<device>.json.

python benchmarks/throughput.py examples/gpt2-124m.yaml [key=value …]
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from manta.trainer.metrics import read_metrics
from manta.trainer.run_directory import RunDirectory

MANTA = Path(sys.executable).with_name("manta")
WARMUP = 10  # steps excluded: kernels are compiled, caches fill, clocks rise
STEPS = 60


def main(file: str, overrides: list[str]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        fixed = [f"run.dir={run}", f"train.steps={STEPS}", "schedule.warmup_steps=10", f"checkpoint.every_steps={STEPS}"]
        command = [MANTA, "train", file, *overrides, *fixed, f"evaluate.every_steps={STEPS}"]
        subprocess.run(command, check=True)
        config = RunDirectory(run).config()
        lines = read_metrics(run / "metrics.jsonl")[WARMUP:]
    name = device()
    result = {
        "device": name,
        "config": Path(file).stem,
        "precision": config.precision,
        "ranks": lines[-1]["world_size"],
        "sequence_length": config.data.sequence_length,
        "micro_batch": config.train.micro_batch,
        "global_batch": config.train.global_batch,
        "steps": len(lines),
        "tokens_per_second": round(statistics.median(line["tokens_per_second"] for line in lines)),
        "mfu": statistics.median(line["mfu"] for line in lines) if lines[-1]["mfu"] is not None else None,
        "memory_peak_bytes": max(line["memory/peak"] for line in lines),
        "data_wait_share": round(sum(line["data_wait"] for line in lines) / sum(line["step_time"] for line in lines), 5),
        "torch": torch.__version__,
    }
    out = Path(__file__).parent / "results" / f"{re.sub('[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json"
    known = json.loads(out.read_text()) if out.exists() else []
    same = ("config", "precision", "ranks")
    kept = [old for old in known if any(old[key] != result[key] for key in same)]
    out.write_text(json.dumps([*kept, result], indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with Path("/proc/cpuinfo").open() as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
    amx = "with AMX" if "amx_bf16" in Path("/proc/cpuinfo").read_text() else "without AMX"
    return f"{torch.get_num_threads()} cores {model} {amx}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
