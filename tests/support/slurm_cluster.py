"""A SLURM cluster of two nodes, both this machine: munged, slurmctld and two slurmd of Debian's slurm-wlm and munge. Needs root."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")


def why_unavailable() -> str | None:
    """Return why this machine can not start it; None if it can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"no {', '.join(absent)} on this machine: install slurm-wlm and munge"
    return None if os.geteuid() == 0 else "slurmd starts jobs as their users: it requires root"


class SlurmCluster:
    """Context manager. `environment` makes SLURM's commands use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        for name in ("state", "log"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(self._settings())
        self._munge()
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._start("slurmd", "-N", node, "-D")
        deadline = time.monotonic() + 60
        while self.ask("sinfo", "-h", "-o", "%T") != "idle":
            assert time.monotonic() < deadline, self.ask("sinfo")
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self.ask("scancel", "--full", "--state=RUNNING")
        for process in reversed(self._processes):
            process.terminate()
            process.wait(20)

    def ask(self, *command: str) -> str:
        result = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, check=False)
        return result.stdout.strip()

    def state(self, job: str) -> str:
        output = self.ask("scontrol", "--oneliner", "show", "job", job)
        return next((word.partition("=")[2] for word in output.split() if word.startswith("JobState=")), "")

    def _start(self, *command: str) -> None:
        name = "-".join(command).replace("-", "")
        with (self.folder / "log" / name).open("w") as log:
            process = subprocess.Popen(command, env=os.environ | self.environment, stdout=log, stderr=log, start_new_session=True)
        self._processes.append(process)

    def _munge(self) -> None:
        """Start munged unless the machine already runs one."""
        if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
            return
        for folder in ("/run/munge", "/var/log/munge", "/var/lib/munge", "/etc/munge"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            subprocess.run(["chown", "-R", "munge:munge", folder], check=True)
        subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "munged --force"], check=True)

    def _settings(self) -> str:
        host, (control, first, second) = socket.gethostname(), _free_ports(3)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN"
            for name, port in (("n1", first), ("n2", second))
        )
        return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool-%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
KillWait=30
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
