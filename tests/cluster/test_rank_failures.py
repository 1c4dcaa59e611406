"""One run that loses a rank in every way, one after the other, and finishes."""

import os
import signal
import stat
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from fake_run import FakeRun

HOSTILE = ["ray.py", "manta.py", "pydantic.py", "psutil.py", "json.py", "data.py", "cluster.py"]
RAISE, KILL, STOP, SEGV = 1, 2, 3, 4  # the attempt in which each fault happens
AGENT_LOST, LAST = 5, 6
RAYLET = "/raylet --"  # its path may hold a space
LEFT_BY_OTHERS = {
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_ERROR_FILE": "/dev/full",
    "GROUP_RANK": "3",
    "ROLE_NAME": "x",
    "RANK": "7",
    "WORLD_SIZE": "9",
    "MASTER_ADDR": "10.9.9.9",
    "MASTER_PORT": "tcp://10.0.0.1:80",
    "PET_NNODES": "2",
    "OMPI_COMM_WORLD_RANK": "3",
    "PMI_RANK": "1",
    "PMIX_RANK": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "NCCL_COMM_ID": "10.9.9.9:1",
    "MANTA_LAYOUT": "{}",
    "RAY_ADDRESS": "10.9.9.9:6379",
    "RAY_AUTH_TOKEN": "none",
    "RAY_RUNTIME_ENV_HOOK": "no.such.hook",
}
KEPT = {"NCCL_SOCKET_IFNAME": "^nosuch0", "OMP_NUM_THREADS": "3", "SLURM_JOB_ID": "12"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Each attempt gets further than the one before, so none waits. The second lasts two seconds, in which a standby agent starts."""
    root = tmp_path_factory.mktemp("faults")
    cwd = root / "hostile"
    cwd.mkdir()
    for name in HOSTILE:
        (cwd / name).write_text(f"raise SystemExit('shadowed by {name}')")
    faults = [[8, [[RAISE], 0], "raise"], [80, [[KILL], 1], "SIGKILL"], [90, [[STOP], 1], "SIGSTOP"], [130, [[SEGV], 0], "SIGSEGV"]]
    plan = {"every": 40, "steps": 270, "step_time": 0.05, "warm_time": 0.3, "faults": faults, "slow": [1, 220, 270]}
    with patch.dict(os.environ, LEFT_BY_OTHERS | KEPT | {"NCCL_DEBUG": "WARN"}):
        environment = {"NCCL_DEBUG": "INFO", "LD_LIBRARY_PATH": "/opt/lib", "NCCL_IB_DISABLE": 1}
        run = FakeRun(root / "run", plan, cluster={"step_timeout": 1.0, "environment": environment}, cwd=cwd)
    yield run
    run.close()


@pytest.fixture(scope="module")
def secrets(run):
    """The token, its permissions, and the processes in whose arguments or environment it was visible during the run."""
    run.event("first-step")
    scratch = Path(run.rank_environment()["MANTA_HEARTBEAT"]).parents[1]
    token = (scratch / "token").read_text()
    visible = [pid for pid in run.processes() for name in ("cmdline", "environ") if token in Path(f"/proc/{pid}/{name}").read_text()]
    return scratch, stat.S_IMODE((scratch / "token").stat().st_mode), stat.S_IMODE(scratch.stat().st_mode), token, visible


@pytest.fixture(scope="module")
def standby(run):
    """Ranks and standby processes after the second attempt's first step."""
    run.event("first-step", KILL)
    return all_four(run)


def all_four(run, within=1.8):
    """Wait for two ranks and two standby processes."""
    deadline = time.monotonic() + within
    while len(processes := run.ranks()) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    return processes


@pytest.fixture(scope="module")
def raylet(run):
    run.event("first-step")
    return next(command for command in run.processes().values() if RAYLET in command)


@pytest.fixture(scope="module")
def alive(run, secrets, raylet, standby):
    """Ranks and standby processes when the agent is killed."""
    del secrets, raylet, standby
    run.event("first-step", AGENT_LOST)
    processes = all_four(run)
    os.kill(run.agent(AGENT_LOST), signal.SIGKILL)
    return processes


@pytest.fixture(scope="module")
def ended(run, alive):
    """Exit code and events of the run."""
    del alive
    return run.end(), run.events()


def event_of(events, kind, attempt):
    (event,) = [event for event in events if (event["event"], event["attempt"]) == (kind, attempt)]
    return event


def test_the_run_finishes_after_all_faults(ended, run):
    code, events = ended
    assert code == 0, run.output()
    assert events[-1]["event"] == "run-ended"
    assert event_of(events, "attempt-stopped", LAST)["outcome"] == "done"
    assert run.output() == ""


def test_ranks_start_within_seconds(ended):
    _, events = ended
    assert event_of(events, "attempt-started", 1)["time"] - event_of(events, "run-started", 0)["time"] < 10  # 3 to 4.3 s on two idle cores


def test_a_killed_rank_is_named_and_replaced_at_once(ended):
    _, events = ended
    failed = event_of(events, "rank-failed", KILL)
    assert (failed["rank"], failed["code"], failed["message"], failed["step"]) == (1, -signal.SIGKILL, "killed by SIGKILL", 80)
    assert failed["noticed_after"] < 0.5
    assert event_of(events, "attempt-started", KILL + 1)["time"] - failed["time"] < 0.4
    assert event_of(events, "first-step", KILL + 1)["time"] - failed["time"] < 1.0


def test_standby_processes_become_the_next_attempts_ranks(standby, run):
    """There are two after the first step, beside the two ranks."""
    assert len(standby) == 4
    assert set(run.pids(KILL)) | set(run.pids(KILL + 1)) == standby


def test_a_stopped_rank_is_a_hang_and_stacks_are_logged(ended, run):
    _, events = ended
    failed = event_of(events, "rank-failed", STOP)
    assert (failed["cause"], failed["rank"]) == ("HANG", 1)
    assert "stopped" in failed["message"]
    assert "most recent call first" in run.log(STOP, 0)  # a stopped process can not write its own


def test_a_segfault_is_named(ended):
    _, events = ended
    assert event_of(events, "rank-failed", SEGV)["message"] == "killed by SIGSEGV"


def test_an_exception_is_reported_with_its_traceback(ended):
    _, events = ended
    failed = event_of(events, "rank-failed", RAISE)
    assert failed["message"] == "RuntimeError: a loss of nan"
    assert "fake_rank.py" in failed["traceback"]


def test_a_straggler_is_reported_once_with_its_node(ended):
    _, events = ended
    event = event_of(events, "rank-slow", LAST)
    assert (event["rank"], event["ratio"], event["work"], event["median"]) == (1, 2.0, 0.4, 0.2)
    assert event["node"] == event_of(events, "node-ready", 1)["host"]
    assert 220 < event["step"] <= 270
    assert [event["attempt"] for event in events if event["event"] == "rank-slow"] == [LAST]


def test_a_lost_agent_is_replaced_by_the_standby_agent(ended, alive, run):
    _, events = ended
    lost = event_of(events, "node-lost", AGENT_LOST)
    assert (lost["node"], lost["suspect"]) == (0, False)
    assert event_of(events, "node-ready", LAST)["node"] == 0
    assert set(run.pids(AGENT_LOST)) | set(run.pids(LAST)) == alive
    assert event_of(events, "first-step", LAST)["time"] - lost["time"] < 1.0


@pytest.mark.usefixtures("ended")
def test_the_token_is_in_no_argument_environment_or_log(secrets, run):
    scratch, token_mode, folder_mode, token, visible = secrets
    assert (token_mode, folder_mode) == (0o600, 0o700)
    assert visible == []
    assert all(token not in path.read_text() for path in run.directory.rglob("*.*") if path.is_file())
    assert not scratch.exists()


@pytest.mark.usefixtures("ended")
def test_ranks_get_their_variables_and_none_of_rays(run):
    environment = run.rank_environment(KILL, 1)
    assert {
        name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MANTA_ATTEMPT")
    } == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MANTA_ATTEMPT": str(KILL),
    }
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"  # Ray hides all GPUs from an actor that reserves none
    assert [name for name in environment if name.startswith("RAY_")] == []
    assert environment["MASTER_PORT"] == run.rank_environment(KILL, 0)["MASTER_PORT"]


