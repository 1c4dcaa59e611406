"""A source's files and its identity.

| source | files |
|---|---|
| `stdlib:` | the source code and documentation of the running Python: about 30 MB on every machine, no download |
| `notes.txt`, `corpus/`, `shards/*.jsonl.zst` | files, directories (recursively) and globs, in sorted order |
| `s3://…`, `https://…`, any URL that fsspec knows | the same: a file, a directory or a glob |
| `hf:name`, `hf:name:config`, `hf:/local/dir` | the train split of a Hugging Face dataset, streamed |
"""

import glob
import os
import platform
import sysconfig
from pathlib import Path

from manta.data.config_history import as_version_1
from manta.data.errors import InputError, cut
from manta.data.source_config import SourceConfig
from manta.data.sources.file_formats import SUFFIXES, TEXT, configured_format, format_of
from manta.data.sources.selection import check_saved_dataset, select
from manta.data.storage.links import boundary, regular_file
from manta.data.storage.listing import walk
from manta.data.storage.location import StoredFile
from manta.data.storage.store import open_store
from manta.data.storage.streams import COMPRESSION, compression_of, format_suffix, reading

_STDLIB = sysconfig.get_path("stdlib")


def identity(source: SourceConfig) -> list[object]:
    """Return what identifies a source's documents: the names, sizes and versions of its files, and the config that selects documents.

    Nothing is read, and the hub is not asked: a dataset of the Hugging Face hub is identified by its name alone.
    """
    files = source_files(source)
    if source.path == "stdlib:":
        names = [(os.path.relpath(file.path, _STDLIB), file.size) for file in files]
        found: list[object] = [source.path, platform.python_version(), names]
    else:
        found = [source.path, [(file.path, file.size, file.version) for file in [*files, *_token_indexes(files)]]]
    selection = source.model_dump(mode="json", exclude_defaults=True, exclude={"path", "name", "validation", "epochs"})
    if selection:
        found.append(as_version_1(selection, "data.sources"))
    if (validation := validation_source(source)) is not None:
        found.append(identity(validation))
    return found


def validation_source(source: SourceConfig) -> SourceConfig | None:
    """Return the source of the documents that are all held out, if the config names one."""
    return source.model_copy(update={"path": source.validation, "validation": None}) if source.validation else None


def holds_token_files(source: SourceConfig) -> bool:
    """Return whether its files are token shards, which are used in place of encoding documents."""
    if source.format is not None or source.path == "stdlib:" or is_hub_dataset(source):
        return configured_format(source) == "tokens"
    return all(format_of(file.path, source) == "tokens" for file in source_files(source))


def source_files(source: SourceConfig) -> list[StoredFile]:
    """Return the files of a source, sorted. Raises InputError if there are none, or if one is empty or of an unknown format."""
    return select_files(source)[0]


def select_files(source: SourceConfig) -> tuple[list[StoredFile], list[str]]:
    """Return the files of a source, sorted, and notes on those of its directory or glob that are not read."""
    if source.path == "stdlib:":
        return [open_store(path).stat() for path in walk(_STDLIB, follow_all=True) if format_suffix(path) in TEXT], []
    if is_hub_dataset(source):
        dataset, _ = dataset_name(source)
        with reading(dataset):
            return [regular_file(path, boundary(dataset)) for path in walk(dataset)] if Path(dataset).is_dir() else [], []
    location = _location(source)
    with reading(location):
        listing = open_store(location).find()
        is_directory = listing.is_directory
        if not listing.files and configured_format(source) == "tokens":  # a pair of shards is often named without its suffixes
            listing, is_directory = open_store(f"{glob.escape(location)}.*").find(), True
        paths, notes = select(check_saved_dataset(location, list(listing.files)), source, is_directory=is_directory)
        for path in paths:
            _check_format(path, source)
        files = [listing.files[path] or regular_file(path, listing.boundary) for path in paths]
        if empty := [file.path for file in files if _is_empty(file)]:
            needed = [path for path in empty if len(files) == 1 or format_of(path, source) not in {"text", "json"} or compression_of(path)]
            if needed or len(empty) == len(files):
                remedy = "Download it again, or remove it from data.sources."
                raise InputError(f"{(needed or empty)[0]}: expected data, got an empty file. {remedy}")
            notes.append(f"skipped {len(empty)} without content, first {cut(empty[0])}")
            files = [file for file in files if file.path not in set(empty)]
    if not files:
        found = "none of them" if is_directory else "no such files"
        problem = f"expected text, JSONL, Parquet or Arrow files, or token shards, got {found}"
        also = f" ({'; '.join(notes)})" if notes else ""
        raise InputError(f"data.sources: {source.path!r}: {problem}{also}. Name a file, directory or glob that exists, stdlib: or hf:name.")
    return files, notes


def is_hub_dataset(source: SourceConfig) -> bool:
    """Return whether `datasets` loads the source. A dataset saved to disk is a directory of Arrow files instead."""
    return source.path.startswith("hf:") and not source.path.startswith("hf://") and _saved_dataset(source) is None


def dataset_name(source: SourceConfig) -> tuple[str, str | None]:
    """Return the name and the config of a Hugging Face dataset."""
    dataset, _, config = source.path.removeprefix("hf:").partition(":")
    if not dataset:
        raise InputError(f"data.sources: {source.path!r}: expected hf:name, hf:name:config or hf:/local/dir, got no dataset. Name one.")
    return dataset, config or None


def _check_format(path: str, source: SourceConfig) -> None:
    if len(path.splitlines()) > 1:  # messages name files, in one line
        raise InputError(f"{cut(path)}: expected a file name without line breaks, got one. Rename it.")
    if format_of(path, source) in {"parquet", "arrow"} and path != path.encode(errors="replace").decode():
        raise InputError(f"{cut(path)}: expected a file name in UTF-8, which pyarrow needs, got another one. Rename it.")
    if not format_of(path, source):
        known = f"{' '.join(sorted(SUFFIXES))}; text and JSON may end in {' '.join(COMPRESSION)}"
        got = format_suffix(path) or "no suffix"
        remedy = (
            "Convert it, or name its folder as hf:FOLDER" if got in {".csv", ".tsv"} else "Unpack or convert it, or set the source's format"
        )
        raise InputError(f"{path}: expected a known format ({known}), got {got}. {remedy}.")


def _is_empty(file: StoredFile) -> bool:
    return not file.size and not open_store(file.path).stat().size  # which raises if a store does not know sizes


def _token_indexes(files: list[StoredFile]) -> list[StoredFile]:
    """Return the .idx files of .bin files that are named without them: they decide where documents end."""
    names = {file.path for file in files}
    indexes = [f"{file.path.removesuffix('.bin')}.idx" for file in files if file.path.endswith(".bin")]
    return [file for path in indexes if path not in names for file in open_store(path).find().files.values() if file is not None]


def _location(source: SourceConfig) -> str:
    return _saved_dataset(source) or source.path.removeprefix("file://")


def _saved_dataset(source: SourceConfig) -> str | None:
    """Return the folder of the train split of hf:/local/dir, if `save_to_disk` wrote it."""
    if not source.path.startswith("hf:/"):
        return None
    root = Path(source.path.removeprefix("hf:"))
    return next((str(folder) for folder in (root, root / "train") if (folder / "state.json").is_file()), None)
