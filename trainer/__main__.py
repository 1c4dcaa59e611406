"""A rank's entry: `python -m manta.trainer RUN`, alone, under torchrun, or under a supervisor.

A supervisor starts it with MANTA_STANDBY: it then imports everything, waits for its place on standard input (one line, a JSON
object of environment variables), and goes. That is what makes a restart cost no imports.
"""

import importlib
import json
import logging
import os
import signal
import sys
import traceback
from pathlib import Path

from manta.cluster.protocol import Category, Env, ExitCode, HeartbeatWriter, RankError, write_error
from manta.data.errors import InputError
from manta.trainer import stack_traces
from manta.trainer.checkpoint.errors import CheckpointError, LeftUnsavedError, SaveError, UnreachableError
from manta.trainer.stop_request import Notice

NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # what RuntimeErrors of torch's then say


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m manta.trainer RUN_DIRECTORY\n")
        return ExitCode.USAGE
    notice = Notice()
    if Env.STANDBY in os.environ:
        stand_by()
    stack_traces.answer(signal.SIGUSR2)
    place = f"attempt {os.environ.get(Env.ATTEMPT, '0')} rank {os.environ.get('RANK', '0')}"
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {place} %(name)s: %(message)s", force=True)
    heartbeat = HeartbeatWriter.from_environment()
    heartbeat("start", 0)
    try:
        from manta.trainer.rank import run

        return run(Path(sys.argv[1]), heartbeat, notice)
    except InputError as error:
        logging.getLogger("manta").error("%s", error)  # noqa: TRY400  the user's to mend: a trace would only hide it
        report(error, heartbeat, "input")
        return ExitCode.USAGE
    except BaseException as error:  # noqa: BLE001  whatever it was, the supervisor wants to know
        traceback.print_exc()
        report(error, heartbeat, _category(error))
        return ExitCode.UNSAVED if isinstance(error, LeftUnsavedError) else ExitCode.FAILED


def stand_by() -> None:
    """Gets warm, waits for a place, takes it. Ends the process where none comes: the supervisor is gone."""
    importlib.import_module("manta.trainer.rank")  # all that a rank will need

    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    os.environ.update(json.loads(line))
    if path := os.environ.get(Env.LOG_FILE):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, sys.stdout.fileno())
        os.dup2(descriptor, sys.stderr.fileno())
        os.close(descriptor)


def report(error: BaseException, heartbeat: HeartbeatWriter, category: Category) -> None:
    """Write the error to the file that the supervisor reads, if there is a supervisor."""
    if path := os.environ.get(Env.ERROR_FILE):
        described = RankError(
            type=type(error).__name__,
            message=str(error),
            traceback="".join(traceback.format_exception(error)),
            step=heartbeat.step,
            phase=heartbeat.phase,
            category=category,
        )
        write_error(Path(path), described)


def _category(error: BaseException) -> Category:
    """Return how the supervisor should treat the error."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)):
        return "out_of_memory"
    if isinstance(error, UnreachableError):
        return "exception"
    return "hopeless" if isinstance(error, CheckpointError | SaveError) else "exception"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a library's thread that lingers must not keep a rank that has ended.
    os._exit(code)
