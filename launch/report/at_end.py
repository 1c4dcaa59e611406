"""The report that a run writes when it ends."""

import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from manta.cluster.supervise.requests import STOP_SIGNALS
from manta.data.errors import InputError
from manta.data.messages import MessageConsole
from manta.launch.report.html import write_report
from manta.launch.report.texts import SECONDS, add_texts
from manta.trainer.run_directory import RunDirectory

LARGEST = 1 << 28  # bytes of metrics up to which there is a report


def write_at_end(directory: Path, texts: int = 0) -> None:
    """Write the report of a run that has ended, and print its path, or in a line why there is none: a report never fails a run.

    texts: how many to generate with the newest checkpoint before. A stop signal ends that; it has nothing else to stop any more.
    """
    run_dir, show = RunDirectory(directory.absolute()), MessageConsole(sys.stdout).message
    with _stop_signals() as is_stopped:
        problem = ""
        if texts:
            show(f"generating texts: {texts}, for {SECONDS:g} s at most; Ctrl-C skips them")
            problem = _generate(run_dir, texts, lambda: is_stopped() or run_dir.stop_request_file.exists())
            show(f"texts are missing: {problem}" if problem else f"texts: {run_dir.samples_file}")
        if line := _write(run_dir, problem):
            show(line)


def _generate(run_dir: RunDirectory, texts: int, is_stopped: Callable[[], bool]) -> str:
    """Return why texts are missing, if any are."""
    try:
        return add_texts(run_dir, texts, is_stopped=is_stopped) or ""
    except Exception as error:  # noqa: BLE001  whatever is wrong with the texts, the run is done
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _write(run_dir: RunDirectory, problem: str) -> str:
    """Return what to print: nothing if there is nothing to report, or nothing has happened since the last report."""
    try:
        if not run_dir.metrics_file.exists() or _is_new(run_dir.path / "report.html", run_dir):
            return ""
        if run_dir.metrics_file.stat().st_size > LARGEST:
            return f"no report yet, because the run is long; write it with: manta report {run_dir.quoted}"
        return f"report: {write_report(run_dir.path, problem=problem)}"
    except InputError as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # noqa: BLE001  whatever is wrong with the report, the run has ended
        reason = f"{type(error).__name__}: {error}"
    return f"no report: {' '.join(reason.split())[:500]}"


def _is_new(report: Path, run_dir: RunDirectory) -> bool:
    return report.exists() and report.stat().st_mtime > run_dir.events_file.stat().st_mtime


@contextmanager
def _stop_signals() -> Generator[Callable[[], bool]]:
    """Only take notice of stop signals. Yields a function that returns whether one came."""
    received = list[int]()

    def record(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    handlers = {number: signal.signal(number, record) for number in handled}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
