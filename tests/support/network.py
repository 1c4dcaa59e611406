"""A network of hosts on this machine: a network namespace per host, on a bridge in another one, in which the controller runs.

All see the same files. A host's link can be cut and restored. Needs root.
"""

import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import Self


class Network:
    """Context manager. Hosts are numbered; their addresses, which exist only inside it, start at 10.77.0.11."""

    def __init__(self, hosts: int) -> None:
        self.hub = f"manta-{os.getpid()}"
        self.hosts = [f"{self.hub}-{number}" for number in range(hosts)]

    def __enter__(self) -> Self:
        """Raises CalledProcessError if the kernel does not allow it."""
        try:
            self._set_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.hosts, self.hub):
            for pid in self.pids(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def _set_up(self) -> None:
        _ip("netns", "add", self.hub)
        _ip("-n", self.hub, "link", "set", "lo", "up")
        _ip("-n", self.hub, "link", "add", "hub", "type", "bridge")
        _ip("-n", self.hub, "address", "add", "10.77.0.1/24", "dev", "hub")
        _ip("-n", self.hub, "link", "set", "hub", "up")
        for number, name in enumerate(self.hosts):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", self.hub, "link", "add", f"host{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self.hub, "link", "set", f"host{number}", "master", "hub", "up")
            _ip("-n", name, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def address(self, number: int) -> str:
        return f"10.77.0.{11 + number}"

    def enter_hub(self) -> list[str]:
        """Return the command that runs another one in the hub."""
        return ["nsenter", f"--net=/run/netns/{self.hub}"]

    def enter(self, number: int) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.hosts[number]}"]

    def cut(self, number: int) -> float:
        """Drop all of the host's traffic, without a notice; return the time."""
        _ip("-n", self.hub, "link", "set", f"host{number}", "down")
        return time.time()

    def restore(self, number: int) -> None:
        _ip("-n", self.hub, "link", "set", f"host{number}", "up")

    def pids(self, name: str) -> list[int]:
        output = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
        return [int(pid) for pid in output.split()]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)
