"""How far a long preparation is: a bar on a terminal, a few plain lines elsewhere, always on stderr."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


def say(message: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(message)


@contextmanager
def progress(title: str, total: int) -> Generator[Callable[[int], None]]:
    """Gives a function to be told of each amount done, in bytes of `total`."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        done, told = 0, 0

        def line(amount: int) -> None:
            nonlocal done, told
            done += amount
            if 4 * done // max(total, 1) > told:
                told = 4 * done // max(total, 1)
                console.print(f"{title} {100 * done // max(total, 1)} % of {total / 1e6:.1f} MB")

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)
