"""Which ranks run on which nodes, what a node reports of itself, and which nodes are refused."""

import os
from pathlib import Path

import pytest

from manta.cluster.job import Job
from manta.cluster.machine import Machine, default_ranks, gpus, ignored_gpu_variables, parse_nvlink_domain, visible_gpus_problem
from manta.cluster.nodes import oom_kills
from manta.cluster.nodes.placement import NodeAllocation, PlacementError, place_ranks
from manta.cluster.nodes.report import NodeFacts
from manta.cluster.supervise.attempt import rank_environments, unfit_reason, version_differences


def machine(number, *, gpus=0, nvlink_domain="", cpus=8):
    address = f"10.0.0.{number}"
    return Machine(id=f"m{number}", host=f"h{number}", address=address, port=1, cpus=cpus, gpus=gpus, nvlink_domain=nvlink_domain)


def test_ranks_are_on_whole_nodes_with_neighbours_together():
    machines = [
        machine(10, gpus=8),
        machine(9, gpus=8, nvlink_domain="b"),
        machine(2, gpus=8),
        machine(3, gpus=8, nvlink_domain="b"),
        machine(1),
    ]
    placement = place_ranks(machines, max_nodes=4, sizes=(8, 16, 32), ranks_per_node=None)
    assert [(n.machine.id, n.ranks) for n in placement.nodes] == [("m2", 8), ("m10", 8), ("m3", 8), ("m9", 8)], "1 has no GPU"
    assert [n.machine.id for n in place_ranks(machines, max_nodes=3, sizes=(8, 16), ranks_per_node=None).nodes] == ["m2", "m10"]
    assert [n.ranks for n in place_ranks(machines, max_nodes=4, sizes=(12,), ranks_per_node=None).nodes] == [8, 4]
    assert place_ranks(machines, max_nodes=1, sizes=(16,), ranks_per_node=None) is None


def test_nodes_with_different_gpus_need_ranks_per_node():
    mixed = [machine(1, gpus=8), machine(2, gpus=4)]
    with pytest.raises(PlacementError, match="nodes differ in GPUs"):
        place_ranks(mixed, max_nodes=2, sizes=(8,), ranks_per_node=None)
    assert place_ranks(mixed, max_nodes=2, sizes=(4, 8), ranks_per_node=4).ranks == 8
    assert [n.machine.id for n in place_ranks(mixed, max_nodes=2, sizes=(4, 8), ranks_per_node=8).nodes] == ["m1"]


def test_ranks_are_numbered_along_the_nodes(tmp_path):
    job = Job(
        program=("x",),
        environment={},
        directory=tmp_path,
        sizes=(4, 5),
        environment_by_size={4: {"SIZE": "four"}, 5: {"SIZE": "five"}},
    )
    facts = [NodeFacts(host=f"h{n}", address=f"10.0.0.{n}", versions={}, directory_token="") for n in range(3)]
    nodes = [NodeAllocation(machine(n, cpus=2), ranks) for n, ranks in enumerate((2, 2, 1))]
    by_node = rank_environments(job, 7, nodes, facts, 1234)
    assert [[rank["RANK"] for rank in node] for node in by_node] == [["0", "1"], ["2", "3"], ["4"]]
    assert [[rank["LOCAL_RANK"] for rank in node] for node in by_node] == [["0", "1"], ["0", "1"], ["0"]]
    assert {rank["MASTER_ADDR"] for node in by_node for rank in node} == {"10.0.0.0"}
    assert {rank["SIZE"] for node in by_node for rank in node} == {"five"}
    assert by_node[2][0]["LOCAL_WORLD_SIZE"] == "1"


