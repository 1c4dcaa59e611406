"""Tables become documents: parquet, Arrow IPC, and Hugging Face datasets. A place is a row's number in its table, from 0."""

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from manta.data.errors import InputError
from manta.data.sources.formats import BadRows, Document, Refused, one_line, refused, unreadable
from manta.data.sources.rows import Content, Field, Reader, RowError, Undecodable
from manta.data.storage.remote import is_remote, open_read

_BATCH = 1024  # rows held as Python objects at once


class _Table(Protocol):
    @property
    def reader(self) -> Reader: ...
    @property
    def first_row(self) -> int: ...
    @property
    def bad_rows(self) -> BadRows: ...
    def where(self, place: int) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parquet:
    """A parquet file, or some row groups of a large one."""

    path: str
    reader: Reader
    size: int
    groups: tuple[int, int] | None = None
    """First and end; all where left out."""
    first_row: int = 0
    bad_rows: BadRows = "fail"

    @property
    def name(self) -> str:
        return self.path if self.groups is None else f"{self.path} from row {self.first_row + 1}"

    def documents(self) -> Iterator[Document | Refused]:
        with _opened_parquet(self.path) as table:
            _check_columns(self.path, table.schema_arrow.names, self.reader)
            groups = range(*self.groups) if self.groups else range(table.num_row_groups)
            batches = table.iter_batches(batch_size=_BATCH, row_groups=list(groups), columns=list(self.reader.names))
            columns = (_columns(batch, self.reader) for batch in batches)
            yield from _documents(self, (content for row in columns for content in _contents(row, self.reader)))

    def where(self, place: int) -> str:
        return f"{self.path}: row {place + 1}"

    def shared(self, piece_bytes: int) -> "Iterator[Parquet]":
        """The same rows in pieces of about so many bytes on disk, so that cores share a large file; a row group is never cut."""
        if self.size <= piece_bytes:
            yield self
            return
        with _opened_parquet(self.path) as table:
            groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
        on_disk = self.size / max(sum(group.total_byte_size for group in groups), 1)
        first, first_row, rows, unpacked = 0, 0, 0, 0
        for end, group in enumerate(groups, start=1):
            rows, unpacked = rows + group.num_rows, unpacked + group.total_byte_size
            if unpacked * on_disk >= piece_bytes or end == len(groups):
                yield replace(self, groups=(first, end), first_row=first_row, size=round(unpacked * on_disk))
                first, first_row, rows, unpacked = end, first_row + rows, 0, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrow:
    """An Arrow IPC file, of its file or its stream format (what `datasets` saves), or some rows of a large one."""

    path: str
    reader: Reader
    size: int
    first_row: int = 0
    end_row: int | None = None
    bad_rows: BadRows = "fail"

    @property
    def name(self) -> str:
        return self.path if self.first_row == 0 else f"{self.path} from row {self.first_row + 1}"

    def documents(self) -> Iterator[Document | Refused]:
        with _opened_arrow(self.path) as (names, batches):
            _check_columns(self.path, names, self.reader)
            slices = _slices(batches, self.first_row, self.end_row)
            columns = ([_sound(column) for column in _columns(batch, self.reader)] for batch in slices)
            yield from _documents(self, (content for row in columns for content in _contents(row, self.reader)))

    def where(self, place: int) -> str:
        return f"{self.path}: row {place + 1}"

    def shared(self, piece_bytes: int) -> "Iterator[Arrow]":
        """The same rows in pieces of about so many bytes. Batches of a local file are passed over unread, a remote one's are not."""
        count = ceil(self.size / piece_bytes)
        if count <= 1 or is_remote(self.path):
            yield self
            return
        with _opened_arrow(self.path) as (_, batches):
            rows = sum(batch.num_rows for batch in batches)
        for part in range(count):
            first, end = rows * part // count, rows * (part + 1) // count
            if first < end:
                yield replace(self, first_row=first, end_row=end, size=self.size * (end - first) // rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFace:
    """One shard of a Hugging Face dataset's train split, streamed."""

    dataset: str
    config: str | None
    reader: Reader
    index: int
    count: int
    size: int = 0
    bad_rows: BadRows = "fail"

    @property
    def first_row(self) -> int:
        return 0

    @property
    def name(self) -> str:
        return f"hf:{self.dataset} shard {self.index}"

    def documents(self) -> Iterator[Document | Refused]:
        from datasets.exceptions import DatasetsError

        stream: Iterable[dict[str, Any]] = open_dataset(self.dataset, self.config).shard(self.count, self.index)
        try:
            yield from _documents(self, (_content(row, self.reader) for row in stream))
        except InputError:
            raise
        except (OSError, ValueError, DatasetsError) as error:
            raise InputError(unreadable(self.name, error)) from None

    def where(self, place: int) -> str:
        return f"{self.name}, row {place + 1}"


def open_dataset(dataset: str, config: str | None) -> Any:
    """The train split as a stream; nothing is downloaded whole, no code of the dataset's is run."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(dataset, config, split="train", streaming=True)
    except (ValueError, OSError, DatasetsError) as error:
        raise InputError(
            f"data.sources: hf:{dataset}: cannot be opened ({one_line(error)}); check its name, config and your login"
        ) from None


@contextmanager
def _opened_parquet(path: str) -> Generator[Any]:
    from pyarrow import ArrowException, parquet

    try:
        with open_read(path) if is_remote(path) else nullcontext(path) as source, parquet.ParquetFile(source) as table:
            yield table
    except (OSError, ArrowException, UnicodeDecodeError) as error:  # the last of a column's name
        raise InputError(unreadable(path, error)) from None


@contextmanager
def _opened_arrow(path: str) -> Generator[tuple[list[str], Iterator[Any]]]:
    """Its columns' names and its batches. Only a file's format, and a stream's last eight bytes, tell that it was written to its end."""
    import pyarrow as pa

    try:
        with pa.PythonFile(open_read(path), mode="r") if is_remote(path) else pa.memory_map(path) as file:
            if file.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(file)
                yield reader.schema.names, (reader.get_batch(index) for index in range(reader.num_record_batches))
                return
            file.seek(max(0, file.size() - 8))
            if file.read(8) != b"\xff\xff\xff\xff\0\0\0\0":
                raise InputError(f"{path}: no Arrow file, or one that was not written to its end; fetch it again")
            file.seek(0)
            reader = pa.ipc.open_stream(file)
            yield reader.schema.names, iter(reader)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last of a column's name
        raise InputError(unreadable(path, error)) from None


def _check_columns(path: str, names: list[str], reader: Reader) -> None:
    """A column that is missing is missing in each row, so none is skipped for it."""
    if problem := reader.missing(names):
        raise InputError(f"{path}: {problem}")


def _slices(batches: Iterable[Any], first: int, end: int | None) -> Iterator[Any]:
    """Rows [first, end) in batches of no more than _BATCH rows: whoever wrote them may have put all into one."""
    at = 0
    for batch in batches:
        last = batch.num_rows if end is None else min(batch.num_rows, end - at)
        for start in range(max(first - at, 0), last, _BATCH):
            yield batch.slice(start, min(_BATCH, last - start))
        at += batch.num_rows
        if end is not None and at >= end:
            return


def _documents(table: _Table, contents: Iterable[Content | RowError]) -> Iterator[Document | Refused]:
    for row, content in enumerate(contents, start=table.first_row):
        if isinstance(content, RowError):
            yield refused(table.where(row), content, table.bad_rows)
        elif len(content):
            yield Document(content, row)


def _columns(batch: Any, reader: Reader) -> list[Any]:
    return [batch.column(batch.schema.names.index(name)) for name in reader.names]


def _sound(column: Any) -> Any:
    """Raises where its numbers point outside of its bytes: they are a file's as they are, and to follow a wrong one ends the process.

    Whether its text is UTF-8 is not asked here: a row that is none may be skipped, a damaged file may not.
    """
    import pyarrow as pa

    bare = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}.get(column.type)
    (column if bare is None else column.view(bare)).validate(full=True)
    return column


