"""A source, as config spells it, becomes files, an identity, and pieces of work.

| source | is |
|---|---|
| `stdlib:` | the source and documentation text of the Python that runs this: about 30 MB on every machine, no download |
| `notes.txt`, `corpus/`, `shards/*.jsonl.zst` | files, directories (searched through) and globs, in sorted order |
| `s3://…`, `https://…`, any URL that fsspec knows | the same: a file, a directory or a glob |
| `hf:name`, `hf:name:config`, `hf:/local/dir` | the train split of a Hugging Face dataset, streamed |

Files may be text, JSON lines, parquet or Arrow; text and JSON lines may be compressed (.gz, .zst, .bz2). What they are is told by their
names, or by config. Files of token ids (.bin, .idx) are listed here and read elsewhere.
"""

import glob
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from manta.data.config import DataConfig
from manta.data.errors import InputError
from manta.data.sources.config import SourceConfig
from manta.data.sources.files import File, find, stat, walk, without_notes
from manta.data.sources.filters import Filter
from manta.data.sources.formats import COMPRESSED, BadRows, Document, JsonLines, Piece, TextFiles, compression_of, suffix_of, unreadable
from manta.data.sources.rows import Field, Kind, Reader, Template
from manta.data.sources.tables import Arrow, HuggingFace, Parquet, open_dataset
from manta.data.storage import remote

Format = Literal["text", "json", "parquet", "arrow", "tokens"]

TEXT = (".txt", ".text", ".md", ".rst", ".py", ".pyi", ".html", ".tex", ".c", ".h", ".cpp", ".rs", ".go", ".js", ".ts", ".java")
JSON = (".jsonl", ".json", ".ndjson")
TOKENS = (".bin", ".idx")
_BY_SUFFIX: dict[str, Format] = {
    **dict.fromkeys(TEXT, "text"),
    **dict.fromkeys(JSON, "json"),
    ".parquet": "parquet",
    ".arrow": "arrow",
    **dict.fromkeys(TOKENS, "tokens"),
}

_Rows = JsonLines | Parquet | Arrow | HuggingFace

TEXT_PIECE = 2_000_000  # bytes: small files travel together, so that every core is busy and few shards result
PIECE = 64_000_000


def identity(source: SourceConfig) -> list[object]:
    """What tells that a source is still the same, from names, sizes and times alone: nothing is read, no hub is asked.

    That is its files, those that it holds out, and all that its config says of its documents. Not what the whole `data` section says.
    A dataset of the Hugging Face hub is known by its name only: once prepared, it stays as it is.
    """
    if source.path == "stdlib:":
        root = _stdlib()
        found: list[object] = [
            source.path,
            platform.python_version(),
            [(os.path.relpath(file.path, root), file.size) for file in files(source)],
        ]
    else:
        listed = files(source)
        found = [source.path, [(file.path, file.size, file.version) for file in [*listed, *_indexes(listed)]]]
    decided = source.model_dump(mode="json", exclude_defaults=True, include={"format", "text_field", "template", "filter"})
    if decided:
        found.append(decided)
    if (apart := held_out(source)) is not None:
        found.append(identity(apart))
    return found


def held_out(source: SourceConfig) -> SourceConfig | None:
    """The source of the documents that are all held out, where there is one."""
    return source.model_copy(update={"path": source.validation, "validation": None}) if source.validation else None


def is_tokens(source: SourceConfig) -> bool:
    """Whether its files are token shards, which have no documents to encode."""
    if source.format is not None or source.path == "stdlib:" or _is_dataset(source):
        return _wanted(source) == "tokens"
    return all(_format(file.path, source) == "tokens" for file in files(source))


