"""Ray cannot start, or starts late: a line says what is wrong and what to do. Private mounts and networks make a machine like that."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import MANTA
from mounts import read_only_tmp
from run_process import RunProcess, until

SHORT = ("train.steps=3", "checkpoint.every_steps=100", "evaluate.every_steps=100")
NO_LOOPBACK = "127.0.0.1: expected an address at which this machine can connect to itself, got {}. Bring up the loopback interface: ip link"
PIDS = Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")


def unshare(options: str, setup: str) -> list[str]:
    """Return the command that runs another one in separate namespaces, after a setup."""
    command = ["unshare", *options.split(), "sh", "-c", f'{setup} && exec "$0" "$@"']
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip(f"no namespaces on this machine: {' '.join(command)}")
    return command


def ends_with_one_line(workspace, name: str, inside: list[str], **environment: str) -> str:
    """Start a run that gives up; return its reason, after checking that nothing of it is left, and that its event log has its end."""
    with RunProcess(workspace, name, *SHORT, inside=inside, **environment) as run:
        code, output = run.end(within=150)
        assert code == 1, output
        assert "Traceback" not in output
        assert run.events("run-ended")[-1]["exit_code"] == 1
        (given_up,) = [line for line in output.splitlines() if line.startswith("attempt 0: give up: ")]
        return given_up.removeprefix("attempt 0: give up: ")


@pytest.mark.root
def test_a_loopback_interface_that_is_down_is_named(workspace):
    reason = ends_with_one_line(workspace, "no loopback", unshare("-n", "true"))
    assert reason.startswith(NO_LOOPBACK.format("Network is unreachable"))


@pytest.mark.slow
@pytest.mark.root
def test_a_machine_without_ipv4_is_named(workspace):
    inside = unshare("-n", "ip link set lo up && ip addr del 127.0.0.1/8 dev lo")
    assert ends_with_one_line(workspace, "IPv6 alone", inside).startswith(NO_LOOPBACK.format("Cannot assign requested address"))


@pytest.mark.slow
@pytest.mark.root
def test_full_and_read_only_folders_for_temporary_files_are_named(workspace):
    others = "mount -t tmpfs -o ro tmpfs /var/tmp && mount -t tmpfs -o size=4m tmpfs /dev/shm"
    inside = unshare("-m", f"{read_only_tmp(workspace.directory)} && {others}")
    reason = ends_with_one_line(workspace, "no room", inside, TMPDIR="/dev/shm")
    expected = (
        "expected a folder with 16 MiB for Ray's sockets and logs, got /tmp: Read-only file system; /dev/shm: No space left on device; "
    )
    assert reason.startswith(expected)
    assert reason.endswith("Free some space, or set TMPDIR to such a folder, with a path of at most 19 letters.")


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.parametrize("folder", ["/dev/shm", "/tmp"])
def test_a_run_does_without_shared_memory_or_tmp(workspace, folder):
    """It uses another folder for temporary files; a TMPDIR that is too long for sockets is left alone."""
    deep = workspace.directory / ("d" * 100)
    deep.mkdir(exist_ok=True)
    inside = unshare("-m", "mount -t tmpfs -o ro tmpfs /dev/shm" if folder == "/dev/shm" else read_only_tmp(workspace.directory))
    with RunProcess(workspace, f"without {folder[1:].replace('/', ' ')}", *SHORT, inside=inside, TMPDIR=str(deep)) as run:
        code, output = run.end()
        assert code == 0, output


@pytest.mark.slow
@pytest.mark.root
def test_a_host_name_that_does_not_resolve_is_no_obstacle(workspace):
    with RunProcess(workspace, "unknown host", *SHORT, inside=unshare("-u", "hostname no.such.name.invalid")) as run:
        code, output = run.end()
        assert code == 0, output


@pytest.mark.slow
@pytest.mark.root
def test_a_machine_without_processes_left_is_reported(workspace, pids_group):
    """Ray's code may end the process of the command, if it cannot start a thread there: another one has the last word then."""
    with RunProcess(workspace, "no processes", *SHORT, inside=pids_group) as run:
        code = run.process.wait(150)
        until(lambda: not run.processes(), within=20)
        output = run.stderr.read_text()
        assert "Traceback" not in output
        assert run.events("run-ended")[-1]["exit_code"] == 1
    if code == -signal.SIGABRT:
        assert output.endswith("manta: expected a Ray that starts, got one with processes that ended. Run the command again.\n")
        return
    assert code == 1, output
    (reason,) = re.findall("^attempt 0: give up: (.*)$", output, re.MULTILINE)
    assert reason.startswith("expected a Ray that starts, got: Ray's ")
    assert reason.endswith("Run the command again; if it fails again, check how many processes and how much memory are allowed.")


