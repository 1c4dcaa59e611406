"""Divide a source into input splits, the units of work of a preparation, and sample the text of many splits."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from manta.data.config import DataConfig
from manta.data.errors import InputError
from manta.data.sampling.order import Permutation
from manta.data.source_config import FilterConfig, SourceConfig
from manta.data.sources.file_formats import FORMATS, DocumentSplit, Format, format_of
from manta.data.sources.input_split import BadRow, Document, InputSplit, ReadOptions
from manta.data.sources.rows import FieldReader, Kind, RowReader, TemplateReader
from manta.data.sources.source import dataset_name, holds_token_files, is_hub_dataset, source_files
from manta.data.sources.tables import HuggingFaceSplit
from manta.data.sources.text_formats import TextSplit
from manta.data.storage.location import StoredFile

TEXT_SPLIT_BYTES = 2_000_000  # small files share a split, so that every core is busy and few shards result
SPLIT_BYTES = 64_000_000


def input_splits(source: SourceConfig, data: DataConfig) -> Sequence[DocumentSplit]:
    """Return the input splits of a source in the order of its shards. They depend on its files alone, not on the workers.

    The first document decides whether the source holds text or token ids; from then on the other kind is an error.
    """
    options = ReadOptions(
        reader=_reader(source, data),
        bad_rows=data.bad_rows,
        ignore_undecodable=source.path == "stdlib:",
        longest_document=data.longest_document,
    )
    splits = list(_splits(source, options))
    if not isinstance(options.reader, FieldReader):
        return splits
    texts = [split for split in splits if isinstance(split, TextSplit)]
    kind = "text" if len(texts) == len(splits) else _first_kind(splits)
    if kind == "ids":
        if texts:
            raise InputError(f"{texts[0].name}: expected token ids as in the source's other files, got text. Make two sources of it.")
        if not source.filter.accepts_all:
            raise InputError(f"data.sources: {source.resolved_name!r}: expected no filter for a source of token ids, got one. Remove it.")
    options = replace(options, reader=replace(options.reader, kind=kind))
    return [replace(split, options=options) for split in splits]


def sample_text(splits: Sequence[tuple[InputSplit, FilterConfig]], size: int) -> Iterator[str]:
    """Yield about `size` bytes of text, spread over all splits in shuffled order, on which a tokenizer is trained or compared."""
    order = Permutation(len(splits), key=0)(np.arange(len(splits)))
    for remaining, index in zip(range(len(splits), 0, -1), order, strict=True):
        share = math.ceil(size / remaining)
        split, text_filter = splits[int(index)]
        for document in split.documents():
            if share <= 0:
                break
            if isinstance(document, BadRow) or not isinstance(document.content, str) or text_filter.rejection(document.content):
                continue
            part = document.content[:share]
            yield part
            used = len(part.encode())
            share, size = share - used, size - used
        if size <= 0:
            return


def content_kind(source: SourceConfig, data: DataConfig) -> Literal["text", "ids", "shards"]:
    """Return what a source holds: text, rows of token ids (by its first document), or token shards."""
    if holds_token_files(source):
        return "shards"
    splits = input_splits(source, data)
    return (splits[0].options.reader.kind if splits else None) or "text"


def _reader(source: SourceConfig, data: DataConfig) -> RowReader:
    if source.template is not None:
        return TemplateReader.parse(source.template, f"template of {source.resolved_name!r}")
    if source.text_field is not None:
        return FieldReader(name=source.text_field, key=f"text_field of {source.resolved_name!r}")
    return FieldReader(name=data.text_field, key="data.text_field")


def _splits(source: SourceConfig, options: ReadOptions) -> Iterator[DocumentSplit]:
    if is_hub_dataset(source):
        source_files(source)  # raises InputError for what `datasets` must not open
        yield from HuggingFaceSplit.from_dataset(*dataset_name(source), options)
        return
    for file_format, files in _groups(source):
        if file_format not in FORMATS:
            raise InputError(f"{files[0].path}: expected documents as in the source's other files, got token ids. Make two sources of it.")
        yield from FORMATS[file_format].from_files(files, options, SPLIT_BYTES)


def _groups(source: SourceConfig) -> Iterator[tuple[Format | None, list[StoredFile]]]:
    """Yield text files in groups, and every other file alone."""
    texts, size = list[StoredFile](), 0
    for file in source_files(source):
        if (file_format := format_of(file.path, source)) != "text":
            yield file_format, [file]
            continue
        texts.append(file)
        size += file.size
        if size >= TEXT_SPLIT_BYTES:
            yield "text", texts
            texts, size = [], 0
    if texts:
        yield "text", texts


def _first_kind(splits: Sequence[DocumentSplit]) -> Kind | None:
    """Return what the first document is; None if there is none."""
    for split in splits:
        for document in split.documents():
            if isinstance(document, Document):
                return "text" if isinstance(document.content, str) else "ids"
    return None
