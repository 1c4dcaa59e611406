"""Hosts that ssh reaches: a Ray of the run's own on them, started from here, and ended with the run.

A line of the file is `[user@]host[:port]`, and after it what differs there: `address=` (by which the others reach it) and `python=`.
"""

import re
import sys
from pathlib import Path

from manta.cluster.config import ClusterConfig
from manta.cluster.nodes.machine import address_towards
from manta.cluster.ray.hosts import Host
from manta.cluster.ray.runtime import LOOPBACK, HostsRay
from manta.data.errors import InputError

LINE = re.compile(r"(?P<login>(?:[\w.-]+@)?(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]))(?::(?P<port>\d+))?(?P<rest>(?:\s+\S+)*)")
KEYS = {"address", "python"}
# No question can be answered; a host that has gone is noticed in 15 s.
OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")


def ray_of(file: str, cluster: ClusterConfig) -> HostsRay:
    """The Ray of the hosts in a file. Raises InputError where they are too few, or a line is none."""
    hosts = [_host(file, number, line, cluster.ssh.options) for number, line in _lines(Path(file))]
    if len(hosts) < cluster.min_nodes:
        raise InputError(f"{file}: got {len(hosts)} hosts, wants the {cluster.min_nodes} of cluster.nodes; add some, or lower it")
    return HostsRay(tuple(hosts), address=_towards(file, hosts[0]), grace=cluster.grace_period)


def _lines(file: Path) -> list[tuple[int, str]]:
    """Those that say something, with their numbers."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text"
        raise InputError(f"--on ssh:{file}: {why}, wants a file with a host a line; write one") from None
    stripped = [(number, line.partition("#")[0].strip()) for number, line in enumerate(text.splitlines(), start=1)]
    return [(number, line) for number, line in stripped if line]


def _host(file: str, number: int, line: str, options: tuple[str, ...]) -> Host:
    found = LINE.fullmatch(line)
    more = {key: value for key, _, value in (each.partition("=") for each in found["rest"].split())} if found else {}
    if found is None or not more.keys() <= KEYS or not all(more.values()):
        wants = "[user@]host[:port] [address=ADDRESS] [python=PATH]"
        raise InputError(f"{file}:{number}: got {line!r}, wants {wants}; mend it")
    port = ("-p", found["port"]) if found["port"] else ()
    return Host(
        name=found["host"].strip("[]"),
        reach=("ssh", *OPTIONS, *options, *port, found["login"].replace("[", "").replace("]", "")),
        has_shell=True,
        python=more.get("python", sys.executable),
        address=more.get("address"),
    )


def _towards(file: str, host: Host) -> str:
    """This machine's address on the way to a host. A name that only ssh's own config knows needs its address= in the file."""
    try:
        address = address_towards(host.address or host.name)
    except OSError as error:
        raise InputError(f"{file}: got {host.name}, wants a host that can be found ({error.strerror}); add its address=") from None
    return LOOPBACK if address.startswith("127.") else address
