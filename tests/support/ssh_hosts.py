"""Hosts that ssh reaches, all of them this machine: real sshds with keys of their own, in network namespaces or on ports."""

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def missing() -> str | None:
    """Why there can be none here."""
    return None if Path(SSHD).exists() and shutil.which("ssh") else "no sshd on this machine: install openssh-server"


class Sshds:
    """`places`: of each the address and port it listens at, what it is run by, and by which address the others reach what it starts."""

    def __init__(self, folder: Path, places: Sequence[tuple[str, int, Sequence[str], str]]) -> None:
        self.folder, self.processes = folder, []
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it
        public = (folder / "host.pub").read_text().strip()
        (folder / "known").write_text("".join(f"[{address}]:{port} {public}\n" for address, port, *_ in places))
        (folder / "config").write_text(f"Host *\n IdentityFile {folder}/user\n UserKnownHostsFile {folder}/known\n IdentitiesOnly yes\n")
        for number, (address, port, inside, _) in enumerate(places):
            settings = f"Port {port}\nListenAddress {address}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
            settings += f"PidFile {folder}/pid-{number}\nStrictModes no\nPermitRootLogin yes\nUsePAM no\nMaxStartups 20\n"
            settings += f"SetEnv PYTHONPATH={os.environ['PYTHONPATH']}\n" if os.environ.get("PYTHONPATH") else ""
            (folder / f"sshd-{number}").write_text(settings)
            self.processes.append(subprocess.Popen([*inside, SSHD, "-D", "-e", "-f", folder / f"sshd-{number}"], stderr=subprocess.DEVNULL))
        (folder / "hosts").write_text("".join(f"{address}:{port} address={reached}\n" for address, port, _, reached in places))

    def sessions(self, number: int) -> list[int]:
        """Those that an sshd serves."""
        listed = subprocess.run(["ps", "-wweo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.split()
        pairs = list(zip(listed[2::2], listed[3::2], strict=True))
        return [int(pid) for pid, parent in pairs if int(parent) == self.processes[number].pid]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
