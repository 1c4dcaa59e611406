"""Another Ray, by the HTTP address of its dashboard: the run is submitted as a job, and does not need this machine any more.

Its nodes need not have manta: this version, and a model of the user's, are sent with the job. Other packages are not. Any other command
can run there in the same way, which helps if this machine cannot see the run directory.
"""

import asyncio
import shlex
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from manta.data.errors import InputError
from manta.launch import __version__
from manta.launch.config import RunConfig
from manta.launch.targets.paths import location_problems
from manta.launch.terminal import notify

CONFIG = "run.yaml"
TIMEOUT = 10.0  # seconds for the dashboard to answer
ENTRYPOINT_LINE = "Running entrypoint for job"  # Ray's last line before the output of the job
NOT_CODE = shutil.ignore_patterns("__pycache__", "*.pyc")
POLL = 0.1  # seconds


def submit(config: RunConfig, address: str, *, insecure: bool) -> int:
    """Submit the run and return the exit code. Raises InputError before anything is submitted."""
    expected, remedy = "an absolute path that the Ray's nodes share", "Change it: the job starts in another directory."
    url_remedy = "Set it in the environment of the Ray's nodes."
    problems = location_problems(config, root="/", expected=expected, remedy=remedy, url_remedy=url_remedy)
    if message := "\n".join(problems):
        raise InputError(message)
    client = _client("--on", address, insecure=insecure)
    job = _submit(client, ["train", CONFIG, "--on", "auto", *(["--insecure"] if insecure else [])], config)
    logs, status = f"ray job logs --address {address} {job}", f"manta status {shlex.quote(str(config.run.dir))}"
    notify(f"{config.run.dir}: submitted as {job}; see: {logs}; or, on a machine that sees its directory: {status}")
    sys.stdout.write(f"{job}\n")
    return 0


def run_command(address: str, command: Sequence[str], *, insecure: bool) -> int:
    """Run a command of manta on a node of that Ray, print its output, and return its exit code. Raises InputError if that fails."""
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
        entrypoint = f"python -P -m manta.launch {shlex.join(command)}"
        return client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": folder}, metadata=metadata)


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
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: manta\nVersion: {__version__}\n")


def copy_run(folder: Path, config: RunConfig) -> None:
    """Copy the config, and the package or module of a model of the user's if it is in the working directory."""
    (folder / CONFIG).write_text(config.to_yaml())
    if ":" not in config.model.family:
        return
    name = config.model.family.partition(":")[0].partition(".")[0]
    package, module = Path.cwd() / name, Path.cwd() / f"{name}.py"
    if package.is_dir():
        shutil.copytree(package, folder / name, ignore=NOT_CODE)
    elif module.is_file():
        shutil.copyfile(module, folder / module.name)


def _client(key: str, address: str, *, insecure: bool) -> Any:
    """Raises InputError if there is no dashboard, or one that accepts anyone, unless `insecure`."""
    if find_spec("aiohttp") is None:
        raise InputError(f"{key}: expected the packages of ray[default], got none. Run pip install 'manta[dashboard]'.")
    try:
        if insecure or not _accepts_anyone(address):
            from ray.job_submission import JobSubmissionClient

            return JobSubmissionClient(address)
    except Exception as error:  # noqa: BLE001  of several libraries
        problem = str(error).strip().splitlines()[0].removeprefix("<urlopen error ").removesuffix(">")
        raise InputError(f"{key}: expected a Ray dashboard, got {address} ({problem}). Start it there with ray[default].") from None
    raise InputError(f"{key}: expected a Ray cluster with a token, got {address}. Set RAY_AUTH_MODE=token there, or add --insecure.")


def _accepts_anyone(address: str) -> bool:
    """Return whether the dashboard answers without a token."""
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=TIMEOUT).close()  # noqa: S310  http or https: --on is checked
    except urllib.error.HTTPError as error:
        if error.code not in {401, 403}:
            raise
        return False
    return True
