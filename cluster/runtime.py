"""A private Ray for one run: its own processes, its own token, its own folder; nothing of it is left when the run ends.

Ray reads its environment when it is imported, so nothing here or above may import it before `local_ray` has been entered.
"""

import contextlib
import fcntl
import functools
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

OBJECT_STORE_BYTES = 80_000_000  # nothing of size ever passes through it; this is near the least that Ray accepts
ADDRESS = "127.0.0.1"  # where ranks meet
# Ray takes 127.0.0.1 as a wish for the outward address, which a laptop loses when it changes networks; this one it takes as it is.
RAYS_ADDRESS = "127.0.0.2"
TEMPORARY = Path("/tmp")  # noqa: S108  whatever TMPDIR says: Ray's socket paths must fit into 107 bytes
PREFIX = "manta-ray-"
# Ray's autoscaler, log forwarder and web server: 1.2 s of processor time to start, 1.3 s to stop, and nobody to talk to here.
NOT_NEEDED = ("start_monitor", "start_log_monitor", "start_api_server")


@contextlib.contextmanager
def local_ray(*, nodes: int) -> Generator[Path]:
    """Start Ray on this machine with room for `nodes` agents; yields a private folder (0700) that is removed at the end."""
    _sweep()
    scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=TEMPORARY))
    try:
        with _token(scratch) as token, _environment(token):
            import ray
            from ray._private import worker

            # What Ray has to say about a lost worker goes to stdout, in colour; the journal says it better.
            with _replaced(worker, "_worker_logs_enabled", False):
                try:
                    _start(scratch, nodes)
                    yield scratch
                finally:
                    with warnings.catch_warnings(action="ignore"):
                        ray.shutdown()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _start(scratch: Path, nodes: int) -> None:
    import ray
    from ray._private import node, services

    # Ray's processes get a session of their own: a hang-up, Ctrl-C or `timeout` signals the whole group of the terminal, and ranks
    # whose raylet is gone could not save.
    detached = functools.partial(services.ConsolePopen, start_new_session=True)
    with contextlib.ExitStack() as during:
        during.enter_context(contextlib.chdir(scratch))  # workers import from here first; in the user's folder any data.py shadows ours
        during.enter_context(_sigterm_kept())
        during.enter_context(_replaced(services, "ConsolePopen", detached))
        for helper in NOT_NEEDED:
            during.enter_context(_replaced(node.Node, helper, _start_nothing))
        during.enter_context(warnings.catch_warnings(action="ignore"))
        ray.init(
            address="local",
            num_cpus=nodes,
            num_gpus=0,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            _temp_dir=str(scratch / "ray"),  # Ray opens this folder to everyone; the one above stays shut
            _node_ip_address=RAYS_ADDRESS,
        )


@contextlib.contextmanager
def _sigterm_kept() -> Generator[None]:
    """Ray puts a SIGTERM handler of its own in place when it starts."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _start_nothing(*_: object, **__: object) -> None:
    pass


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: Any) -> Generator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _environment(token: Path) -> Generator[None]:
    """Less any settings for other Rays (an address, a token, a hook), with those for this one."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",  # agents ask for no GPU, yet their ranks must see all
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
        RAY_IGNORE_UNHANDLED_ERRORS="1",  # an agent's death is told by its sentinel
        RAY_USAGE_STATS_ENABLED="0",
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@functools.cache
def _secret() -> str:
    """One for this process: Ray reads the token once and keeps it, whatever it is started with later."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _token(scratch: Path) -> Generator[Path]:
    """Anyone who can reach Ray's ports could run code without it. Only its path is ever in an environment.

    It is locked while the run lasts: so the folder of a run that was killed can be told from one in use.
    """
    path = scratch / "token"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123  pathlib takes no mode
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(_secret())
        file.flush()
        yield path


def _sweep() -> None:
    """Remove what killed runs left. A minute old at least: a younger one may not have its lock yet."""
    for token in TEMPORARY.glob(f"{PREFIX}*/token"):
        with contextlib.suppress(OSError), token.open() as file:  # held, another user's, or just gone
            if time.time() - os.fstat(file.fileno()).st_mtime > 60:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(token.parent, ignore_errors=True)
