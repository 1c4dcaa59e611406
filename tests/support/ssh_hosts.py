"""Hosts for ssh, all of them this machine: real sshds with their own keys, in network namespaces or on ports."""

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def why_unavailable() -> str | None:
    """Return why this machine can have none; None if it can."""
    return None if Path(SSHD).exists() and shutil.which("ssh") else "no sshd on this machine: install openssh-server"


class Sshds:
    """`hosts`: of each the address and port to listen on, the command that runs it, and the address by which others reach its processes."""

    def __init__(self, folder: Path, hosts: Sequence[tuple[str, int, Sequence[str], str]]) -> None:
        self.folder, self.processes = folder, []
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd requires it
        public = (folder / "host.pub").read_text().strip()
        (folder / "known").write_text("".join(f"[{address}]:{port} {public}\n" for address, port, *_ in hosts))
        (folder / "config").write_text(f"Host *\n IdentityFile {folder}/user\n UserKnownHostsFile {folder}/known\n IdentitiesOnly yes\n")
        for number, (address, port, inside, _) in enumerate(hosts):
            settings = f"Port {port}\nListenAddress {address}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
            settings += f"PidFile {folder}/pid-{number}\nStrictModes no\nPermitRootLogin yes\nUsePAM no\nMaxStartups 20\n"
            settings += f"SetEnv PYTHONPATH={os.environ['PYTHONPATH']}\n" if os.environ.get("PYTHONPATH") else ""
            (folder / f"sshd-{number}").write_text(settings)
            self.processes.append(subprocess.Popen([*inside, SSHD, "-D", "-e", "-f", folder / f"sshd-{number}"], stderr=subprocess.DEVNULL))
        (folder / "hosts").write_text("".join(f"{address}:{port} address={reached}\n" for address, port, _, reached in hosts))

    def sessions(self, number: int) -> list[int]:
        """Return the process ids of an sshd's sessions."""
        output = subprocess.run(["ps", "-wweo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.split()
        pairs = list(zip(output[2::2], output[3::2], strict=True))
        return [int(pid) for pid, parent in pairs if int(parent) == self.processes[number].pid]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