def _contents(columns: list[Any], reader: Reader) -> Iterator[Content | RowError]:
    """Of each row, in order."""
    if isinstance(reader, Field) and reader.kind != "text" and (ids := _all_ids(columns[0])) is not None:
        yield from ids
        return
    for values in zip(*map(_values, columns), strict=True):
        yield _content(dict(zip(reader.names, values, strict=True)), reader)


def _content(row: Mapping[str, Any], reader: Reader) -> Content | RowError:
    try:
        return reader.of(row)
    except RowError as problem:
        return problem


def _all_ids(column: Any) -> list[NDArray[np.uint32]] | None:
    """The rows of a column of lists, where all of them hold nothing but ids: with no Python number made of any."""
    import pyarrow as pa

    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_one(column.type) for is_one in lists) or not pa.types.is_integer(column.type.value_type) or column.null_count:
        return None
    flat = column.flatten()
    ids = flat.to_numpy(zero_copy_only=False)
    if flat.null_count or (len(ids) and (ids.min() < 0 or ids.max() >= 2**32)):
        return None
    fixed = pa.types.is_fixed_size_list(column.type)
    lengths = np.full(len(column), column.type.list_size) if fixed else column.value_lengths().to_numpy(zero_copy_only=False)
    return np.split(ids.astype(np.uint32), np.cumsum(lengths)[:-1])


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return Undecodable(error.reason)
