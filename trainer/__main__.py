"""The entry point of a rank: `python -m manta.trainer RUN_DIRECTORY`, alone, under torchrun, or under a supervisor.

With MANTA_STANDBY set, the process imports everything, then waits for its environment on standard input: one line, a JSON object of
variables. A restart then pays for no imports.
"""

import importlib
import io
import json
import logging
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from manta.cluster.protocol import (
    MAX_MESSAGE,
    MAX_TRACEBACK,
    Category,
    Env,
    ExitCode,
    HeartbeatWriter,
    RankError,
    deny_writes_by_others,
    raise_open_files_limit,
    write_error,
)
from manta.data.errors import InputError
from manta.trainer.checkpoint.errors import CheckpointError, LeftUnsavedError, SaveError, UnreachableError
from manta.trainer.compile_cache import use_own_compile_cache
from manta.trainer.guard.record import SpikeError
from manta.trainer.signals import StopRequest, dump_on_signal

EXPLAINED = (
    CheckpointError,
    SaveError,
    FloatingPointError,
    SpikeError,
)  # their messages are for the user, and say all that a traceback could
NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # texts of torch's RuntimeErrors


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m manta.trainer RUN_DIRECTORY\n")
        return ExitCode.USAGE
    deny_writes_by_others()
    raise_open_files_limit()
    drop_unwritable_output()
    use_own_compile_cache()
    stop = StopRequest()
    if Env.STANDBY in os.environ:
        wait_for_environment()
    dump_on_signal(signal.SIGUSR2)
    rank = f"attempt {os.environ.get(Env.ATTEMPT, '0')} rank {os.environ.get('RANK', '0')}"
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {rank} %(name)s: %(message)s", force=True)
    heartbeat = HeartbeatWriter(os.environ.get(Env.HEARTBEAT_FILE))
    heartbeat("start", 0)
    try:
        from manta.trainer.rank import run

        return run(Path(sys.argv[1]), heartbeat, stop)
    except InputError as error:
        logging.getLogger("manta").error("%s", error)  # noqa: TRY400  the message is for the user; a traceback would hide it
        report(error, heartbeat, "input")
        return ExitCode.USAGE
    except BaseException as error:  # noqa: BLE001  the supervisor decides what to do about any error
        if isinstance(error, EXPLAINED):
            logging.getLogger("manta").error("%s", error)  # noqa: TRY400  as above
        else:
            traceback.print_exc()
        report(error, heartbeat, category_of(error))
        return ExitCode.UNSAVED if isinstance(error, LeftUnsavedError) else ExitCode.FAILED


class _Output(io.FileIO):
    """Drops what cannot be written: output on a full disk must not end a rank."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def drop_unwritable_output() -> None:
    """Replace standard output and error by streams that never fail to write."""
    outputs = (io.BufferedWriter(_Output(number, "w", closefd=False)) for number in (1, 2))
    sys.stdout, sys.stderr = (io.TextIOWrapper(output, errors="backslashreplace", line_buffering=True) for output in outputs)


def wait_for_environment() -> None:
    """Import everything, then read the environment variables. End the process if the supervisor closes standard input."""
    importlib.import_module("manta.trainer.rank")

    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    os.environ.update(json.loads(line))
    if path := os.environ.get(Env.LOG_FILE):
        with suppress(OSError):  # the disk is full: the output stays in the standby process's log
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.close(descriptor)


def report(error: BaseException, heartbeat: HeartbeatWriter, category: Category) -> None:
    """Write the error to the file that the supervisor reads, if there is a supervisor."""
    if path := os.environ.get(Env.ERROR_FILE):
        name = type(error).__name__
        stack = "" if isinstance(error, (InputError, *EXPLAINED)) else "".join(traceback.format_exception(error))
        described = RankError(
            type=name,
            message=str(error)[:MAX_MESSAGE],
            traceback=stack[-MAX_TRACEBACK:],
            step=heartbeat.step,
            phase=heartbeat.phase,
            category=category,
        )
        with suppress(OSError):  # the disk is full: the supervisor reads the log's end
            write_error(Path(path), described)


def category_of(error: BaseException) -> Category:
    """Return how the supervisor should treat the error."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)):
        return "out_of_memory"
    if isinstance(error, SpikeError):
        return "spike"
    is_unrecoverable = isinstance(error, EXPLAINED) and not isinstance(error, UnreachableError)
    return "unrecoverable" if is_unrecoverable else "exception"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a lingering thread of a library must not keep an ended rank alive.
    os._exit(code)
