"""One run that loses a rank by every means, one after the other, and is done in the end."""

import os
import signal
import stat
import time
from pathlib import Path

import pytest
from cluster_scene import Scene

HOSTILE = ["ray.py", "manta.py", "pydantic.py", "psutil.py", "json.py", "data.py", "cluster.py"]
RAISE, KILL, STOP, SEGV = 1, 2, 3, 4  # the attempt in which each strikes
LOST, LAST = 5, 6
RAYLET = "/raylet --"  # its path may hold a space


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Each attempt gets further than the one before, so none waits. The second lives for two seconds: time for another agent to come up."""
    root = tmp_path_factory.mktemp("faults")
    cwd = root / "hostile"
    cwd.mkdir()
    for name in HOSTILE:
        (cwd / name).write_text(f"raise SystemExit('shadowed by {name}')")
    faults = [[8, [[RAISE], 0], "raise"], [80, [[KILL], 1], "SIGKILL"], [90, [[STOP], 1], "SIGSTOP"], [130, [[SEGV], 0], "SIGSEGV"]]
    plan = {"every": 40, "steps": 270, "step_time": 0.05, "warm_time": 0.3, "faults": faults, "slow": [1, 220, 270]}
    scene = Scene(root / "run", plan, cluster={"step_timeout": 1.0}, cwd=cwd)
    yield scene
    scene.close()


@pytest.fixture(scope="module")
def secrets(scene):
    """The token, looked at while the run is under way, and where it was seen that it should not be."""
    scene.event("first-step")
    scratch = Path(scene.rank_environment()["MANTA_HEARTBEAT"]).parents[1]
    token = (scratch / "token").read_text()
    seen = [pid for pid in scene.processes() for name in ("cmdline", "environ") if token in Path(f"/proc/{pid}/{name}").read_text()]
    return scratch, stat.S_IMODE((scratch / "token").stat().st_mode), stat.S_IMODE(scratch.stat().st_mode), token, seen


@pytest.fixture(scope="module")
def spares(scene):
    """Which processes there are after the second attempt's first step, in the end."""
    scene.event("first-step", KILL)
    return all_four(scene)


def all_four(scene, within=1.8):
    """Two ranks and two spares, where these come in time."""
    deadline = time.monotonic() + within
    while len(found := scene.ranks()) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def raylet(scene):
    scene.event("first-step")
    return next(command for command in scene.processes().values() if RAYLET in command)


@pytest.fixture(scope="module")
def living(scene, secrets, raylet, spares):
    """Ranks and spares when the agent, too, is lost."""
    del secrets, raylet, spares
    scene.event("first-step", LOST)
    found = all_four(scene)
    os.kill(scene.agent(LOST), signal.SIGKILL)
    return found


@pytest.fixture(scope="module")
def ended(scene, living):
    """Then the run goes on to its end."""
    del living
    return scene.end(), scene.events()


def of(events, kind, attempt):
    (event,) = [event for event in events if (event["event"], event["attempt"]) == (kind, attempt)]
    return event


def test_the_run_is_done_in_spite_of_all(ended, scene):
    code, events = ended
    assert code == 0, scene.output()
    assert events[-1]["event"] == "run-ended"
    assert of(events, "attempt-stopped", LAST)["outcome"] == "done"
    assert scene.output() == ""


def test_ranks_start_within_seconds(ended):
    _, events = ended
    assert of(events, "attempt-started", 1)["time"] - of(events, "run-started", 0)["time"] < 10  # 3 to 4.3 s, alone on two cores


def test_a_killed_rank_is_named_noticed_and_replaced_at_once(ended):
    _, events = ended
    failed = of(events, "rank-failed", KILL)
    assert (failed["rank"], failed["code"], failed["message"], failed["step"]) == (1, -signal.SIGKILL, "killed by SIGKILL", 80)
    assert failed["noticed_after"] < 0.5
    assert of(events, "attempt-started", KILL + 1)["time"] - failed["time"] < 0.4
    assert of(events, "first-step", KILL + 1)["time"] - failed["time"] < 1.0


