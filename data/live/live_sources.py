"""The sources of a live run: their input splits, and the fingerprint that shows whether they have changed."""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.shards.manifest import PreparedData, digest
from manta.data.source_config import FilterConfig, SourceConfig
from manta.data.sources.input_split import BadRow, Document, InputSplit, is_held_out
from manta.data.sources.source import holds_token_files, identity, validation_source
from manta.data.sources.splits import input_splits
from manta.data.storage.location import local_path
from manta.data.tokenizer import tokenizer

VERSION = 1  # of the order in which ranks read; part of the fingerprint


class LiveSplit(NamedTuple):
    """An input split, with the filter and the validation share of its source."""

    split: InputSplit
    filter: FilterConfig
    validation: float
    """Share of documents for validation."""

    def text(self, document: Document | BadRow) -> str | None:
        """Return the text, or None if it is a bad row or filtered. Raises InputError for token ids."""
        if isinstance(document, BadRow):
            return None
        if not isinstance(document.content, str):
            raise _token_ids_error(self.split.name)
        return document.content if self.filter.rejection(document.content) is None else None

    def holds_out(self, text: str) -> bool:
        """Whether a prepared corpus would hold this text out for validation."""
        return is_held_out(text.encode(), self.validation)

    def validation_texts(self) -> Iterator[str]:
        for document in self.split.documents():
            if (text := self.text(document)) is not None and self.holds_out(text):
                yield text


def live_splits(source: SourceConfig, data: DataConfig) -> tuple[list[LiveSplit], list[LiveSplit]]:
    """Return a source's train splits, and the splits that contain its validation documents."""

    def splits(of: SourceConfig, share: float) -> list[LiveSplit]:
        return [LiveSplit(split=split, filter=source.filter, validation=share) for split in input_splits(of, data)]

    if (validation := validation_source(source)) is not None:
        return splits(source, 0.0), splits(validation, 1.0)
    both = splits(source, data.validation)
    return both, both


def prepare_live(tokenizer_file: Path, data: DataConfig, tokens: TokenizerConfig) -> PreparedData:
    """Return what replaces a prepared corpus: the tokenizer, and a fingerprint of the sources and of how they are read.

    Raises InputError if a source does not exist or has token ids.
    """
    data = with_absolute_paths(data)
    _refuse_token_files(data)
    sources = [identity(source) for source in data.sources]
    tokenizer_hash = tokenizer.fingerprint(tokenizer.read_tokenizer(tokenizer_file))
    options = [data.text_field, data.bad_rows, data.validation, tokens.end_of_text, tokenizer_hash]
    return PreparedData(tokenizer=tokenizer_file, corpora=(), fingerprint=digest(["live", VERSION, sources, *options]))


def refuse_token_ids(data: DataConfig) -> None:
    """Raise InputError if a source has token ids, as token files or in its first row."""
    _refuse_token_files(data)
    for source in data.sources:
        for split in live_splits(source, data)[0][:1]:
            for document in split.split.documents():
                split.text(document)
                break


def with_absolute_paths(data: DataConfig) -> DataConfig:
    """Make local paths absolute: ranks, and users who resume a run, may be in other directories."""

    def absolute(source: SourceConfig) -> SourceConfig:
        validation = None if source.validation is None else _absolute(source.validation)
        return source.model_copy(update={"path": _absolute(source.path), "validation": validation})

    return data.model_copy(update={"sources": tuple(map(absolute, data.sources))})


def _refuse_token_files(data: DataConfig) -> None:
    for source in data.sources:
        if holds_token_files(source):
            raise _token_ids_error(source.resolved_name)


def _absolute(path: str) -> str:
    if path == "stdlib:" or local_path(path) is None:
        return path
    if path.startswith("hf:"):
        dataset, colon, config = path.removeprefix("hf:").partition(":")
        return f"hf:{Path(dataset).absolute()}{colon}{config}" if Path(dataset).is_dir() else path
    local = Path(path.removeprefix("file://"))
    return str(local.absolute() if local.exists() else Path(glob.escape(str(Path.cwd()))) / local)


def _token_ids_error(name: str) -> InputError:
    return InputError(f"data.sources: {name!r}: expected text with data.live, got token ids. Remove data.live.")
