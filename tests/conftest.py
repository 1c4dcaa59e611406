"""What several test files share: a small corpus, a small config, and the `manta` command as a user would type it."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

# What a program was started to ignore, all that it starts ignores too: under nohup, or in the background, tests would wait for ever.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
MANTA = Path(sys.executable).with_name("manta")


@dataclass(frozen=True)
class Case:
    """A config of a small run over a small corpus, prepared already."""

    file: Path
    home: Path  # a working directory with a space in its path, and the user's own data.py, trainer/ and cluster.py in it

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        piped = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen([MANTA, *arguments], cwd=self.home, env=on_cpu, **piped, **options)

    def manta(self, *arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
        there = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment  # two ranks, on any machine
        return subprocess.run([MANTA, *arguments], cwd=self.home, env=there, capture_output=True, text=True, timeout=timeout, check=False)

    def train(self, run: str, *overrides: str, code: int = 0) -> subprocess.CompletedProcess:
        done = self.manta("train", str(self.file), f"run.dir={run}", *overrides)
        assert done.returncode == code, done.stderr
        return done


@pytest.fixture(scope="session")
def case(tmp_path_factory) -> Case:
    home = tmp_path_factory.mktemp("a user's") / "own work"
    (home / "trainer").mkdir(parents=True)
    for name in ("data.py", "trainer/__init__.py", "cluster.py", "launch.py", "manta.py"):
        (home / name).write_text("raise SystemExit('the user\\'s own file was imported')\n")
    library = Path(os.__file__).parent
    documents = home / "documents"
    documents.mkdir()
    for name in sorted(library.glob("[a-h]*.py")):
        (documents / name.with_suffix(".txt").name).write_text(name.read_text(), newline="\n")
    config = {
        "run": {"dir": "run", "seed": 5},
        "data": {"sources": ["documents/*.txt"], "sequence_length": 32, "validation": 0.1},
        "tokenizer": {"vocabulary": 512},
        "model": {"preset": "llama-tiny", "layers": 2, "width": 64, "mlp_width": 128},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 40, "global_batch": 8, "micro_batch": 4},
        "checkpoint": {"every_steps": 6},
        "evaluate": {"every_steps": 20, "samples": 16},
        "precision": "fp32",
        "cluster": {"ranks_per_node": 2, "hot_standby": False},  # most runs end before spares are warm
    }
    file = home / "run file.yaml"
    file.write_text(yaml.safe_dump(config))
    case = Case(file=file, home=home)
    done = case.manta("prepare", str(file))
    assert done.returncode == 0, done.stderr
    return case


@pytest.fixture(scope="session")
def undisturbed(case) -> str:
    """A run of the case's config as it is, done; to be looked at, and copied."""
    case.train("undisturbed")
    return "undisturbed"