def test_spares_stand_ready_after_the_first_step(spares, scene):
    """Two ranks and two spares; the spares become the next attempt's ranks."""
    assert len(spares) == 4
    assert set(scene.pids(KILL)) | set(scene.pids(KILL + 1)) == spares


def test_a_stopped_rank_is_a_hang_and_all_stacks_are_kept(ended, scene):
    _, events = ended
    failed = of(events, "rank-failed", STOP)
    assert (failed["cause"], failed["rank"]) == ("HANG", 1)
    assert "stopped" in failed["message"]
    assert "most recent call first" in scene.log(STOP, 0)  # a stopped process can not write its own


def test_a_segfault_is_named(ended):
    _, events = ended
    assert of(events, "rank-failed", SEGV)["message"] == "killed by SIGSEGV"


def test_an_exception_is_told_with_its_traceback(ended):
    _, events = ended
    failed = of(events, "rank-failed", RAISE)
    assert failed["message"] == "RuntimeError: a loss of nan"
    assert "cluster_fake_rank.py" in failed["traceback"]


def test_a_slow_rank_is_told_of_once_with_its_node_and_the_run_goes_on(ended):
    _, events = ended
    told = of(events, "rank-slow", LAST)
    assert (told["rank"], told["times"], told["work"], told["median"]) == (1, 2.0, 0.4, 0.2)
    assert told["node"] == of(events, "node-ready", 1)["host"]
    assert 220 < told["step"] <= 270
    assert [event["attempt"] for event in events if event["event"] == "rank-slow"] == [LAST]


def test_a_lost_agent_is_replaced_by_one_that_has_the_spares(ended, living, scene):
    _, events = ended
    lost = of(events, "node-lost", LOST)
    assert (lost["node"], lost["suspect"]) == (0, False)
    assert of(events, "node-ready", LAST)["node"] == 0
    assert set(scene.pids(LOST)) | set(scene.pids(LAST)) == living
    assert of(events, "first-step", LAST)["time"] - lost["time"] < 1.0


@pytest.mark.usefixtures("ended")
def test_the_token_is_the_runs_own_and_in_no_argument_environment_or_log(secrets, scene):
    scratch, token_mode, folder_mode, token, seen = secrets
    assert (token_mode, folder_mode) == (0o600, 0o700)
    assert seen == []
    assert all(token not in path.read_text() for path in scene.directory.rglob("*.*") if path.is_file())
    assert not scratch.exists()


@pytest.mark.usefixtures("ended")
def test_ranks_get_their_place_and_nothing_of_ray(scene):
    place = scene.rank_environment(KILL, 1)
    assert {name: place[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MANTA_ATTEMPT")} == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MANTA_ATTEMPT": str(KILL),
    }
    assert place["GLOO_SOCKET_IFNAME"] == place["NCCL_SOCKET_IFNAME"] == "lo"
    assert place["CUDA_VISIBLE_DEVICES"] == "0,1"  # Ray hides all GPUs from an actor that asks for none
    assert [name for name in place if name.startswith("RAY_")] == []
    assert place["MASTER_PORT"] == scene.rank_environment(KILL, 0)["MASTER_PORT"]


def test_ray_keeps_to_the_loopback(raylet):
    """A laptop that changes networks loses its outward address."""
    assert "--node_ip_address=127.0.0.1 " in raylet


@pytest.mark.slow
def test_ray_itself_is_started_anew_when_it_is_lost(tmp_path):
    """It takes Ray about 13 s to believe it. Meanwhile no rank of the old attempt may live on."""
    scene = Scene(tmp_path / "run", {"steps": 60, "step_time": 0.05})
    try:
        old = set(scene.pids())
        scene.event("first-step")
        raylet = min(pid for pid, command in scene.processes().items() if RAYLET in command)  # one that it forks is called so, for a moment
        os.kill(raylet, signal.SIGKILL)
        scene.event("node-lost")
        time.sleep(0.5)
        assert not old & scene.ranks()
        assert scene.end(within=90) == 0
    finally:
        scene.close()
