"""Pictures of letters: bars, and shares stacked over time. Each source has a colour and a shade, for where there are no colours."""

import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta", "bright_yellow", "bright_green")
SHADES = "█▒░▓▚▞#+:="
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WIDTH = 110  # where there is no terminal
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)


def console() -> Console:
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, markup=False, emoji=False, width=None if wide else _WIDTH)


def bar(share: float, width: int) -> str:
    """A share of 1, in eighths of a letter; what is more than nothing is seen."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def swatch(index: int) -> Text:
    return Text(SHADES[index % len(SHADES)] * 2, style=colour(index))


def stacked(columns: Sequence[Sequence[float]], height: int) -> list[Text]:
    """Lines from the top down: in each column shares, which sum to 1, the first lowest."""
    lines: list[Text] = []
    for line in range(height):
        middle = 1 - (line + 0.5) / height
        drawn = Text()
        for shares in columns:
            index = _at(shares, middle)
            drawn.append(SHADES[index % len(SHADES)], style=colour(index))
        lines.append(drawn)
    return lines


def visible(text: str) -> str:
    """With a picture for each control character: a corpus may hold what would move a terminal's cursor."""
    return text.translate(_PICTURES)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share == 0 or share >= 0.0005 else "< 0.1 %"


def _at(shares: Sequence[float], place: float) -> int:
    """Whose share this place is in."""
    end = 0.0
    for index, share in enumerate(shares):
        end += share
        if place < end:
            return index
    return max(index for index, share in enumerate(shares) if share > 0)
