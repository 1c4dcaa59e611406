"""Plain text and JSON lines as input splits."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Self

from manta.data.sources.input_split import BadRow, Document, ReadOptions
from manta.data.sources.rows import RowError, parse_json
from manta.data.storage import positions
from manta.data.storage.location import StoredFile
from manta.data.storage.positions import FILE, Places
from manta.data.storage.store import open_store
from manta.data.storage.streams import compression_of, open_bytes, open_text

# Characters: a longer text file is cut, so that a single input.txt can be split into training and validation documents.
MAX_DOCUMENT = 64 * 1024
CUT_DOCUMENT = 16 * 1024

_BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSplit:
    """Plain text: a file is one document; a file of more than 64 Ki characters is several of about 16 Ki."""

    paths: tuple[str, ...]
    size: int
    options: ReadOptions

    @classmethod
    def from_files(cls, files: Sequence[StoredFile], options: ReadOptions, _split_bytes: int) -> Iterator[Self]:
        """Yield one split for all of these files."""
        yield cls(paths=tuple(file.path for file in files), size=sum(file.size for file in files), options=options)

    @property
    def name(self) -> str:
        return self.paths[0] if len(self.paths) == 1 else f"{self.paths[0]} … {self.paths[-1]}"

    @property
    def places(self) -> Places:
        return Places(unit="character", paths=self.paths)

    def documents(self) -> Iterator[Document | BadRow]:
        for index, path in enumerate(self.paths):
            position, line = index * FILE, 1
            with open_text(path) as text:
                for part in _cut(text):
                    if (bad := _undecodable(part)) is None:
                        yield Document(part, position)
                    elif not self.options.ignore_undecodable:
                        error = RowError(f"expected UTF-8, got byte 0x{ord(part[bad]) - 0xDC00:02x}. Convert the file.")
                        bad_line = line + part.count("\n", 0, bad)
                        yield self.options.bad_row(f"{path}: line {bad_line}", error)
                    position, line = position + len(part), line + part.count("\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonLinesSplit:
    """One JSON object per line: the lines that start in bytes [start, stop). A position is the first byte of a line."""

    path: str
    start: int
    stop: int | None
    size: int
    options: ReadOptions

    @classmethod
    def from_files(cls, files: Sequence[StoredFile], options: ReadOptions, split_bytes: int) -> Iterator[Self]:
        """Yield byte ranges of plain files, and compressed files whole: those can only be read from their start."""
        for file in files:
            if compression_of(file.path) is not None:
                yield cls(path=file.path, start=0, stop=None, size=file.size, options=options)
                continue
            for start in range(0, file.size, split_bytes):
                stop = min(start + split_bytes, file.size)
                yield cls(path=file.path, start=start, stop=stop, size=stop - start, options=options)

    @property
    def name(self) -> str:
        return self.path if self.start == 0 else f"{self.path} from byte {self.start}"

    @property
    def places(self) -> Places:
        return Places(unit="byte", paths=(self.path,))

    def documents(self) -> Iterator[Document | BadRow]:
        with open_bytes(self.path) as stream:
            first, lines_before = self.start, -1
            if self.start:  # a line belongs to the range that holds its first byte
                stream.seek(self.start - 1)
                first += _skip_line(stream) - 1
            for number, (offset, line) in enumerate(_lines(stream, first, self.options.longest_document), start=1):
                if self.stop is not None and offset >= self.stop:
                    return
                try:
                    if line is None:
                        raise self.options.too_long()
                    content = "" if line.isspace() else self.options.reader.read(parse_json(line))
                except RowError as error:
                    is_near = self.options.bad_rows != "skip" or first <= positions.MAX_COUNTED
                    countable = not first or (open_store(self.path).is_local and is_near)
                    if countable and lines_before < 0:
                        lines_before = positions.count_lines(self.path, first)
                    at = f"line {lines_before + number}" if countable else f"byte {offset}"
                    yield self.options.bad_row(f"{self.path}: {at}", error)
                else:
                    if len(content):
                        yield Document(content, offset)


def _lines(stream: BinaryIO, offset: int, longest: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield the first byte of each line, and the line; None for one that is too long, which is not held in memory."""
    while line := stream.readline(longest + 1):
        is_whole = len(line) <= longest or line.endswith(b"\n")
        yield offset, line if is_whole else None
        offset += len(line) + (0 if is_whole else _skip_line(stream))


def _skip_line(stream: BinaryIO) -> int:
    """Read up to the end of a line. Return the number of its bytes."""
    count = 0
    while part := stream.readline(_BLOCK):
        count += len(part)
        if part.endswith(b"\n"):
            break
    return count


def _cut(text: io.TextIOWrapper) -> Iterator[str]:
    """Yield a short file whole, and a long one in parts that end at a blank line, else at a line, else at a word."""
    rest = text.read(MAX_DOCUMENT + 1)
    if len(rest) > MAX_DOCUMENT:
        while True:
            while len(rest) > CUT_DOCUMENT:
                end = _last_break(rest)
                yield rest[:end]
                rest = rest[end:]
            block = text.read(CUT_DOCUMENT)
            if not block:
                break
            rest += block
    if rest:
        yield rest


def _last_break(text: str) -> int:
    for separator in ("\n\n", "\n", " "):
        index = text.rfind(separator, CUT_DOCUMENT // 2, CUT_DOCUMENT)
        if index >= 0:
            return index + len(separator)
    return CUT_DOCUMENT


def _undecodable(part: str) -> int | None:
    """Return the index of the first character that stands for a byte that is not UTF-8, if any."""
    if not part.isascii():
        try:
            part.encode()
        except UnicodeEncodeError as error:
            return error.start
    return None
