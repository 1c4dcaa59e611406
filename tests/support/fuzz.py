"""Run commands on bad input, in this process, and check what every command promises about it.

No traceback, no hang, no line that fills a terminal, and an exit code that the documentation names.
"""

import io
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from manta.cluster.protocol import ExitCode
from manta.launch import cli

SECONDS = 10.0
LONGEST_LINE = 2000


class HangError(BaseException):
    """Not an Exception, so that no handler of the command swallows it."""


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def manta(*arguments: str, seconds: float = SECONDS) -> Outcome:
    """Run a `manta` command. Raises what the command does not handle, and HangError if it takes longer than `seconds`."""
    with patch.object(sys, "argv", ["manta", *arguments]):
        return _outcome(cli.main, seconds)


def call(action: Callable[[], object], *, seconds: float = SECONDS) -> Outcome:
    """Run what a command would call, and report its errors as the command line does."""
    with patch.object(cli, "app", lambda **_: action()):
        return _outcome(cli.main, seconds)


def assert_refused_or_done(outcome: Outcome, *codes: int) -> None:
    """Assert what holds for any input. `codes`: the exit codes that this command may have; by default, any documented one."""
    allowed = codes or tuple(int(code) for code in ExitCode)
    assert outcome.code in allowed, f"exit code {outcome.code}\n{outcome.output[-3000:]}"
    assert "Traceback (most recent call last)" not in outcome.output, outcome.output[-3000:]
    longest = max((len(line) for line in outcome.output.splitlines()), default=0)
    assert longest <= LONGEST_LINE, f"a line of {longest} characters: {outcome.output[:500]}"
    if outcome.code in {ExitCode.USAGE, ExitCode.FAILED}:
        assert outcome.stderr.strip(), "it failed without a word"


def _outcome(action: Callable[[], None], seconds: float) -> Outcome:
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    code = 0
    with _limit(seconds), redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            action()
        except SystemExit as end:
            code = 0 if end.code is None else int(end.code)
    return Outcome(code, *(stream.buffer.getvalue().decode("utf-8", "surrogateescape") for stream in (stdout, stderr)))


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    started = time.monotonic()

    def expire(*_: object) -> None:
        raise HangError(f"still running after {time.monotonic() - started:.1f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
