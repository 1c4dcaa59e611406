"""Parquet, Arrow IPC and Hugging Face datasets as input splits. A position is a row's number in its table, from 0."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from manta.data.errors import InputError, one_line
from manta.data.sources.input_split import BadRow, Document, ReadOptions
from manta.data.sources.rows import Content, FieldReader, RowError, UndecodableValue, column_of, missing_field
from manta.data.storage.location import StoredFile
from manta.data.storage.positions import Places
from manta.data.storage.store import open_store
from manta.data.storage.streams import reading

_BATCH = 1024  # rows read at a time
_MEMORY = 1 << 30  # bytes that these may take


@dataclass(frozen=True, slots=True, kw_only=True)
class _TableFileSplit(ABC):
    path: str
    size: int
    options: ReadOptions
    first_row: int = 0

    @property
    def name(self) -> str:
        return f"{self.path} from row {self.first_row + 1}" if self.first_row else self.path

    def documents(self) -> Iterator[Document | BadRow]:
        contents = (content for columns in self._batches() for content in _contents(columns, self.options))
        yield from _documents(contents, self, self.first_row)

    @property
    def places(self) -> Places:
        return Places(unit="row", paths=(self.path,))

    @abstractmethod
    def _batches(self) -> Iterator[dict[str, Any]]:
        """Yield the columns that the reader needs by name, some rows at a time."""

    def _needed(self, names: list[str]) -> list[str]:
        """Return the columns to read. Raises InputError for a missing one: it is missing in each row, so it is never skipped."""
        needed = [(name, column_of(name, names)) for name in self.options.reader.names]
        for name, column in needed:
            if column not in names:
                raise InputError(f"{self.path}: {missing_field(name, names, self.options.reader.key)}")
        return [column for _, column in needed]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetSplit(_TableFileSplit):
    """A Parquet file, or row groups [first, end) of a large one."""

    groups: tuple[int, int] | None = None

    @classmethod
    def from_files(cls, files: Sequence[StoredFile], options: ReadOptions, split_bytes: int) -> Iterator[Self]:
        """Yield splits of about `split_bytes` on disk; a row group is never cut."""
        for file in files:
            if file.size <= split_bytes:
                yield cls(path=file.path, size=file.size, options=options)
                continue
            with _open_parquet(file.path) as table:
                groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
            compression = file.size / max(sum(group.total_byte_size for group in groups), 1)
            first, first_row, rows, size = 0, 0, 0, 0
            for end, group in enumerate(groups, start=1):
                rows, size = rows + group.num_rows, size + group.total_byte_size
                if size * compression >= split_bytes or end == len(groups):
                    on_disk = round(size * compression)
                    yield cls(path=file.path, size=on_disk, options=options, groups=(first, end), first_row=first_row)
                    first, first_row, rows, size = end, first_row + rows, 0, 0

    def _batches(self) -> Iterator[dict[str, Any]]:
        with _open_parquet(self.path) as table:
            names = self._needed(table.schema_arrow.names)
            for group in range(*self.groups) if self.groups else range(table.num_row_groups):
                rows = _rows_at_once(table.metadata.row_group(group), names)
                for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=names):
                    yield _columns(batch, names)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowSplit(_TableFileSplit):
    """An Arrow IPC file, in the file or the stream format (which `datasets` saves), or rows [first_row, end_row) of a large one."""

    end_row: int | None = None

    @classmethod
    def from_files(cls, files: Sequence[StoredFile], options: ReadOptions, split_bytes: int) -> Iterator[Self]:
        """Yield splits of about `split_bytes`, by rows. A remote file is not split: skipping its batches would download them."""
        for file in files:
            count = ceil(file.size / split_bytes)
            if count <= 1 or not open_store(file.path).is_local:
                yield cls(path=file.path, size=file.size, options=options)
                continue
            with _open_arrow(file.path) as (_, batches):
                rows = sum(batch.num_rows for batch in batches)
            for index in range(count):
                first, end = rows * index // count, rows * (index + 1) // count
                if first < end:
                    yield cls(path=file.path, size=file.size * (end - first) // rows, options=options, first_row=first, end_row=end)

    def _batches(self) -> Iterator[dict[str, Any]]:
        with _open_arrow(self.path) as (existing, batches):
            names = self._needed(existing)
            for batch in _slices(batches, self.first_row, self.end_row):
                yield {name: _validated(column) for name, column in _columns(batch, names).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceSplit:
    """One shard of the train split of a Hugging Face dataset, streamed."""

    dataset: str
    config: str | None
    index: int
    count: int
    options: ReadOptions
    size: int = 0

    @classmethod
    def from_dataset(cls, dataset: str, config: str | None, options: ReadOptions) -> Iterator[Self]:
        count = _open_dataset(dataset, config).num_shards
        for index in range(count):
            yield cls(dataset=dataset, config=config, index=index, count=count, options=options)

    @property
    def name(self) -> str:
        return f"hf:{self.dataset} shard {self.index}"

    def documents(self) -> Iterator[Document | BadRow]:
        from datasets.exceptions import DatasetsError

        stream: Iterable[dict[str, Any]] = _open_dataset(self.dataset, self.config).shard(self.count, self.index)
        with reading(self.name, ValueError, DatasetsError):
            yield from _documents((_content(row, self.options) for row in stream), self, first_row=0)

    @property
    def places(self) -> Places:
        return Places(unit="row", paths=(self.name,))


def _open_dataset(dataset: str, config: str | None) -> Any:
    """Open the train split as a stream: it is not downloaded as a whole, and none of the dataset's code runs."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(dataset, config, split="train", streaming=True)
    except (ValueError, OSError, DatasetsError) as error:
        is_cache = isinstance(error, OSError) and error.filename is not None  # in the user's home, unless HF_HOME is set
        remedy = "Set HF_HOME to a directory in which you can write." if is_cache else "Check name, config and login."
        problem = f"expected a dataset that can be opened, got {type(error).__name__}: {one_line(error)}. {remedy}"
        raise InputError(f"data.sources: hf:{dataset}: {problem}") from None


