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
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import manta.cluster
import manta.data
import manta.launch
import manta.trainer
from manta.data.errors import InputError
from manta.launch import __version__
from manta.launch.config import RunConfig
from manta.launch.messages import notify
from manta.launch.targets.paths import location_problems

PACKAGES = (manta.cluster, manta.data, manta.launch, manta.trainer)
CONFIG = "run.yaml"
TIMEOUT = 10.0  # seconds for the dashboard to answer
ENTRYPOINT_LINE = "Running entrypoint for job"  # Ray's last line before the output of the job
NOT_CODE = shutil.ignore_patterns("__pycache__", "*.pyc")
POLL = 0.1  # seconds


def submit(config: RunConfig, address: str, *, insecure: bool) -> int:
    """Submit the run and return the exit code. Raises InputError before anything is submitted."""
    problems = location_problems(
        config,
        root="/",
        expected="an absolute path that the Ray's nodes share",
        remedy="Change it: the job starts in another directory.",
        url_remedy="Set it in the environment of the Ray's nodes.",
    )
    if message := "\n".join(problems):
        raise InputError(message)
    client = _client("--on", address, insecure=insecure)
    entrypoint = f"python -P -m manta.launch train {CONFIG} --on auto{' --insecure' if insecure else ''}"
    with _code() as folder:
        copy_run(folder, config)
        job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(folder)}, metadata={"run": str(config.run.dir)})
    logs, status = f"ray job logs --address {address} {job}", f"manta status {shlex.quote(str(config.run.dir))}"
    notify(f"{config.run.dir}: submitted as {job}; see: {logs}; or, on a machine that sees its directory: {status}")
    sys.stdout.write(f"{job}\n")
    return 0


def run_command(address: str, command: Sequence[str], *, insecure: bool) -> int:
    """Run a command of manta on a node of that Ray, print its output, and return its exit code. Raises InputError if that fails."""
    client = _client("at", address, insecure=insecure)
    with _code() as folder:
        entrypoint = f"python -P -m manta.launch {shlex.join(command)}"
        job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(folder)})
    asyncio.run(_print_output(client, job))
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(POLL)
    if info.driver_exit_code is None:
        raise InputError(f"at: expected a Ray cluster that can run manta, got {address}: {info.message}. Check the packages there.")
    return int(info.driver_exit_code)


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


@contextmanager
def _code() -> Generator[Path]:
    """Yield a temporary folder with manta in it, the working directory of a job."""
    with tempfile.TemporaryDirectory() as folder:
        copy_manta(Path(folder))
        yield Path(folder)


def copy_manta(folder: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(Path(str(package.__file__)).parent, folder / "manta" / package.__name__.rpartition(".")[2], ignore=NOT_CODE)
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
    if not insecure and _accepts_anyone(key, address):
        raise InputError(f"{key}: expected a Ray cluster with a token, got {address}. Set RAY_AUTH_MODE=token there, or add --insecure.")
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:  # noqa: BLE001  of several libraries
        raise _no_dashboard(key, address, str(error).strip().splitlines()[0]) from None


def _accepts_anyone(key: str, address: str) -> bool:
    """Return whether the dashboard answers without a token. Raises InputError if there is none."""
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=TIMEOUT).close()  # noqa: S310  http or https: --on is checked
    except urllib.error.HTTPError as error:
        if error.code in {401, 403}:
            return False
        raise _no_dashboard(key, address, error) from None
    except OSError as error:
        raise _no_dashboard(key, address, getattr(error, "reason", error)) from None
    return True


def _no_dashboard(key: str, address: str, problem: object) -> InputError:
    return InputError(f"{key}: expected a Ray dashboard's address, got {address} ({problem}). Start it there with ray[default].")
