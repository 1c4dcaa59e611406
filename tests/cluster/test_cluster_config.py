"""The cluster section, log retention, and the private parts of Ray that manta uses."""

import math
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.cluster.config import ClusterConfig
from manta.cluster.supervise.controller import delete_expired_logs
from manta.data.errors import InputError
from manta.launch.config import validate

EXAMPLE = Path(__file__).parents[2] / "examples/gpt-tiny.yaml"


@pytest.mark.parametrize(("text", "seconds"), [("3:50:00", 13_800), ("0:00:15", 15), ("2-01:00:00", 176_400), (None, math.inf)])
def test_stop_after_is_hours_minutes_and_seconds(text, seconds):
    assert ClusterConfig(stop_after=text).stop_after_seconds == seconds
    for bad in ("90", "1:75:00", "10:00", "soon"):
        with pytest.raises(pydantic.ValidationError, match="hours:minutes:seconds"):
            ClusterConfig(stop_after=bad)


def test_every_key_is_described_and_bad_values_are_refused():
    assert all(field.description for field in ClusterConfig.model_fields.values())
    for nodes in (0, "8..2", "two", "2..", -1, 1.5):
        with pytest.raises(pydantic.ValidationError, match="nodes"):
            ClusterConfig.model_validate({"nodes": nodes})
    with pytest.raises(pydantic.ValidationError, match="step_timeout"):
        ClusterConfig.model_validate({"step_timeout": float("nan")})


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"HF_TOKEN": "geheim"}, "expected no secrets, because the run directory keeps them, got HF_TOKEN. Export it"),
        ({"AWS_SECRET_ACCESS_KEY": "geheim"}, "expected no secrets"),
        ({"wandb_api_key": "geheim"}, "expected no secrets"),
        ({"https_proxy": "http://me:geheim@proxy:3128"}, "expected no secrets, because the run directory keeps them, got https_proxy."),
        ({"A-B": "geheim"}, "expected names of letters, digits and _, got 'A-B'"),
        ({"NCCL_DEBUG": True}, "expected text for NCCL_DEBUG, got bool. Put the value in quotes."),
        ({"NCCL_DEBUG": ["geheim"]}, "expected text for NCCL_DEBUG, got list"),
        ({"A": "geheim\0"}, "expected text without NUL for A"),
        ({"RANK": "1"}, "expected variables that the run does not set or remove, got RANK (the run sets its own)"),
        ({"RAY_ADDRESS": "x"}, "got RAY_ADDRESS (Ray's: "),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "got CUDA_VISIBLE_DEVICES (it decides how many ranks a node has: export it there)"),
    ],
)
def test_variables_that_ranks_cannot_get_are_refused_and_no_value_is_repeated(variables, problem):
    tree = {"cluster": {"environment": variables}}
    with pytest.raises(InputError) as refused:
        validate({**yaml.safe_load(EXAMPLE.read_text()), **tree}, EXAMPLE, {})
    (message,) = [line for line in str(refused.value).splitlines() if "cluster" in line]
    assert "cluster.environment: expected" in message
    assert problem in message
    assert "geheim" not in str(refused.value)


def test_variables_may_have_names_that_contain_those_of_secrets():
    variables = {"TOKENIZERS_PARALLELISM": "false", "MONKEY": "1", "GOOGLE_APPLICATION_CREDENTIALS": "/a/file", "NCCL_IB_TC": 106}
    assert ClusterConfig.model_validate({"environment": variables}).environment == {**variables, "NCCL_IB_TC": "106"}


@settings(deadline=None)
@given(st.sets(st.integers(0, 12000), max_size=20), st.integers(1, 12000), st.integers(1, 30))
def test_logs_of_the_newest_attempts_are_kept(tmp_path_factory, numbers, attempt, keep):
    logs, others = tmp_path_factory.mktemp("logs"), {"controller.log", "attempt-0001.old", "attempts"}
    for name in {f"attempt-{number:04d}" for number in numbers} | others:
        (logs / name).mkdir()
    delete_expired_logs(logs, attempt=attempt, keep=keep)
    assert {entry.name for entry in logs.iterdir()} == {f"attempt-{number:04d}" for number in numbers if number > attempt - keep} | others


def test_ray_is_imported_only_by_a_run():
    code = "import sys, manta.cluster.config, manta.cluster.supervise.controller; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_private_parts_of_ray_exist():
    """private_ray.py and view.py use these and no other private part."""
    code = """
from ray._private import node, ray_constants, services, worker
from ray._private.state import state
import subprocess
assert issubclass(services.ConsolePopen, subprocess.Popen)
assert worker._worker_logs_enabled is True
assert services.resolve_ip_for_localhost("127.0.0.2") == "127.0.0.2"
assert all(callable(getattr(node.Node, name)) for name in ("start_monitor", "start_log_monitor", "start_api_server"))
assert callable(state.get_draining_nodes)
assert worker._global_node is None
assert "gcs_server" == ray_constants.PROCESS_TYPE_GCS_SERVER
"""
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