@pytest.fixture
def pids_group():
    """A control group of at most 60 processes and threads; yields the command that runs another one in it."""
    group = next((path for path in PIDS if (path / "cgroup.procs").exists()), PIDS[0]) / f"manta-{os.getpid()}"
    try:
        group.mkdir()
        (group / "pids.max").write_text("60")
    except OSError as error:
        pytest.skip(f"this machine allows no control group: {error}")
    yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$0" "$@"']
    until(lambda: not (group / "cgroup.procs").read_text(), within=60)
    group.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.4, 0.8, 1.2, 1.6, 2.0])
@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
def test_a_part_of_ray_killed_while_it_starts_is_replaced(workspace, part, delay):
    """Unless Ray loses the part while the process connects: then its code ends the process, or hangs, and the run ends with a line."""
    with RunProcess(workspace, f"{part} killed after {delay}", *SHORT) as run:
        pid = run.until(lambda: [pid for pid, command in run.command_lines().items() if f"/{part} --" in command])[0]
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        code = run.process.wait(120)
        until(lambda: not run.processes(), within=20)  # the last one writes what the ended process could not
        output = run.stderr.read_text()
        assert "Traceback" not in output
        assert run.events("run-ended")[-1]["exit_code"] == code
        ends = ("got one with processes that ended. Run the command again.", f"got: Ray's {part} ended with -9. Run the command again")
        assert code == 0 or any(end in output for end in ends), output
        assert code == 0 or delay, "Ray's process is not connected yet"
    with RunProcess(workspace, f"{part} killed after {delay}", *SHORT) as again:
        assert again.end()[0] == 0


def test_closed_and_broken_standard_streams_change_no_exit_code(tmp_path):
    """`2>&-`, `>&-`, and a reader that is gone."""
    for redirection in ("2>&-", ">&-", "<&- >&- 2>&-", "2>/dev/full", "2>&1 | true"):
        command = f"set -o pipefail; {MANTA} status {tmp_path}/none {redirection}"
        assert subprocess.run(["bash", "-c", command], capture_output=True, check=False).returncode == 2, redirection


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["2>&-", ">&-", "<&- >&- 2>&-", ">/dev/full 2>&1", "| true"])
def test_a_run_goes_on_without_standard_streams(workspace, redirection):
    name = f"streams {json.dumps(redirection)[1:-1].translate(str.maketrans('/<>&|', '_____'))}"
    inside = ["bash", "-c", f'set -o pipefail; ulimit -Sn 256; "$0" "$@" {redirection}']
    with RunProcess(workspace, name, *SHORT, inside=inside) as run:
        assert run.process.wait(120) == 0
        assert run.events("run-ended")[-1]["exit_code"] == 0
        assert len(run.lines()) == 3


@pytest.mark.slow
def test_a_low_limit_of_open_files_is_raised(workspace):
    with RunProcess(workspace, "few files", "train.steps=100000", inside=["sh", "-c", 'ulimit -Sn 64; exec "$0" "$@"']) as run:
        run.steps(1, 2)
        limits = [Path(f"/proc/{pid}/limits").read_text() for pid in run.pids(1)]
        soft, hard = next(line for line in limits[0].splitlines() if line.startswith("Max open files")).split()[3:5]
        assert soft == hard
        run.process.send_signal(signal.SIGTERM)
        assert run.end()[0] == 75