@contextmanager
def _open_parquet(path: str) -> Generator[Any]:
    from pyarrow import ArrowException, parquet

    with (
        reading(path, ArrowException, UnicodeDecodeError),  # the last for a column's name
        open_store(path).open_arrow() as source,
        parquet.ParquetFile(source) as table,
    ):
        yield table


@contextmanager
def _open_arrow(path: str) -> Generator[tuple[list[str], Iterator[Any]]]:
    """Open an Arrow file as its column names and its batches. Raises InputError unless it was written to its end."""
    import pyarrow as pa

    with reading(path, pa.ArrowException, UnicodeDecodeError), open_store(path).open_arrow(mapped=True) as file:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(file)
            yield reader.schema.names, (reader.get_batch(index) for index in range(reader.num_record_batches))
            return
        file.seek(max(0, file.size() - 8))
        if file.read(8) != b"\xff\xff\xff\xff\0\0\0\0":  # only these bytes show that a stream is complete
            raise InputError(f"{path}: expected an Arrow file that was written to its end, got none. Download it again.")
        file.seek(0)
        reader = pa.ipc.open_stream(file)
        yield reader.schema.names, iter(reader)


def _slices(batches: Iterable[Any], first: int, end: int | None) -> Iterator[Any]:
    """Yield rows [first, end) in batches of at most _BATCH rows: a file may hold all of its rows in one."""
    start_row = 0
    for batch in batches:
        last = batch.num_rows if end is None else min(batch.num_rows, end - start_row)
        for start in range(max(first - start_row, 0), last, _BATCH):
            yield batch.slice(start, min(_BATCH, last - start))
        start_row += batch.num_rows
        if end is not None and start_row >= end:
            return


def _documents(
    contents: Iterable[Content | RowError], split: _TableFileSplit | HuggingFaceSplit, first_row: int
) -> Iterator[Document | BadRow]:
    for row, content in enumerate(contents, start=first_row):
        if isinstance(content, RowError):
            yield split.options.bad_row(split.places.location(row), content)
        elif len(content):
            yield Document(content, row)


def _columns(batch: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: batch.column(batch.schema.names.index(name)) for name in names}  # by name, pyarrow refuses a name that occurs twice


def _rows_at_once(group: Any, names: Sequence[str]) -> int:
    """Return how many rows of a row group can be held in memory, if each of them repeats the group's longest value."""
    columns = (group.column(index) for index in range(group.num_columns))
    read = [column for column in columns if any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in names)]
    longest = max((column.total_uncompressed_size for column in read), default=0)
    return max(1, min(_BATCH, _MEMORY // max(longest, 1)))


def _validated(column: Any) -> Any:
    """Check that a column's offsets stay within its bytes: following a wrong one would crash the process.

    Whether its text is UTF-8 is not checked here: such a row may be skipped, a damaged file may not.
    """
    import pyarrow as pa

    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}.get(column.type)
    (column if as_bytes is None else column.view(as_bytes)).validate(full=True)
    return column


def _contents(columns: dict[str, Any], options: ReadOptions) -> Iterator[Content | RowError]:
    """Yield the content or the error of each row, one at a time: small tables can hold long text."""
    reader = options.reader
    if isinstance(reader, FieldReader) and reader.kind != "text" and (ids := _id_lists(columns.get(reader.name))) is not None:
        yield from (options.too_long() if row.nbytes > options.longest_document else row for row in ids)
        return
    for cells in zip(*columns.values(), strict=True):
        yield _content(dict(zip(columns, cells, strict=True)), options)


def _content(row: Mapping[str, Any], options: ReadOptions) -> Content | RowError:
    """Return the content of a row of Arrow cells or of Python objects, or its error."""
    try:
        content = options.reader.read({name: _value(cell, options) for name, cell in row.items()})
        options.check_length(content)
    except RowError as error:
        return error
    return content


def _id_lists(column: Any) -> list[NDArray[np.uint32]] | None:
    """Return the rows of a column of lists without making Python numbers, or None unless each of them holds only token ids."""
    import pyarrow as pa

    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if column is None or not any(check(column.type) for check in is_list):
        return None
    if not pa.types.is_integer(column.type.value_type) or column.null_count:
        return None
    flat = column.flatten()
    ids = flat.to_numpy(zero_copy_only=False)
    if flat.null_count or (len(ids) and (ids.min() < 0 or ids.max() >= 2**32)):
        return None
    fixed = pa.types.is_fixed_size_list(column.type)
    lengths = np.full(len(column), column.type.list_size) if fixed else column.value_lengths().to_numpy(zero_copy_only=False)
    return np.split(ids.astype(np.uint32), np.cumsum(lengths)[:-1])


def _value(cell: Any, options: ReadOptions) -> Any:
    """Return a cell as a Python object. Raises RowError for text that is too long, before it is copied."""
    if not hasattr(cell, "as_py"):
        return cell
    import pyarrow as pa

    text = cell.value if isinstance(cell, pa.DictionaryScalar) else cell
    if isinstance(text, pa.BinaryScalar) and (buffer := text.as_buffer()) is not None and buffer.size > options.longest_document:
        raise options.too_long()
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return UndecodableValue(error.reason)
