"""Follow a file that another process appends to."""

from pathlib import Path


class Tail:
    """Returns what was appended after byte `start`, and since the last call. A truncated file is read from its start."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        self._position = start

    def new(self) -> bytes:
        """Return the new bytes; none if there is no file yet."""
        try:
            with self.path.open("rb") as file:
                if self._position > file.seek(0, 2):
                    self._position = 0
                file.seek(self._position)
                content = file.read()
        except FileNotFoundError:
            return b""
        self._position += len(content)
        return content

    def lines(self) -> bytes:
        """Return the new complete lines. An incomplete last line is returned later, with its rest."""
        content = self.new()
        incomplete = len(content) - (content.rfind(b"\n") + 1)
        self._position -= incomplete
        return content[: len(content) - incomplete]
