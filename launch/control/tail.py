"""A file that another process adds to, read as it grows."""

from pathlib import Path


class Tail:
    """What has come since `start` bytes, and since the last time it was asked. A file that was cut is read from its beginning."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        self._read = start

    def new(self) -> bytes:
        """Nothing where there is no file yet."""
        try:
            with self.path.open("rb") as file:
                if self._read > file.seek(0, 2):
                    self._read = 0
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return b""
        self._read += len(text)
        return text

    def lines(self) -> bytes:
        """Whole lines alone: half of one waits for the rest."""
        text = self.new()
        half = len(text) - (text.rfind(b"\n") + 1)
        self._read -= half
        return text[: len(text) - half]
