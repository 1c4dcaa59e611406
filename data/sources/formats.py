"""Files become documents, each with its place: text and JSON lines here, tables in tables.py, each read as a stream.

A piece is what one worker encodes into one shard. It pickles, knows its files, and yields its documents in one fixed order.
Whatever is wrong with a file is told once, as an `InputError` that names file and line or row. Rows are never skipped in silence:
where config wants bad ones left out, each is yielded as `Refused`. A file that can not be read to its end is always an error.
"""

import io
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Protocol, cast
from urllib.parse import urlsplit

from manta.data.errors import InputError
from manta.data.sources.rows import Content, MixedKindsError, Reader, RowError, parse_json
from manta.data.storage.remote import is_remote, open_read

WHOLE = 64 * 1024  # characters; a longer text file is cut, so that even a lone input.txt has documents to hold out
DOCUMENT = 16 * 1024
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}

BadRows = Literal["fail", "skip"]

_FILE = 1 << 40  # a place in one of several text files is file * _FILE + character
_COUNTED = 1 << 30  # bytes; how far into a file each piece counts the lines before it, to name one that it skips
_UNCOUNTED = -1
_BUFFER = 1 << 20


class Document(NamedTuple):
    content: Content
    """Text, or the token ids that a row holds instead; never empty."""
    place: int
    """Where it stands in its piece, as `Piece.where` spells it; it rises from document to document."""


class Refused(NamedTuple):
    problem: str
    """One line: file, line or row, and what is wrong there."""


class Piece(Protocol):
    """What one worker turns into one shard."""

    @property
    def name(self) -> str:
        """What to call it in an error."""
        ...

    @property
    def size(self) -> int:
        """Bytes on disk, for the progress bar; 0 where that is unknown."""
        ...

    def documents(self) -> Iterator[Document | Refused]: ...

    def where(self, place: int) -> str:
        """A document's place for a person: file and line, or row. May read the file."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """Plain text: one file is one document, a file of more than 64 Ki characters is several of about 16 Ki."""

    paths: tuple[str, ...]
    size: int
    bad_rows: BadRows = "fail"
    lenient: bool = False
    """Pass over empty and undecodable files: the standard library's own tests hold such on purpose."""

    @property
    def name(self) -> str:
        return self.paths[0] if len(self.paths) == 1 else f"{self.paths[0]} … {self.paths[-1]}"

    def documents(self) -> Iterator[Document | Refused]:
        for index, path in enumerate(self.paths):
            at, line = index * _FILE, 1
            with _opened_text(path) as text:
                for part in _whole_or_cut(text):
                    if (bad := _undecodable(part)) is None:
                        yield Document(part, at)
                    elif not self.lenient:
                        bad_line = line + part.count("\n", 0, bad)
                        problem = RowError(f"not UTF-8 (byte 0x{ord(part[bad]) - 0xDC00:02x}); convert the file")
                        yield refused(f"{path}: line {bad_line}", problem, self.bad_rows)
                    at, line = at + len(part), line + part.count("\n")

    def where(self, place: int) -> str:
        index, left = divmod(place, _FILE)
        line = 1
        with _opened_text(self.paths[index]) as text:
            while left > 0 and (block := text.read(min(left, 1 << 20))):
                left, line = left - len(block), line + block.count("\n")
        return f"{self.paths[index]}: from line {line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonLines:
    """One JSON object a line; the lines that begin in [start, stop), so that cores share a large file. A place is a line's first byte."""

    path: str
    reader: Reader
    start: int
    stop: int | None
    size: int
    bad_rows: BadRows = "fail"

    @property
    def name(self) -> str:
        return self.path if self.start == 0 else f"{self.path} from byte {self.start}"

    def documents(self) -> Iterator[Document | Refused]:
        offset = self.start
        lines_before: int | None = None
        with _opened(self.path) as stream:
            if self.start:  # a line belongs to the range that holds its first byte
                stream.seek(self.start - 1)
                offset += len(stream.readline()) - 1
            first = offset
            for number, line in enumerate(stream, start=1):
                if self.stop is not None and offset >= self.stop:
                    return
                try:
                    content = "" if line.isspace() else self.reader.of(parse_json(line))
                except RowError as problem:
                    if lines_before is None:
                        lines_before = self._lines_before(first)
                    at = f"byte {offset}" if lines_before == _UNCOUNTED else f"line {lines_before + number}"
                    yield refused(f"{self.path}: {at}", problem, self.bad_rows)
                else:
                    if len(content):
                        yield Document(content, offset)
                offset += len(line)

    def where(self, place: int) -> str:
        return f"{self.path}: line {1 + _count_lines(self.path, place)}"

    def _lines_before(self, first: int) -> int:
        """Asked once something is wrong. Of a huge file each piece may have a bad line to skip; it does not read all before it for that."""
        far = is_remote(self.path) or (self.bad_rows == "skip" and first > _COUNTED)
        return _UNCOUNTED if first and far else _count_lines(self.path, first)


