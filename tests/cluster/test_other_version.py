"""A node that has another version of manta is named and refused, even if that version cannot start an agent."""

import shlex
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from fake_run import FakeRun

import manta.cluster


@pytest.mark.parametrize(
    "change", ["none", pytest.param("arguments", marks=pytest.mark.slow), pytest.param("module", marks=pytest.mark.slow)]
)
def test_a_node_with_another_version_is_named(tmp_path, monkeypatch, change):
    other = tmp_path / "other"
    shutil.copytree(Path(manta.cluster.__file__).parent, other / "manta/cluster", ignore=shutil.ignore_patterns("__pycache__"))
    (other / "manta/__init__.py").touch()
    (other / "manta-9.9.dist-info").mkdir()
    (other / "manta-9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: manta\nVersion: 9.9\n")
    agent = other / "manta/cluster/nodes/agent.py"
    match change:
        case "arguments":
            agent.write_text(agent.read_text().replace("host_ranks", "ranks_on_host"))
        case "module":
            agent.rename(agent.with_name("another.py"))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(other))} exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o700)
    monkeypatch.setenv("OTHER_PYTHON", str(python))
    run = FakeRun(tmp_path / "run", {"steps": 3}, cluster={"nodes": 2}, sizes=(4,))
    try:
        unfit = run.event("node-unfit", attempt=1, within=90)
        assert f"(127.0.0.4): expected manta {version('manta')}, as on this machine, got 9.9. Install it there." in unfit["message"]
        assert run.end(within=60) == 2
        assert not [event for event in run.events() if event["event"] in {"attempt-started", "node-lost"}]
    finally:
        run.close()