def test_hidden_gpus_do_not_count(monkeypatch):
    several = [("0,1", 2), (" 3 , 1", 2), ("GPU-4f2c", 1), ("GPU-4f,GPU-a2", 2), ("MIG-0e", 1), ("0,-1,1", 1), ("0,1,", 2)]
    for visible, count in [("", 0), ("-1", 0), ("NoDevFiles", 0), *several]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus() == count
        assert visible_gpus_problem() is None
        assert default_ranks() == (count or min(2, len(os.sched_getaffinity(0))))


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0,0", "each GPU once"),
        ("GPU-4f,GPU-4f", "each GPU once"),
        ("0,4", "numbers from 0 to 3"),
        ("9" * 5000, "numbers of GPUs, or their UUIDs"),
        ("0,GPU-4f", "numbers from 0 to 3"),
        ("all", "numbers of GPUs, or their UUIDs"),
        ("cuda:0", "numbers of GPUs, or their UUIDs"),
        ("0;1", "numbers of GPUs, or their UUIDs"),
        ("MIG-a,MIG-b", "one MIG device, because CUDA shows a process no more"),
    ],
)
def test_gpus_that_cuda_would_ignore_are_refused(visible, expected, tmp_path, monkeypatch):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setattr("manta.cluster.machine.DEVICES", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    problem = visible_gpus_problem()
    assert problem.startswith(f"CUDA_VISIBLE_DEVICES: expected {expected}, got ")
    assert len(problem) < 400


def test_variables_that_select_no_gpus_here_are_reported(tmp_path, monkeypatch):
    for name in ("nvidia0", "nvidia1"):
        (tmp_path / name).touch()
    monkeypatch.setattr("manta.cluster.machine.DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for value, is_reported in (("0", True), ("all", False), ("void", False), ("GPU-4f,GPU-a2", False), ("0,1", False)):
        monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", value)
        assert bool(ignored_gpu_variables()) == is_reported
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1")
    expected = "ROCR_VISIBLE_DEVICES has no effect here: 2 GPUs are visible. To choose among them, set CUDA_VISIBLE_DEVICES."
    assert ignored_gpu_variables() == [expected]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert ignored_gpu_variables() == []


def test_an_nvlink_domain_is_read_from_nvidia_smi():
    report = "    Fabric\n        State : Completed\n        CliqueId                          : 7\n        ClusterUUID"
    domain = parse_nvlink_domain(f"{report}                       : 50000000-0000-0000-0000-000000000003\n")
    assert domain == "50000000-0000-0000-0000-000000000003-7"
    assert parse_nvlink_domain(f"{report}                       : 00000000-0000-0000-0000-000000000000\n") == ""
    assert parse_nvlink_domain("no such report") == ""


def test_a_node_with_another_directory_or_manta_is_refused(tmp_path):
    job = Job(program=("x",), environment={}, directory=tmp_path, sizes=(1,), packages=(("manta", "1.0"), ("torch", "2.13")))
    job.directory_token.write_text("a token")
    same = {"host": "h", "address": "10.0.0.1", "directory_token": "a token"}
    fit = {**same, "versions": {"manta": "1.0", "torch": "2.12"}}
    assert unfit_reason(job, fit) is None
    assert version_differences(job, fit) == ["torch 2.12 (here 2.13)"]
    assert "expected a directory that all nodes share, got one that h (10.0.0.1) does not see" in unfit_reason(
        job, {**fit, "directory_token": "another"}
    )
    assert "expected manta 1.0, as on this machine, got None" in unfit_reason(job, {**fit, "versions": {"torch": "2.13"}})


def test_out_of_memory_kills_are_counted_in_any_cgroup_layout(tmp_path, monkeypatch):
    groups = "4:cpu:/a\n3:memory:/a/b\n0::/a/b\n"
    monkeypatch.setattr(oom_kills, "CGROUPS", tmp_path)
    assert oom_kills.counter_files(groups)[0] == tmp_path / "memory/a/b/memory.oom_control"
    assert oom_kills.counter_files("0::/a/b\n") == [tmp_path / "a/b/memory.events", tmp_path / "memory.events"]
    assert oom_kills.count_oom_kills() == 0, "there is no counter"
    for file in (*oom_kills.counter_files(groups), *oom_kills.counter_files(Path("/proc/self/cgroup").read_text())):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("low 0\noom 3\noom_kill 2\n")
    assert oom_kills.count_oom_kills() == 2
