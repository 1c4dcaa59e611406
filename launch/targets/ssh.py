"""Hosts over ssh: a private Ray cluster on them, which is started from here and ends with the run.

A line of the hosts file is `[user@]host[:port]`, and optionally `address=` (under which other hosts reach it) and `python=`.
"""

import re
import sys
from pathlib import Path

from manta.cluster.config import ClusterConfig
from manta.cluster.machine import address_towards
from manta.cluster.ray.hosts import Host
from manta.cluster.ray.runtime import LOOPBACK, HostsRay
from manta.data.errors import InputError

LINE = re.compile(r"(?P<login>(?:[\w.-]+@)?(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]))(?::(?P<port>\d+))?(?P<options>(?:\s+\S+)*)")
KEYS = {"address", "python"}
# No prompts. A host that is gone is noticed within 15 s.
OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")


def ray_of_hosts(file: str, cluster: ClusterConfig) -> HostsRay:
    """Raises InputError if the file has a wrong line, or fewer hosts than cluster.nodes."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "no text"
        raise InputError(f"--on ssh:{file}: expected a file with one host per line, got: {problem}. Write one.") from None
    numbered = ((number, line.partition("#")[0].strip()) for number, line in enumerate(lines, start=1))
    hosts = [_host(f"{file}:{number}", line, cluster.ssh.options) for number, line in numbered if line]
    if len(hosts) < cluster.min_nodes:
        raise InputError(f"{file}: expected {cluster.min_nodes} hosts, as in cluster.nodes, got {len(hosts)}. Add some, or lower it.")
    first = hosts[0]
    try:
        address = address_towards(first.address or first.name)  # this machine's, on the route to that host
    except OSError as error:  # a name that only ssh's config knows
        raise InputError(f"{file}: expected a host that resolves, got {first.name} ({error.strerror}). Add its address=.") from None
    return HostsRay(tuple(hosts), address=LOOPBACK if address.startswith("127.") else address, grace=cluster.grace_period)


def _host(location: str, line: str, options: tuple[str, ...]) -> Host:
    match = LINE.fullmatch(line)
    settings = {key: value for key, _, value in (option.partition("=") for option in match["options"].split())} if match else {}
    if match is None or not settings.keys() <= KEYS or not all(settings.values()):
        raise InputError(f"{location}: expected [user@]host[:port] [address=ADDRESS] [python=PATH], got {line!r}. Correct the line.")
    port = ("-p", match["port"]) if match["port"] else ()
    return Host(
        name=match["host"].strip("[]"),
        reach=("ssh", *OPTIONS, *options, *port, match["login"].replace("[", "").replace("]", "")),
        has_shell=True,
        python=settings.get("python", sys.executable),
        address=settings.get("address"),
    )
