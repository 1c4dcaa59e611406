"""Another Ray, by the HTTP address of its dashboard: the run is submitted as a job, and does not need this machine any more.

Its nodes need not have manta: this version, and a model of the user's, are sent with the job. Other packages are not. Any other command
can run there in the same way, which helps if this machine cannot see the run directory.
"""

import asyncio
import contextlib
import re
import shlex
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from manta.data.errors import InputError
from manta.launch import __version__
from manta.launch.config import RunConfig
from manta.launch.targets.paths import location_problems
from manta.launch.terminal import notify

CONFIG = "run.yaml"
CHECK_TIMEOUT = 10.0  # seconds for the dashboard to answer at first
TIMEOUT = 120.0  # seconds for any later answer: a busy machine takes long to accept a job
AGENT_TIMEOUT = 30.0  # seconds in which a Ray that has just started has an agent that runs jobs
NO_AGENT = "No available agent to submit job"  # Ray's words
LONGEST = 300  # characters of an error that Ray reports
ENTRYPOINT_LINE = "Running entrypoint for job"  # Ray's last line before the output of the job
NOT_CODE = shutil.ignore_patterns("__pycache__", "*.pyc")
POLL = 0.1  # seconds
RETRY = 1.0  # seconds between two tries to submit


def submit(config: RunConfig, address: str, *, insecure: bool) -> int:
    """Submit the run and return the exit code. Raises InputError before anything is submitted."""
    command = train_command(config, insecure=insecure)
    with _errors_in_one_line("--on", address):
        client = _client("--on", address, insecure=insecure)
        job = _submit(client, command, config)
    logs, status = f"ray job logs --address {address} {job}", f"manta status {shlex.quote(str(config.run.dir))}"
    notify(f"{config.run.dir}: submitted as {job}; see: {logs}; or, on a machine that sees its directory: {status}")
    sys.stdout.write(f"{job}\n")
    return 0


def train_command(config: RunConfig, *, insecure: bool) -> list[str]:
    """Return the arguments of manta in the job. Raises InputError if the Ray's nodes would not find the run's files."""
    expected, remedy = "an absolute path that the Ray's nodes share", "Change it: the job starts in another directory."
    problems = location_problems(config, root="/", expected=expected, remedy=remedy)
    if message := "\n".join(problems):
        raise InputError(message)
    return ["train", CONFIG, "--on", "auto", *(["--insecure"] if insecure else [])]


def entrypoint(command: Sequence[str]) -> str:
    """Return a job's shell command that runs a command of manta."""
    return f"python -P -m manta.launch {shlex.join(command)}"


def run_command(address: str, command: Sequence[str], *, insecure: bool) -> int:
    """Run a command of manta on a node of that Ray, print its output, and return its exit code. Raises InputError if that fails."""
    with _errors_in_one_line("at", address):
        client = _client("at", address, insecure=insecure)
        job = _submit(client, command)
        asyncio.run(_print_output(client, job))
        while not (info := client.get_job_info(job)).status.is_terminal():
            time.sleep(POLL)
    if info.driver_exit_code is None:
        raise InputError(f"at: expected a Ray cluster that can run manta, got {address}: {info.message}. Check the packages there.")
    return int(info.driver_exit_code)


def _submit(client: Any, command: Sequence[str], config: RunConfig | None = None) -> str:
    """Submit a command of manta, with manta and perhaps a run in its working directory. Return the job's ID."""
    with tempfile.TemporaryDirectory() as folder:
        copy_manta(Path(folder))
        if config is not None:
            copy_run(Path(folder), config)
        metadata = None if config is None else {"run": str(config.run.dir)}
        deadline, is_waiting = time.monotonic() + AGENT_TIMEOUT, False
        while True:
            try:
                return client.submit_job(entrypoint=entrypoint(command), runtime_env={"working_dir": folder}, metadata=metadata)
            except RuntimeError as error:
                if NO_AGENT not in str(error) or time.monotonic() > deadline:
                    raise
            if not is_waiting:
                notify(f"waiting up to {AGENT_TIMEOUT:g} s for an agent of that Ray, which runs jobs")
            is_waiting = True
            time.sleep(RETRY)