def pieces(source: SourceConfig, data: DataConfig) -> list[Piece]:
    """The work of preparing a source, in the order its shards are read. Depends on the files alone, never on who works.

    The first document of all tells whether the source holds text or token ids; from then on the other kind is an error.
    """
    if source.template is not None:
        return list(_pieces(source, Template.parse(source.template, f"template of {source.called!r}"), data.bad_rows))
    key = "data.text_field" if source.text_field is None else f"text_field of {source.called!r}"
    field = Field(name=source.text_field or data.text_field, key=key)
    work = list(_pieces(source, field, data.bad_rows))
    kind = _kind(work) if any(not isinstance(piece, TextFiles) for piece in work) else "text"
    if kind is None:
        return [*work]
    if kind == "ids":
        if text := next((piece for piece in work if isinstance(piece, TextFiles)), None):
            raise InputError(f"{text.name}: text, and other files of the source hold token ids; wants one kind a source: make it two")
        if not Filter(source.filter).takes_all:
            raise InputError(
                f"data.sources: {source.called!r}: got a filter, which asks of text, and the source holds token ids; leave it out"
            )
    return [piece if isinstance(piece, TextFiles) else replace(piece, reader=replace(field, kind=kind)) for piece in work]


def kind(source: SourceConfig, data: DataConfig) -> Literal["text", "ids", "shards"]:
    """What it holds, as its first document tells."""
    if is_tokens(source):
        return "shards"
    reader = getattr(next(iter(pieces(source, data)), None), "reader", None)
    return "ids" if getattr(reader, "kind", None) == "ids" else "text"


def passed_over(source: SourceConfig) -> list[str]:
    """Files of its directory that are not read: nobody knows how, or, beside documents, they may be token shards."""
    if source.path == "stdlib:" or _is_dataset(source):
        return []
    where = _where(source)
    found, searched = find(where)
    paths = without_notes(where, list(found))
    return sorted({*paths} - {*_known(paths, source)}) if searched else []


def files(source: SourceConfig) -> list[File]:
    """The files of a source, sorted. Raises InputError where there is none, or where one is empty or of no known format."""
    if source.path == "stdlib:":
        return [stat(path) for path in walk(_stdlib()) if suffix_of(path) in TEXT]
    if _is_dataset(source):
        dataset, _ = _dataset(source)
        return [stat(path) for path in walk(dataset)] if Path(dataset).is_dir() else []
    where = _where(source)
    try:
        found, searched = find(where)
        if not found and _wanted(source) == "tokens":  # a pair of shards is often named without its suffixes
            found, searched = find(f"{glob.escape(where)}.*")[0], True
        paths = without_notes(where, list(found))
        listed = [found[path] or stat(path) for path in (_known(paths, source) if searched else paths)]
        for file in listed:
            _check(file, source)
    except OSError as error:
        raise InputError(unreadable(where, error)) from None
    if not listed:
        wanted = "a directory that holds" if searched else "a file, directory or glob that exists, stdlib: or hf:name:"
        raise InputError(
            f"data.sources: {source.path!r}: no such files; wants {wanted} text, JSONL, parquet or Arrow files, or token shards"
        )
    return listed


def _pieces(source: SourceConfig, reader: Reader, bad_rows: BadRows) -> Iterator[TextFiles | _Rows]:
    if _is_dataset(source):
        dataset, config = _dataset(source)
        count = open_dataset(dataset, config).num_shards
        for index in range(count):
            yield HuggingFace(dataset=dataset, config=config, reader=reader, index=index, count=count, bad_rows=bad_rows)
        return
    group: list[File] = []
    for file in files(source):
        match _format(file.path, source):
            case "text":
                group.append(file)
                if sum(member.size for member in group) >= TEXT_PIECE:
                    yield _together(group, source, bad_rows)
                    group = []
            case "parquet":
                yield from Parquet(path=file.path, reader=reader, size=file.size, bad_rows=bad_rows).shared(PIECE)
            case "arrow":
                yield from Arrow(path=file.path, reader=reader, size=file.size, bad_rows=bad_rows).shared(PIECE)
            case "tokens":
                raise InputError(f"{file.path}: token ids beside documents; wants one kind a source: make it two")
            case _:
                yield from _ranges(file, reader, bad_rows)
    if group:
        yield _together(group, source, bad_rows)


