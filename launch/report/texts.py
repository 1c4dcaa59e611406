"""Generate texts with the newest checkpoint of a run in a separate process, which cannot fail the run or its report."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import BinaryIO

from manta.cluster.nodes.process import DIE_WITH_PARENT
from manta.cluster.protocol import read_lines
from manta.data.errors import cut, one_line, printable
from manta.trainer.run_directory import RunDirectory
from manta.trainer.serve.texts import append_texts, parse_text

SECONDS, TOKENS = 120.0, 160  # for all texts together; the most of each
POLL_INTERVAL = 0.05  # seconds


def add_texts(
    run_dir: RunDirectory, count: int, *, prompt: str = "", seconds: float = SECONDS, is_stopped: Callable[[], bool] = lambda: False
) -> str | None:
    """Generate texts with seeds 1 to `count`, and append those that are new to the run's samples.jsonl.

    Returns why some are missing, in a line. Texts that are complete when the time is over, or when the process fails, are kept.
    """
    arguments = [str(run_dir.path), str(count), str(TOKENS), prompt]
    command = [sys.executable, "-I", "-S", str(DIE_WITH_PARENT), str(os.getpid()), sys.executable, "-P", "-m", "manta.trainer.serve"]
    try:
        # Files, because nobody would empty a pipe. A new session, because a Ctrl-C that this process ignores must not reach it.
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [*command, *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
            )
            try:
                problem = _wait(process, seconds, is_stopped)
            finally:
                process.kill()
                process.wait()
            problem = problem or _failure(process.returncode, errors)
            output.seek(0)
            unwritten = append_texts(run_dir.samples_file, read_lines(output, parse_text, path=run_dir.samples_file))
    except OSError as error:
        problem, unwritten = f"{error.filename or run_dir.samples_file}: {error.strerror}", None
    except ValueError as error:  # a prompt with a NUL, or that no encoding takes
        problem, unwritten = f"--prompt: {one_line(error)}", None
    return problem or unwritten


def _wait(process: subprocess.Popen[bytes], seconds: float, is_stopped: Callable[[], bool]) -> str | None:
    """Wait for its end. Returns why that did not come."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if is_stopped():
            return "a stop was requested"
        if time.monotonic() >= deadline:
            return f"it took more than {seconds:g} s"
        time.sleep(POLL_INTERVAL)
    return None


def _failure(code: int, errors: BinaryIO) -> str | None:
    """Return why the process failed, if it did: the last line of its errors."""
    if code == 0:
        return None
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", perhaps because memory ran out" if name == "SIGKILL" else "")
    errors.seek(max(0, errors.seek(0, 2) - 100_000))
    lines = errors.read().decode(errors="replace").split("\n")
    return printable(cut(next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}"), 500))
