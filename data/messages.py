"""Messages to the user: on a terminal wrapped between words, elsewhere as they are."""

import textwrap
from contextlib import suppress
from io import StringIO
from typing import TextIO

from rich.console import Console

from manta.data.errors import printable


class MessageConsole(Console):
    """Writes messages to standard output or standard error. If that is closed, or its reader is gone, it stays silent."""

    def __init__(self, stream: TextIO | None) -> None:
        stream = stream or StringIO()  # None: it was closed before this process started
        # Not rich's own check: FORCE_COLOR would make any file a terminal.
        super().__init__(file=stream, force_terminal=stream.isatty(), soft_wrap=True, highlight=False, markup=False, emoji=False)

    def message(self, text: str) -> None:
        """Print a message, parts of which may be another user's. A word that is longer than a line is not cut: a path can be copied."""
        text = printable(text).encode(self.encoding, "backslashreplace").decode(self.encoding)  # a file's name may be any bytes
        if self.is_terminal:
            wrapper = textwrap.TextWrapper(self.width, break_long_words=False, break_on_hyphens=False)
            text = "\n".join(wrapper.fill(line) for line in text.split("\n"))
        with suppress(OSError):  # its disk is full
            self.print(text)

    def on_broken_pipe(self) -> None:
        self.quiet = True
