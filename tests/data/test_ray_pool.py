"""Preparation on a Ray cluster of two nodes, one of which may be lost."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_corpora import SMALL, config, content, write_source
from split_tasks import DeadlySplit, first_split, task_of

from manta.data.errors import InputError
from manta.data.prepare import prepare
from manta.data.prepare.encode import encode_split
from manta.data.prepare.pool import run_on_ray

CLUSTER = """
import sys
from pathlib import Path
from threading import Thread
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.2")
Path(sys.argv[1]).write_text(cluster.address + " " + str(second.all_processes["raylet"][0].process.pid))
Thread(target=second.all_processes["raylet"][0].process.wait, daemon=True).start()
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Yield the address of a cluster of two nodes that requires a token, and the raylet of the second."""
    token = tmp_path / "token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    checks = {"period_ms": "500", "timeout_ms": "1000", "failure_threshold": "3"}
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} | {
        f"RAY_health_check_{key}": value for key, value in checks.items()
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "address"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the modules of pickled tests
    process = subprocess.Popen([sys.executable, "-c", CLUSTER, str(file)], stdin=subprocess.PIPE)
    while not (file.exists() and file.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    address, raylet = file.read_text().split()
    yield address, int(raylet)
    process.communicate(timeout=60)


def prepare_in_a_process(directory: Path, lines: Path, address: str | None) -> None:
    prepare.prepare(config(directory, lines, ray_address=address), SMALL)


@pytest.mark.slow
def test_a_ray_cluster_writes_the_same_bytes_as_one_machine(cluster, lines, tmp_path):
    address, _ = cluster
    local = prepare.prepare(config(tmp_path / "local", lines), SMALL)
    remote = prepare.prepare(config(tmp_path / "remote", lines, ray_address=address), SMALL)
    assert content(remote) == content(local)
    assert remote.fingerprint == local.fingerprint
    deadly = DeadlySplit(first_split(lines / "03.jsonl"), signal.SIGSEGV)
    target = tmp_path / "deadly"
    target.mkdir()
    with pytest.raises(RuntimeError, match=rf"near {lines}/03\.jsonl: line 38: a process died \(SIGSEGV\)"):
        list(run_on_ray(encode_split, [task_of(deadly, local, target)], address))


def test_an_address_without_a_cluster_is_refused():
    with pytest.raises(InputError, match=r"data\.ray_address: expected the address of a running Ray cluster.*, got '127\.0\.0\.1:1' "):
        list(run_on_ray(encode_split, [None], "127.0.0.1:1"))


@pytest.mark.slow
def test_splits_of_a_lost_node_are_done_by_another(cluster, lines, tmp_path):
    address, raylet = cluster
    local = prepare.prepare(config(tmp_path / "local", lines), SMALL)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=prepare_in_a_process, args=(tmp_path / "remote", lines, address))
    process.start()
    while len(list((tmp_path / "remote").glob("*/piece-*.json"))) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(raylet, signal.SIGKILL)
    process.join(timeout=120)
    assert process.exitcode == 0
    assert content(prepare.find_prepared(config(tmp_path / "remote", lines), SMALL)) == content(local)
