"""Files become documents: text, JSON lines, parquet tables and Hugging Face datasets, each read as a stream.

A piece is what one worker encodes into one shard. It pickles, knows its files, and yields its documents in one fixed order.
Whatever is wrong with a file is told once, as an `InputError` that names file and line or row: rows are never skipped in silence.
"""

import difflib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from manta.data.errors import InputError

WHOLE = 64 * 1024  # characters; a longer text file is cut, so that even a lone input.txt has documents to hold out
DOCUMENT = 16 * 1024
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


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

    def documents(self) -> Iterator[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """Plain text: one file is one document, a file of more than 64 Ki characters is several of about 16 Ki."""

    paths: tuple[str, ...]
    size: int
    lenient: bool = False
    """Pass over empty and undecodable files: the standard library's own tests hold such on purpose."""

    @property
    def name(self) -> str:
        return self.paths[0] if len(self.paths) == 1 else f"{self.paths[0]} … {self.paths[-1]}"

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            try:
                with _open(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
                    yield from _whole_or_cut(text)
            except UnicodeDecodeError as error:
                if not self.lenient:
                    raise InputError(f"{path}: line {_undecodable_line(path)}: not UTF-8 ({error.reason}); convert the file") from None
            except OSError as error:
                raise InputError(_unreadable(path, error)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonLines:
    """One JSON object a line, its text in one field; the lines that begin in [start, stop), so that cores share a large file."""

    path: str
    field: str
    start: int
    stop: int | None
    size: int

    @property
    def name(self) -> str:
        return self.path if self.start == 0 else f"{self.path} from byte {self.start}"

    def documents(self) -> Iterator[str]:
        offset = self.start
        try:
            with _open(self.path) as stream:
                if self.start:  # a line belongs to the range that holds its first byte
                    stream.seek(self.start - 1)
                    offset += len(stream.readline()) - 1
                for line in stream:
                    if self.stop is not None and offset >= self.stop:
                        return
                    if line.strip() and (text := self._text(line, offset)):
                        yield text
                    offset += len(line)
        except OSError as error:
            raise InputError(_unreadable(self.path, error)) from None

    def _text(self, line: bytes, offset: int) -> str:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise InputError(f"{self._where(offset)}: not UTF-8 ({error.reason}); convert the file") from None
        except ValueError as error:
            raise InputError(f"{self._where(offset)}: malformed JSON ({error}); wants one JSON object a line") from None
        if not isinstance(record, dict):
            got = type(cast("object", record)).__name__
            raise InputError(f"{self._where(offset)}: got a JSON {got}; wants one JSON object a line with a field {self.field!r}")
        if problem := _field_problem(cast("dict[str, Any]", record), self.field):
            raise InputError(f"{self._where(offset)}: {problem}")
        return record[self.field]

    def _where(self, offset: int) -> str:
        """Lines are counted only once something is wrong: a range does not know how many stand before it."""
        with _open(self.path) as stream:
            number, at = 1, 0
            for line in stream:
                if at >= offset:
                    break
                number, at = number + 1, at + len(line)
        return f"{self.path}: line {number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parquet:
    """A parquet file, its text in one column."""

    path: str
    field: str
    size: int

    @property
    def name(self) -> str:
        return self.path

    def documents(self) -> Iterator[str]:
        from pyarrow import ArrowException, parquet

        try:
            with parquet.ParquetFile(self.path) as table:
                self._check_columns(table.schema_arrow.names)
                batches = table.iter_batches(batch_size=1024, columns=[self.field])
                rows = (row for batch in batches for row in batch.to_pylist())
                yield from _texts(rows, self.field, f"{self.path}: row")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: column {self.field!r}: not UTF-8 ({error.reason}); convert it") from None
        except (OSError, ArrowException) as error:
            raise InputError(_unreadable(self.path, error)) from None

    def _check_columns(self, columns: list[str]) -> None:
        if self.field not in columns:
            raise InputError(f"{self.path}: {_no_field(self.field, columns)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFace:
    """One shard of a Hugging Face dataset's train split, streamed."""

    dataset: str
    config: str | None
    field: str
    index: int
    count: int
    size: int = 0

    @property
    def name(self) -> str:
        return f"hf:{self.dataset} shard {self.index}"

    def documents(self) -> Iterator[str]:
        from datasets.exceptions import DatasetsError

        where = f"hf:{self.dataset}: shard {self.index}"
        stream: Iterable[dict[str, Any]] = open_dataset(self.dataset, self.config).shard(self.count, self.index)
        try:
            yield from _texts(stream, self.field, f"{where}, row")
        except InputError:
            raise
        except (OSError, ValueError, DatasetsError) as error:
            raise InputError(_unreadable(where, error)) from None


def open_dataset(dataset: str, config: str | None) -> Any:
    """The train split as a stream; nothing is downloaded whole, no code of the dataset's is run."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(dataset, config, split="train", streaming=True)
    except (ValueError, OSError, DatasetsError) as error:
        raise InputError(
            f"data.sources: hf:{dataset}: cannot be opened ({_one_line(error)}); check its name, config and your login"
        ) from None


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


def _texts(rows: Iterable[dict[str, Any]], field: str, where: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        if problem := _field_problem(row, field):
            raise InputError(f"{where} {number}: {problem}")
        if row[field]:
            yield row[field]


def _field_problem(record: dict[str, Any], field: str) -> str | None:
    if field not in record:
        return _no_field(field, list(record))
    value = record[field]
    if not isinstance(value, str):
        return f"field {field!r} is {type(value).__name__}; wants text"
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; UTF-8, and so a tokenizer, can not
        return f"field {field!r} holds a lone surrogate, which is no text; mend or drop the line"
    return None


def _no_field(field: str, names: list[str]) -> str:
    near = difflib.get_close_matches(field, names, n=3, cutoff=0.4) or names[:8]
    return f"no field {field!r}; it has {', '.join(map(repr, near)) or 'none'}; set data.text_field"


def _open(path: str) -> io.BufferedReader:
    """Decompressed where the name says so. pyarrow's streams, unlike zstandard's and for all formats alike, refuse a truncated file."""
    compression = COMPRESSED.get(Path(path).suffix)
    if compression is None:
        return open(path, "rb")  # noqa: PTH123  the caller closes it
    import pyarrow as pa

    return io.BufferedReader(cast("io.RawIOBase", pa.input_stream(path, compression=compression)), 1 << 20)


def _undecodable_line(path: str) -> int:
    """Asked only after a decoder has failed; a text decoder does not know its line."""
    number = 0
    with _open(path) as stream:
        for line in stream:
            number += 1
            try:
                line.decode()
            except UnicodeDecodeError:
                break
    return number


def _unreadable(path: str, error: Exception) -> str:
    return f"{path}: cannot be read ({_one_line(error)}); it may be truncated or damaged: fetch it again"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
