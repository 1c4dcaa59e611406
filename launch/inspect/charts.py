"""Charts in text: bars, and shares stacked over time. Each source has a color, and a shade for terminals without color."""

import os
import sys
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from rich.console import Console
from rich.table import Table
from rich.text import Text

COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta", "bright_yellow", "bright_green")
SHADES = "█▒░▓▚▞#+:="
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WIDTH = 110  # without a terminal
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_VISIBLE = _CONTROL_PICTURES | dict.fromkeys(range(128, 160), 0xFFFD)


def console() -> Console:
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, markup=False, emoji=False, width=None if wide else _WIDTH)


def plain_table(*columns: str, left: Sequence[str] = ()) -> Table:
    """Return a table without lines. Its columns are aligned right, except for those in `left`."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def bar(share: float, width: int) -> str:
    """Return a bar for a share of 1, in eighths of a character; any positive share is visible."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def swatch(index: int) -> Text:
    return Text(SHADES[index % len(SHADES)] * 2, style=color(index))


def stacked(columns: Sequence[Sequence[float]], height: int) -> list[Text]:
    """Return lines, top first. Each column has shares that sum to 1, the first of them at the bottom."""
    lines = [Text() for _ in range(height)]
    for shares in columns:
        ends = list(accumulate(shares))
        for line, text in enumerate(lines):
            index = bisect_right(ends, 1 - (line + 0.5) / height)
            text.append(SHADES[index % len(SHADES)], style=color(index))
    return lines


def visible(text: str) -> str:
    """Replace control characters, which a corpus may contain and which could move the terminal's cursor."""
    return text.translate(_VISIBLE)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share == 0 or share >= 0.0005 else "< 0.1 %"
