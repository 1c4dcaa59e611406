"""A Ray that is elsewhere, by the HTTP address of its dashboard: the run is submitted to it as a job, and this machine may go.

Code travels with the job: manta itself, so that there it is the very same, and a model of the user's own. What they import does not. So
travels any other command, for whoever does not see the run's directory.
"""

import asyncio
import shlex
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import manta.cluster
import manta.data
import manta.launch
import manta.trainer
from manta.data.errors import InputError
from manta.data.storage.location import local_path
from manta.launch import __version__
from manta.launch.config import RunConfig
from manta.launch.run.display import say
from manta.launch.targets.paths import password_in, places

ROOMS = (manta.cluster, manta.data, manta.launch, manta.trainer)
CONFIG = "run.yaml"
ANSWER = 10.0  # seconds that the dashboard has to answer
ENTRY = "Running entrypoint for job"  # Ray's own last line, before what the job says
NOT_CODE = shutil.ignore_patterns("__pycache__", "*.pyc")
RAY = "wants the address of a Ray's dashboard, which ray[default] has"


def submit(config: RunConfig, address: str, *, insecure: bool) -> int:
    """Hands the run over. Gives the exit code. Raises InputError before anything is handed over."""
    if problems := list(_problems(config)):
        raise InputError("\n".join(problems))
    client = _client("--on", address, insecure=insecure)
    with tempfile.TemporaryDirectory() as folder:
        luggage(Path(folder))
        take_along(Path(folder), config)
        job = client.submit_job(
            entrypoint=f"python -P -m manta.launch train {CONFIG} --on auto{' --insecure' if insecure else ''}",
            runtime_env={"working_dir": folder},
            metadata={"run": str(config.run.dir)},
        )
    logs, status = f"ray job logs --address {address} {job}", f"manta status {shlex.quote(str(config.run.dir))}"
    say(f"{config.run.dir}: submitted as {job}; see: {logs}; or, where its directory is seen: {status}")
    sys.stdout.write(f"{job}\n")
    return 0


def ask(address: str, command: Sequence[str], *, insecure: bool) -> int:
    """Has a node of it run a command of manta's, and shows what that says. Gives its exit code. Raises InputError where it can not."""
    client = _client("at", address, insecure=insecure)
    with tempfile.TemporaryDirectory() as folder:
        luggage(Path(folder))
        entrypoint = f"python -P -m manta.launch {shlex.join(command)}"
        job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": folder})
    asyncio.run(_show(client, job))
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(0.1)
    if info.driver_exit_code is None:
        raise InputError(f"at: got {address}, wants a node of it that can run manta: {info.message}")
    return int(info.driver_exit_code)


async def _show(client: Any, job: str) -> None:
    """What a job says, until it ends; without what Ray says before."""
    head: str | None = ""
    async for text in client.tail_job_logs(job):
        if head is not None:
            _, found, rest = (head + text).partition(ENTRY)
            if not found or "\n" not in rest:
                head += text
                continue
            head, text = None, rest.partition("\n")[2]  # noqa: PLW2901
        sys.stdout.write(text)
        sys.stdout.flush()


def luggage(folder: Path) -> None:
    """Manta as it is here, for a job to take along."""
    for room in ROOMS:
        shutil.copytree(Path(str(room.__file__)).parent, folder / "manta" / room.__name__.rpartition(".")[2], ignore=NOT_CODE)
    about = folder / f"manta-{__version__}.dist-info"  # by which the nodes tell which manta they have
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: manta\nVersion: {__version__}\n")


def take_along(folder: Path, config: RunConfig) -> None:
    """What a run needs besides: its config, and the package or module of a model of the user's own."""
    (folder / CONFIG).write_text(config.to_yaml())
    if ":" not in config.model.family:
        return
    top = config.model.family.partition(":")[0].partition(".")[0]
    if (Path.cwd() / top).is_dir():
        shutil.copytree(Path.cwd() / top, folder / top, ignore=NOT_CODE)
    elif (file := Path.cwd() / f"{top}.py").is_file():
        shutil.copyfile(file, folder / file.name)  # else it has to be installed there


def _client(where: str, address: str, *, insecure: bool) -> Any:
    """Raises InputError where there is none, or one that anybody is let in by, unless told that this is known."""
    if not insecure and _is_open(where, address):
        raise InputError(f"{where}: got {address}, wants one that asks for a token: start it with RAY_AUTH_MODE=token; or add --insecure")
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:  # noqa: BLE001  of several libraries
        raise InputError(f"{where}: got {address}, {RAY}: {str(error).strip().splitlines()[0]}") from None


def _is_open(where: str, address: str) -> bool:
    """Whether it answers who has no token. Raises InputError where nobody is there."""
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=ANSWER).close()  # noqa: S310  http or https, as asked
    except urllib.error.HTTPError as error:
        if error.code in {401, 403}:
            return False
        raise InputError(f"{where}: got {address}, {RAY}: {error}") from None
    except OSError as error:
        raise InputError(f"{where}: got {address}, {RAY}: {getattr(error, 'reason', error)}") from None
    return True


def _problems(config: RunConfig) -> Iterator[str]:
    """What the job would stumble over, in a line each."""
    for where, place in places(config):
        if local_path(place) is None:
            wrong = password_in(where, place, "have it in the environment of the Ray's nodes")
        else:
            wants = "an absolute path that the Ray's nodes share" + ("" if where == "run.dir" else ", or a URL")
            wrong = None if Path(place).is_absolute() else f"{where}: got {place}, wants {wants}; the job begins in a directory of its own"
        if wrong:
            yield wrong