async def _print_output(client: Any, job: str) -> None:
    """Print the output of a job until it ends, without Ray's lines before it."""
    before: str | None = ""
    async for text in client.tail_job_logs(job):
        if before is not None:
            _, found, rest = (before + text).partition(ENTRYPOINT_LINE)
            if not found or "\n" not in rest:
                before += text
                continue
            before, text = None, rest.partition("\n")[2]  # noqa: PLW2901
        sys.stdout.write(text)
        sys.stdout.flush()


def copy_manta(folder: Path) -> None:
    for package in ("cluster", "data", "launch", "trainer"):
        source = Path(str(import_module(f"manta.{package}").__file__)).parent
        shutil.copytree(source, folder / "manta" / package, ignore=NOT_CODE)
    metadata = folder / f"manta-{__version__}.dist-info"  # nodes read the version from it
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: manta\nVersion: {__version__}\n", encoding="utf-8")


def copy_run(folder: Path, config: RunConfig) -> None:
    """Copy the config, and the package or module of a model of the user's if it is in the working directory."""
    (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    if ":" not in config.model.family:
        return
    name = config.model.family.partition(":")[0].partition(".")[0]
    package, module = Path.cwd() / name, Path.cwd() / f"{name}.py"
    if package.is_dir():
        shutil.copytree(package, folder / name, ignore=NOT_CODE)
    elif module.is_file():
        shutil.copyfile(module, folder / module.name)


def _client(key: str, address: str, *, insecure: bool) -> Any:
    """Raises InputError if the address is none, or if the dashboard accepts anyone, unless `insecure`."""
    host_of(key, address)
    if find_spec("aiohttp") is None:
        raise InputError(f"{key}: expected the packages of ray[default], got none. Run pip install 'manta[dashboard]'.")
    if not insecure and _accepts_anyone(address):
        raise InputError(f"{key}: expected a Ray cluster with a token, got {address}. Set RAY_AUTH_MODE=token there, or add --insecure.")
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            """Without a timeout, a dashboard that does not answer would be waited for until it ends."""
            return super()._do_request(*arguments, timeout=TIMEOUT, **options)

    return Client(address)


def host_of(key: str, address: str) -> str:
    """Return the host of a dashboard's address. Raises InputError if the address is none, or has a password."""
    try:
        url = urlsplit(address)
        host = url.hostname if url.port != 0 else None
    except ValueError:
        url, host = None, None
    if url is None or not host:
        raise InputError(f"{key}: expected http://HOST:PORT, got {address.rpartition('@')[2][:LONGEST]!r}. Correct it.")
    if url.password is not None:
        remedy = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH instead."
        raise InputError(f"{key}: expected a URL without a password, got one for {host}. {remedy}")
    return host


def _accepts_anyone(address: str) -> bool:
    """Return whether the dashboard answers without a token."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=CHECK_TIMEOUT) as answer:  # noqa: S310  http or https: --on is checked
            if answer.headers.get_content_type() != "application/json":
                raise ValueError
    except urllib.error.HTTPError as error:
        if error.code not in {401, 403}:
            raise
        return False
    return True


@contextlib.contextmanager
def _errors_in_one_line(key: str, address: str) -> Generator[None]:
    """Raise an InputError for any error of the Ray client, which raises those of several libraries."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001
        remedy = "Check the address, the token (RAY_AUTH_TOKEN_PATH), and that ray[default] is installed there."
        raise InputError(f"{key}: expected a Ray dashboard, got {address} ({_gist(error)}). {remedy}") from None


def _gist(error: Exception) -> str:
    """Return what an error says without tracebacks and web pages of a server."""
    if isinstance(error, ValueError | TypeError | KeyError):  # not JSON, or JSON of another shape
        return "something else answers there"
    lines = [line for line in str(error).splitlines() if line.strip(" .")] or [type(error).__name__]
    first = lines[0].removeprefix("<urlopen error ").removesuffix(">")
    text = lines[-1] if first.endswith("Traceback (most recent call last):") else first
    return re.split("<!doctype|<html", text, maxsplit=1, flags=re.IGNORECASE)[0].rstrip(" .:")[:LONGEST] or type(error).__name__
