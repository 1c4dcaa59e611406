"""What live runs read: sources as they stand in config become pieces of text, and what tells that they are still the same."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.prepare.encode import validation_threshold
from manta.data.shards.manifest import Prepared, digest
from manta.data.sources.config import SourceConfig
from manta.data.sources.filters import Filter
from manta.data.sources.input_split import BadRow, Document, InputSplit
from manta.data.sources.source import holds_token_files, identity, validation_source
from manta.data.sources.splits import input_splits
from manta.data.storage.location import local_path
from manta.data.tokenizer import tokenizer

VERSION = 1  # of the order in which ranks read; another one is another corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece, and which of its documents are taken and held out."""

    piece: InputSplit
    filter: Filter
    held_out_below: int

    def text(self, found: Document | BadRow) -> str | None:
        """None where it is left out. Raises InputError for token ids."""
        if isinstance(found, BadRow):
            return None
        if not isinstance(found.content, str):
            raise InputError(_told_of_ids(self.piece.name))
        return found.content if self.filter.rejection(found.content) is None else None

    def holds_out(self, text: str) -> bool:
        """By its text, as prepared corpora do: a document that stands twice is held out twice."""
        return xxhash.xxh3_64_intdigest(text.encode()) < self.held_out_below

    def held_out(self) -> Iterator[str]:
        for found in self.piece.documents():
            if (text := self.text(found)) is not None and self.holds_out(text):
                yield text


def parts_of(source: SourceConfig, data: DataConfig) -> tuple[list[Part], list[Part]]:
    """A source's pieces to train on, and those among which its validation documents are."""
    taken, apart = Filter(source.filter), validation_source(source)

    def parts(of: SourceConfig, share: float) -> list[Part]:
        return [Part(piece=piece, filter=taken, held_out_below=validation_threshold(share)) for piece in input_splits(of, data)]

    if apart is not None:
        return parts(source, 0.0), parts(apart, 1.0)
    both = parts(source, data.validation)
    return both, both


def prepare_live(tokenizer_file: Path, data: DataConfig, tokens: TokenizerConfig) -> Prepared:
    """What stands for a prepared corpus: the tokenizer, and what tells whether the sources are still the same, and are read the same way.

    Raises InputError where a source does not exist, or holds token ids.
    """
    data = with_absolute_paths(data)
    _refuse_token_files(data)
    sources = [identity(source) for source in data.sources]
    read = [
        data.text_field,
        data.bad_rows,
        data.validation,
        tokens.end_of_text,
        tokenizer.fingerprint(tokenizer.read_tokenizer(tokenizer_file)),
    ]
    return Prepared(tokenizer=tokenizer_file, corpora=(), fingerprint=digest(["live", VERSION, sources, *read]))


def refuse_token_ids(data: DataConfig) -> None:
    """Raises InputError where a source holds token ids, in files of their own or in its first row."""
    _refuse_token_files(data)
    for source in data.sources:
        for part in parts_of(source, data)[0][:1]:
            for found in part.piece.documents():
                part.text(found)
                break


def with_absolute_paths(data: DataConfig) -> DataConfig:
    """With local paths made absolute: ranks stand elsewhere, and so may whoever resumes a run."""

    def of(source: SourceConfig) -> SourceConfig:
        held_out = None if source.validation is None else _absolute(source.validation)
        return source.model_copy(update={"path": _absolute(source.path), "validation": held_out})

    return data.model_copy(update={"sources": tuple(map(of, data.sources))})


def _refuse_token_files(data: DataConfig) -> None:
    for source in data.sources:
        if holds_token_files(source):
            raise InputError(_told_of_ids(source.resolved_name))


def _absolute(path: str) -> str:
    if path == "stdlib:" or local_path(path) is None:
        return path
    if path.startswith("hf:"):
        dataset, colon, config = path.removeprefix("hf:").partition(":")
        return f"hf:{Path(dataset).absolute()}{colon}{config}" if Path(dataset).is_dir() else path
    here = Path(path.removeprefix("file://"))
    return str(here.absolute() if here.exists() else Path(glob.escape(str(Path.cwd()))) / here)


def _told_of_ids(name: str) -> str:
    return f"data.sources: {name!r}: got token ids beside data.live, wants text: ids need no tokenizing; leave data.live out"
