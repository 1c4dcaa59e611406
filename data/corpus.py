"""A source, as config spells it, becomes files, an identity, and pieces of work.

| source | is |
|---|---|
| `stdlib:` | the source and documentation text of the Python that runs this: about 30 MB on every machine, no download |
| `notes.txt`, `corpus/`, `shards/*.jsonl.zst` | files, directories (searched through) and globs, in sorted order |
| `hf:name`, `hf:name:config`, `hf:/local/dir` | the train split of a Hugging Face dataset, streamed |

Files may be text, JSON lines or parquet; text and JSON lines may be compressed (.gz, .zst, .bz2).
"""

import glob
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from manta.data.errors import InputError
from manta.data.formats import COMPRESSED, HuggingFace, JsonLines, Parquet, Piece, TextFiles, open_dataset

TEXT = frozenset({".txt", ".text", ".md", ".rst", ".py", ".pyi", ".html", ".tex", ".c", ".h", ".cpp", ".rs", ".go", ".js", ".ts", ".java"})
JSON = frozenset({".jsonl", ".json", ".ndjson"})
PARQUET = frozenset({".parquet"})

TEXT_PIECE = 2_000_000  # bytes: small files travel together, so that every core is busy and few shards result
JSON_PIECE = 64_000_000


@dataclass(frozen=True, slots=True)
class File:
    path: str
    size: int
    mtime_ns: int


def identity(source: str) -> list[object]:
    """What tells that a source is still the same, from names, sizes and times alone: nothing is read, no network is asked.

    A dataset of the Hugging Face hub is known by its name only: once prepared, it stays as it is.
    """
    if source == "stdlib:":
        root = _stdlib()
        return [source, platform.python_version(), [(os.path.relpath(file.path, root), file.size) for file in files(source)]]
    return [source, [(file.path, file.size, file.mtime_ns) for file in files(source)]]


def pieces(source: str, text_field: str) -> list[Piece]:
    """The work of preparing a source, in the order its shards are read. Depends on the files alone, never on who works."""
    if source.startswith("hf:"):
        dataset, config = _dataset(source)
        count = open_dataset(dataset, config).num_shards
        return [HuggingFace(dataset=dataset, config=config, field=text_field, index=index, count=count) for index in range(count)]
    work: list[Piece] = []
    group: list[File] = []
    for file in files(source):
        if _format(file.path) in TEXT:
            group.append(file)
            if sum(member.size for member in group) >= TEXT_PIECE:
                work.append(_together(group, lenient=source == "stdlib:"))
                group = []
        elif _format(file.path) in PARQUET:
            work.append(Parquet(path=file.path, field=text_field, size=file.size))
        else:
            work.extend(_ranges(file, text_field))
    return [*work, _together(group, lenient=source == "stdlib:")] if group else work


def files(source: str) -> list[File]:
    """The local files of a source, sorted. Raises InputError where there is none, or where one is empty or of no known format."""
    if source.startswith("hf:"):
        dataset, _ = _dataset(source)
        return [_stat(path) for path in _walk(dataset)] if Path(dataset).is_dir() else []
    if source == "stdlib:":
        return [_stat(path) for path in _walk(_stdlib()) if Path(path).suffix in TEXT]
    if Path(source).is_dir():
        found = [path for path in _walk(source) if _format(path)]
        wanted = "a directory that holds text, JSONL or parquet files"
    else:
        found = [source] if Path(source).is_file() else _match(source)
        wanted = "a file, directory or glob that exists, stdlib: or hf:name"
    if not found:
        raise InputError(f"data.sources: {source!r}: no such files; wants {wanted}")
    for path in found:
        if not _format(path):
            raise InputError(
                f"{path}: unknown kind of file; wants {' '.join(sorted(TEXT | JSON | PARQUET))}, text and JSON maybe .gz .zst .bz2"
            )
    listed = [_stat(path) for path in found]
    for file in listed:
        if not file.size:
            raise InputError(f"{file.path}: empty file; wants text: fetch it again or take it out of data.sources")
    return listed


def _format(path: str) -> str | None:
    """The suffix that says how to read a file, without the one of its compression; None where nobody knows."""
    name = Path(path)
    compressed = name.suffix in COMPRESSED
    suffix = Path(name.stem).suffix if compressed else name.suffix
    readable = TEXT | JSON if compressed else TEXT | JSON | PARQUET
    return suffix if suffix in readable else None


def _walk(directory: str) -> Iterator[str]:
    """Every file below, sorted; what is installed, compiled or hidden is not part of a corpus."""
    for folder, children, names in os.walk(directory):
        children[:] = sorted(child for child in children if child not in {"site-packages", "__pycache__"} and not child.startswith("."))
        yield from (str(Path(folder, name)) for name in sorted(names) if not name.startswith("."))


def _match(pattern: str) -> list[str]:
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207  Path.glob takes no absolute pattern
    return sorted(path for path in found if Path(path).is_file())


def _stat(path: str) -> File:
    status = Path(path).stat()
    return File(path, status.st_size, status.st_mtime_ns)


def _stdlib() -> str:
    return sysconfig.get_path("stdlib")


def _dataset(source: str) -> tuple[str, str | None]:
    dataset, _, config = source.removeprefix("hf:").partition(":")
    if not dataset:
        raise InputError(f"data.sources: {source!r}: names no dataset; wants hf:name, hf:name:config or hf:/local/dir")
    return dataset, config or None


def _together(group: list[File], *, lenient: bool) -> TextFiles:
    return TextFiles(paths=tuple(file.path for file in group), size=sum(file.size for file in group), lenient=lenient)


def _ranges(file: File, text_field: str) -> Iterator[JsonLines]:
    """A plain JSONL file is shared by its bytes; a compressed one can only be read from its start."""
    if Path(file.path).suffix in COMPRESSED:
        yield JsonLines(path=file.path, field=text_field, start=0, stop=None, size=file.size)
        return
    for start in range(0, file.size, JSON_PIECE):
        stop = min(start + JSON_PIECE, file.size)
        yield JsonLines(path=file.path, field=text_field, start=start, stop=stop, size=stop - start)