def refused(where: str, problem: RowError, policy: BadRows) -> Refused:
    """What to yield in place of a bad row where bad rows are skipped; else InputError."""
    told = f"{where}: {problem}"
    if policy == "fail" or isinstance(problem, MixedKindsError):
        raise InputError(told) from None
    return Refused(told)


def suffix_of(path: str) -> str:
    """What tells a file's format: its suffix, without that of its compression."""
    stem, suffix = _split(path)
    return _split(stem)[1] if suffix in COMPRESSED else suffix


def compression_of(path: str) -> str | None:
    return COMPRESSED.get(_split(path)[1])


def unreadable(path: str, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"{path}: no access ({one_line(error)}); wants a file that this user may read: change its permissions"
    return f"{path}: cannot be read ({one_line(error)}); it may be truncated or damaged: fetch it again"


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _split(path: str) -> tuple[str, str]:
    """The last name and its suffix; of a web address, what it asks for is no part of them. A corpus may be a million files: no Path."""
    name = (urlsplit(path).path if path.startswith(("http://", "https://")) else path).rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    return (stem, dot + suffix) if stem else (name, "")


@contextmanager
def _opened(path: str) -> Generator[BinaryIO]:
    """Decompressed where the name says so. pyarrow's streams, unlike zstandard's and for all formats alike, refuse a truncated file."""
    compression = compression_of(path)
    try:
        with open_read(path) if is_remote(path) else Path(path).open("rb", _BUFFER) as raw:
            if compression is None:
                yield raw
                return
            import pyarrow as pa

            unpacked = cast("io.RawIOBase", pa.input_stream(raw, compression=compression))
            with io.BufferedReader(unpacked, _BUFFER) as stream:
                yield stream
    except OSError as error:
        raise InputError(unreadable(path, error)) from None


@contextmanager
def _opened_text(path: str) -> Generator[io.TextIOWrapper]:
    """Letter for letter; what is not UTF-8 comes as lone surrogates, so that it is known where it stands."""
    with _opened(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        yield text


def _whole_or_cut(text: io.TextIOWrapper) -> Iterator[str]:
    """One document, or, where the file is long, parts that end at a blank line, else a line, else a word."""
    rest = text.read(WHOLE + 1)
    if len(rest) > WHOLE:
        while True:
            while len(rest) > DOCUMENT:
                at = _cut(rest)
                yield rest[:at]
                rest = rest[at:]
            block = text.read(DOCUMENT)
            if not block:
                break
            rest += block
    if rest:
        yield rest


def _cut(text: str) -> int:
    for separator in ("\n\n", "\n", " "):
        at = text.rfind(separator, DOCUMENT // 2, DOCUMENT)
        if at >= 0:
            return at + len(separator)
    return DOCUMENT


def _undecodable(part: str) -> int | None:
    """The first character that stands for a byte that is no UTF-8, if any."""
    if not part.isascii():
        try:
            part.encode()
        except UnicodeEncodeError as error:
            return error.start
    return None


def _count_lines(path: str, stop: int) -> int:
    """Line ends in the first `stop` bytes."""
    lines = 0
    with _opened(path) as stream:
        while stop > 0 and (block := stream.read(min(stop, 1 << 20))):
            stop, lines = stop - len(block), lines + block.count(b"\n")
    return lines