def _together(group: list[File], source: SourceConfig, bad_rows: BadRows) -> TextFiles:
    paths, size = tuple(file.path for file in group), sum(file.size for file in group)
    return TextFiles(paths=paths, size=size, bad_rows=bad_rows, lenient=source.path == "stdlib:")


def _ranges(file: File, reader: Reader, bad_rows: BadRows) -> Iterator[JsonLines]:
    """A plain JSONL file is shared by its bytes; a compressed one can only be read from its start."""
    whole = JsonLines(path=file.path, reader=reader, start=0, stop=None, size=file.size, bad_rows=bad_rows)
    if compression_of(file.path) is not None:
        yield whole
        return
    for start in range(0, file.size, PIECE):
        stop = min(start + PIECE, file.size)
        yield replace(whole, start=start, stop=stop, size=stop - start)


def _kind(work: Sequence[Piece]) -> Kind | None:
    """What the first document of all is; None where there is none."""
    for piece in work:
        for found in piece.documents():
            if isinstance(found, Document):
                return "text" if isinstance(found.content, str) else "ids"
    return None


def _indexes(listed: list[File]) -> list[File]:
    """Beside token shards that are named without them: they decide where documents end."""
    names = {file.path for file in listed}
    beside = [f"{file.path.removesuffix('.bin')}.idx" for file in listed if file.path.endswith(".bin")]
    return [file for path in beside if path not in names for file in find(path)[0].values() if file is not None]


def _known(paths: list[str], source: SourceConfig) -> list[str]:
    """Those of a directory that are of a known format; token shards only where there is nothing else."""
    documents = [path for path in paths if _format(path, source) not in {None, "tokens"}]
    return documents or [path for path in paths if _format(path, source)]


def _check(file: File, source: SourceConfig) -> None:
    if not _format(file.path, source):
        known = f"{' '.join(sorted(_BY_SUFFIX))}, text and JSON maybe {' '.join(COMPRESSED)}, or a format in config"
        raise InputError(f"{file.path}: unknown kind of file; wants {known}")
    if not file.size and not (remote.is_remote(file.path) and remote.size_of(file.path)):  # which also raises where a store tells no sizes
        raise InputError(f"{file.path}: empty file; wants text: fetch it again or take it out of data.sources")


def _format(path: str, source: SourceConfig) -> Format | None:
    """How to read a file; None where nobody knows."""
    form = _wanted(source) or _BY_SUFFIX.get(suffix_of(path))
    if form == "tokens" and suffix_of(path) not in TOKENS:
        return None
    return None if compression_of(path) is not None and form not in {"text", "json"} else form


def _wanted(source: SourceConfig) -> Format | None:
    """What config says that the files are."""
    return "tokens" if source.format in ("megatron", "nanogpt", "llm.c") else source.format


def _stdlib() -> str:
    return sysconfig.get_path("stdlib")


def _where(source: SourceConfig) -> str:
    """The path or URL of a source's files."""
    return _saved(source) or source.path.removeprefix("file://")


def _is_dataset(source: SourceConfig) -> bool:
    """Whether `datasets` is to load it; a dataset that was saved to disk is a directory of Arrow files."""
    return source.path.startswith("hf:") and not remote.is_remote(source.path) and _saved(source) is None


def _saved(source: SourceConfig) -> str | None:
    """The train split of hf:/local/dir where `save_to_disk` wrote it."""
    if not source.path.startswith("hf:/"):
        return None
    root = Path(source.path.removeprefix("hf:"))
    return next((str(folder) for folder in (root, root / "train") if (folder / "state.json").is_file()), None)


def _dataset(source: SourceConfig) -> tuple[str, str | None]:
    dataset, _, config = source.path.removeprefix("hf:").partition(":")
    if not dataset:
        raise InputError(f"data.sources: {source.path!r}: names no dataset; wants hf:name, hf:name:config or hf:/local/dir")
    return dataset, config or None
