"""Charts in text: bars, and shares stacked over time. Each source has a color, and a shade for terminals without color."""

import sys
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Column, Table
from rich.text import Text

COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta", "bright_yellow", "bright_green")
SHADES = "█▒░▓▚▞#+:="
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WIDTH = 110  # of a heading without a terminal
_UNLIMITED = 100_000  # characters, wider than any table
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_VISIBLE = _CONTROL_PICTURES | dict.fromkeys(range(128, 160), 0xFFFD)


number_column = partial(Column, justify="right", no_wrap=True)


class _ReportConsole(Console):
    """Names and messages in a report may be another user's."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


def console() -> Console:
    """Return a console for reports. On a terminal it wraps between words; elsewhere a line stays one line, for other programs."""
    is_terminal = sys.stdout.isatty()
    width = None if is_terminal else _UNLIMITED
    return _ReportConsole(highlight=False, markup=False, emoji=False, soft_wrap=not is_terminal, width=width)


def rule(out: Console, text: str) -> None:
    """Print a heading with a line after it."""
    out.print(Rule(text, align="left", characters="─", style="dim"), width=min(out.width, _WIDTH))


def plain_table(*columns: Column | str) -> Table:
    """Return a table without lines. A column given by its name alone is aligned right."""
    all_columns = [Column(column, justify="right", overflow="fold") if isinstance(column, str) else column for column in columns]
    return Table(*all_columns, box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")


def grid(columns: int) -> Table:
    """Return a table without lines and headers. On a narrow terminal no cell is cut."""
    return Table.grid(*(Column(overflow="fold") for _ in range(columns)), padding=(0, 2))


def bar(share: float, width: int) -> str:
    """Return a bar for a share of 1, in eighths of a character; any positive share is visible."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def swatch(index: int) -> Text:
    return Text(SHADES[index % len(SHADES)], style=color(index))


def stacked(columns: Sequence[Sequence[float]], height: int) -> list[Text]:
    """Return lines, top first. Each column has shares that sum to 1, the first of them at the bottom."""
    lines = [Text() for _ in range(height)]
    for shares in columns:
        ends = list(accumulate(shares))
        for line, text in enumerate(lines):
            text.append(swatch(bisect_right(ends, 1 - (line + 0.5) / height)))
    return lines


def visible(text: str) -> str:
    """Replace control characters, which a corpus or another user's run may contain, and which a terminal would obey."""
    return text.translate(_VISIBLE)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share == 0 or share >= 0.0005 else "< 0.1 %"
