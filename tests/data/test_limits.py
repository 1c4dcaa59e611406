"""The limits of a user, a process and a container: open files, processes, cores."""

import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import MANTA
from small_corpora import documents, write_lines

from manta.data.cores import cores

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make control groups")
READ = """
import sys
import numpy as np
from pathlib import Path
from manta.data.config import CacheConfig
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.shard import ShardWriter, dtype_for
from manta.data.shards.windows import TokenStream

home, shards = CorpusDirectory(sys.argv[1], CacheConfig()), []
for number in range(300):
    with ShardWriter(Path(home.root, str(number)), dtype_for(400)) as writer:
        writer.extend(np.arange(100), np.array([100]), 0)
        shards.append(writer.commit())
streams = [TokenStream(home, shards[first : first + 5]) for first in range(0, 300, 5)]
for _ in range(2):
    for stream in streams:
        assert (stream.gather(np.arange(0, 500, 100), 100) == np.arange(100)).all()
"""


@pytest.mark.parametrize(("soft", "hard"), [(64, 1024), (64, 64)])
def test_more_shards_are_read_than_files_may_be_open(tmp_path, soft, hard):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    subprocess.run([sys.executable, "-c", READ, tmp_path], check=True, preexec_fn=limit, timeout=60)


def write_config(folder: Path, sources: int, files: int) -> None:
    for number in range(sources):
        (folder / f"source-{number}").mkdir()
        for file in range(files):
            write_lines(folder / f"source-{number}" / f"{file}.jsonl", documents(3, seed=100 * number + file))
    names = [f"source-{number}" for number in range(sources)]
    paths, weights = ", ".join(f"{name}: {name}" for name in names), ", ".join(f"{name}: 1" for name in names)
    (folder / "run.yaml").write_text(
        f"run: {{dir: run}}\ndata:\n  sources: {{{paths}}}\n  mixture: {{{weights}}}\n  sequence_length: 16\n  validation: 0.1\n"
        "tokenizer: {vocabulary: 400, train_bytes: 100000}\nmodel: {preset: llama-tiny}\n"
        "train: {steps: 2, global_batch: 8, micro_batch: 4}\n"
    )


@pytest.mark.slow
def test_a_mixture_of_many_sources_is_prepared_and_read_with_few_open_files(tmp_path):
    write_config(tmp_path, sources=100, files=4)
    read = (
        "import numpy as np; from pathlib import Path; from manta.launch.config import load\n"
        "from manta.data.sampling.samples import Samples; from manta.data.prepare.prepare import find_prepared\n"
        "c = load(Path('run.yaml'), [])\n"
        "s = Samples(find_prepared(c.data, c.tokenizer), c.data, c.tokenizer, seed=1)\n"
        "for first in range(0, 4000, 100): s.train(np.arange(first, first + 100))"
    )
    for command in ([MANTA, "prepare", "run.yaml"], [sys.executable, "-c", read]):
        limit = (resource.RLIMIT_NOFILE, (256, 256))
        subprocess.run(command, cwd=tmp_path, check=True, preexec_fn=lambda: resource.setrlimit(*limit))  # noqa: B023


@contextmanager
def control_group(controller: str, **settings: int):
    """Yield a function that puts the calling process into a control group with these settings."""
    group = Path(f"/sys/fs/cgroup/{controller}/manta-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        pytest.skip(f"no control groups of {controller}, version 1")
    try:
        for name, value in settings.items():
            (group / f"{controller}.{name}").write_text(str(value))
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        deadline = time.monotonic() + 20
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:  # of a process that has just died
            time.sleep(0.05)
        group.rmdir()


@pytest.mark.root
@needs_root
def test_a_cpu_quota_limits_the_default_workers():
    command = [sys.executable, "-c", "from manta.data.cores import cores; print(cores())"]
    with control_group("cpu", cfs_period_us=100_000, cfs_quota_us=50_000) as join:
        assert subprocess.run(command, check=True, capture_output=True, preexec_fn=join).stdout == b"1\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 99),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 99),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/not/visible\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/x\n", "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "-1"}, 99),
        ({"proc/self/cgroup": "garbage"}, 99),
    ],
)
def test_the_quota_of_any_kind_of_control_group_counts(tmp_path, monkeypatch, files, expected):
    """As containers show them; this machine has one kind."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(99))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cores(tmp_path) == expected


@pytest.mark.root
@needs_root
@pytest.mark.slow
def test_a_limit_of_processes_ends_prepare_in_one_line_or_not_at_all(tmp_path):
    write_config(tmp_path, sources=1, files=8)
    for most in (2, 3, 5, 6, 8, 10, 40):
        with control_group("pids", max=most) as join:
            command = [MANTA, "prepare", "run.yaml", "data.workers=4"]
            done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, preexec_fn=join, timeout=120)
        assert done.returncode in {0, 1}, done.stderr
        assert done.stderr.splitlines()[-1].startswith("prepared " if done.returncode == 0 else "manta: "), done.stderr  # after libraries'
    assert subprocess.run([MANTA, "prepare", "run.yaml"], cwd=tmp_path, check=False).returncode == 0
