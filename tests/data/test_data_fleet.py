"""A preparation on many machines: raylets of a real cluster, one of which may be lost on the way."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpora import SMALL, config, content, documents, write_lines
from test_data_prepare import Deadly, piece_of, task

from manta.data.errors import InputError
from manta.data.prepare import prepare
from manta.data.prepare.encode import encode
from manta.data.prepare.ray_pool import run_on_ray

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
    folder = tmp_path_factory.mktemp("source")
    for part in range(12):
        write_lines(folder / f"{part:02d}.jsonl", documents(100, seed=part))
    return folder


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Address of a token-locked cluster of two nodes, and the second one's raylet."""
    token = tmp_path / "token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    checks = {"period_ms": "500", "timeout_ms": "1000", "failure_threshold": "3"}
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} | {
        f"RAY_health_check_{key}": value for key, value in checks.items()
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    told = tmp_path / "address"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the nodes find what a test sends them
    process = subprocess.Popen([sys.executable, "-c", CLUSTER, str(told)], stdin=subprocess.PIPE)
    while not (told.exists() and told.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    address, raylet = told.read_text().split()
    yield address, int(raylet)
    process.communicate(timeout=60)


def prepare_in_a_process(directory: Path, lines: Path, address: str | None) -> None:
    prepare.prepare(config(directory, lines, ray=address), SMALL)


@pytest.mark.slow
def test_many_machines_write_the_same_bytes_as_one(cluster, lines, tmp_path):
    address, _ = cluster
    here = prepare.prepare(config(tmp_path / "here", lines), SMALL)
    there = prepare.prepare(config(tmp_path / "there", lines, ray=address), SMALL)
    assert content(there) == content(here)
    assert there.fingerprint == here.fingerprint
    bad = piece_of(lines / "03.jsonl")
    target = tmp_path / "deadly"
    target.mkdir()
    with pytest.raises(RuntimeError, match=rf"near {lines}/03\.jsonl: line 38: a process died of it \(SIGSEGV\)"):
        list(run_on_ray(encode, [task(Deadly(bad, signal.SIGSEGV), here, target)], address))


def test_an_address_without_a_cluster_is_told():
    with pytest.raises(InputError, match=r"data\.ray_address: got '127\.0\.0\.1:1' .*, wants the address of a running Ray cluster"):
        list(run_on_ray(encode, [None], "127.0.0.1:1"))


@pytest.mark.slow
def test_a_piece_whose_node_is_lost_is_done_by_another(cluster, lines, tmp_path):
    address, raylet = cluster
    here = prepare.prepare(config(tmp_path / "here", lines), SMALL)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=prepare_in_a_process, args=(tmp_path / "there", lines, address))
    process.start()
    while len(list((tmp_path / "there").glob("*/piece-*.json"))) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(raylet, signal.SIGKILL)
    process.join(timeout=120)
    assert process.exitcode == 0
    assert content(prepare.find(config(tmp_path / "there", lines), SMALL)) == content(here)
