"""The report that a run writes when it ends."""

import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from manta.cluster.supervise.requests import STOP_SIGNALS
from manta.data.errors import InputError
from manta.data.messages import MessageConsole
from manta.launch.report.html import write_report
from manta.trainer.run_directory import RunDirectory

LARGEST = 1 << 28  # bytes of metrics up to which there is a report


def write_at_end(directory: Path) -> None:
    """Write the report of a run that has ended, and print its path, or in a line why there is none: a report never fails a run."""
    with _no_stop_signals():  # they have nothing to stop any more
        if line := _write(RunDirectory(directory.absolute())):
            MessageConsole(sys.stdout).message(line)


def _write(run_dir: RunDirectory) -> str:
    """Return what to print: nothing if there is nothing to report, or nothing has happened since the last report."""
    try:
        if not run_dir.metrics_file.exists() or _is_new(run_dir.path / "report.html", run_dir):
            return ""
        if run_dir.metrics_file.stat().st_size > LARGEST:
            return f"no report yet, because the run is long; write it with: manta report {run_dir.quoted}"
        return f"report: {write_report(run_dir.path)}"
    except InputError as error:
        problem = str(error)
    except OSError as error:
        problem = error.strerror or str(error)
    except Exception as error:  # noqa: BLE001  whatever is wrong with the report, the run has ended
        problem = f"{type(error).__name__}: {error}"
    return f"no report: {' '.join(problem.split())[:500]}"


def _is_new(report: Path, run_dir: RunDirectory) -> bool:
    return report.exists() and report.stat().st_mtime > run_dir.events_file.stat().st_mtime


@contextmanager
def _no_stop_signals() -> Generator[None]:
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