def test_ray_on_one_node_uses_the_loopback(raylet):
    """A laptop that changes networks loses its outward address."""
    assert "--node_ip_address=127.0.0.1 " in raylet


@pytest.mark.slow
def test_a_lost_ray_is_started_again(tmp_path):
    """Ray notices it after about 13 s. Meanwhile no rank of the old attempt may survive."""
    run = FakeRun(tmp_path / "run", {"steps": 60, "step_time": 0.05})
    try:
        old = set(run.pids())
        run.event("first-step")
        raylet = min(pid for pid, command in run.processes().items() if RAYLET in command)  # a fork has its name for a moment
        os.kill(raylet, signal.SIGKILL)
        run.event("node-lost")
        time.sleep(0.5)
        assert not old & run.ranks()
        assert run.end(within=90) == 0
    finally:
        run.close()


def test_what_others_left_in_the_environment_is_removed_and_what_the_user_set_is_kept(run):
    run.event("first-step")
    environment = run.rank_environment()
    left = LEFT_BY_OTHERS.keys() - {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert not left & environment.keys()
    assert not [name for name in environment if name.startswith(("RAY_", "TORCHELASTIC_"))]
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("0", "2", "127.0.0.1")
    assert environment["MASTER_PORT"].isdecimal()
    assert KEPT.items() <= environment.items()
    assert {"NCCL_DEBUG": "INFO", "LD_LIBRARY_PATH": "/opt/lib", "NCCL_IB_DISABLE": "1"}.items() <= environment.items()
