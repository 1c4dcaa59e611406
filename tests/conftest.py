"""Fixtures that several test files share: a small corpus, a small config, and the `manta` command as a user types it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from mounts import mounted, mounted_with_quota

# Child processes inherit ignored signals. Under nohup, or in the background, tests would otherwise wait for ever.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
MANTA = Path(sys.executable).with_name("manta")


@dataclass(frozen=True)
class Workspace:
    """A user's working directory, with the config of a small run over a small corpus that is already prepared."""

    config_file: Path
    directory: Path  # its path contains a space; it also holds the user's own data.py, trainer/ and cluster.py

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen([MANTA, *arguments], cwd=self.directory, env=environment, **pipes, **options)

    def manta(self, *arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
        variables = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment  # without GPUs there are two ranks on any machine
        # The umask is the worst that a user can have.
        options = {"capture_output": True, "text": True, "timeout": timeout, "umask": 0}
        return subprocess.run([MANTA, *arguments], cwd=self.directory, env=variables, check=False, **options)

    def train(self, run: str, *overrides: str, code: int = 0) -> subprocess.CompletedProcess:
        result = self.manta("train", str(self.config_file), f"run.dir={run}", *overrides)
        assert result.returncode == code, result.stderr
        return result


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    directory = tmp_path_factory.mktemp("a user's") / "own work"
    (directory / "trainer").mkdir(parents=True)
    for name in ("data.py", "trainer/__init__.py", "cluster.py", "launch.py", "manta.py"):
        (directory / name).write_text("raise SystemExit('the user\\'s own file was imported')\n")
    library = Path(os.__file__).parent
    documents = directory / "documents"
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
        "track": {"tensorboard": False},  # most tests are about something else, and their machines have few cores
        "precision": "fp32",
        "cluster": {"ranks_per_node": 2, "hot_standby": False},  # most runs end before a standby process is ready
    }
    file = directory / "run file.yaml"
    file.write_text(yaml.safe_dump(config))
    workspace = Workspace(config_file=file, directory=directory)
    result = workspace.manta("prepare", str(file))
    assert result.returncode == 0, result.stderr
    return workspace


@pytest.fixture(scope="session")
def finished_run(workspace) -> str:
    """The name of a finished run of the workspace's config. Tests read and copy it, and never change it."""
    workspace.train("finished")
    return "finished"


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 2 MB."""
    yield from mounted(tmp_path / "disk", "size=2m")


@pytest.fixture
def quota(tmp_path) -> Iterator[Path]:
    """A file system with a quota of 2 MB, of which half is used."""
    for path in mounted_with_quota(tmp_path / "quota"):
        (path / "filler").write_bytes(bytes(1 << 20))
        yield path


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that every user can reach. pytest's own are private, and each session of pytest makes them so again."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)
