"""Which files of a directory or a glob are a source's documents: not the card of a dataset, its metadata, or its other splits.

What is skipped is reported once, when a corpus is prepared. A file or a folder that is itself a source is always read.
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from manta.data.errors import InputError, cut
from manta.data.source_config import SourceConfig
from manta.data.sources.file_formats import SUFFIXES, format_of
from manta.data.storage.streams import format_suffix

_DATA = {"json", "parquet", "arrow", "tokens"}
_PLAIN = {".txt", ".text"}
_CARD = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing)([^a-z].*)?", re.IGNORECASE)
_METADATA = {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}  # files that `datasets` ignores
# The names, and the characters around them, by which `datasets` recognizes a split.
_SPLIT = re.compile(
    r"(?:^|[-._ 0-9/])(train|training|validation|valid|val|dev|test|testing|eval|evaluation)(?=[-._ 0-9/]|$)", re.IGNORECASE
)


class Selection(NamedTuple):
    paths: list[str]
    notes: list[str]
    """What was skipped, and why."""


def select(paths: Sequence[str], source: SourceConfig, *, is_directory: bool) -> Selection:
    """Select documents from the sorted files of a directory, or of a glob. A directory may have files of unknown formats."""
    selected, notes = list(paths), list[str]()

    def leave_out(others: list[str], what: str) -> None:
        nonlocal selected
        if excluded := set(others):
            notes.append(f"skipped {_count(others)} {what}, first {cut(others[0])}")
            selected = [path for path in selected if path not in excluded]

    if is_directory:
        known = set(_known(selected, source))
        leave_out([path for path in selected if path not in known], "by format")
    leave_out(_descriptions(selected, source), "with the description of a dataset (a file that is itself a source is read)")
    splits = _splits(selected, source)
    others = [path for path, split in splits.items() if not split.startswith("train")]
    if len(others) < len(splits):
        leave_out(others, "of other splits than train (name them as validation, or as sources)")
    elif others and len(others) < len(selected):
        notes.append(f"reads {_count(others)} of a name like those of validation and test splits, first {cut(others[0])}")
    return Selection(selected, notes)


def _count(paths: list[str]) -> str:
    return f"{len(paths)} {'file' if len(paths) == 1 else 'files'}"


def check_saved_dataset(location: str, paths: Sequence[str]) -> list[str]:
    """Return the files without what `save_to_disk` writes beside a dataset's tables: JSON metadata, and cached tables.

    Raises InputError for a dataset that was saved in several splits.
    """
    by_folder: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        by_folder.setdefault(folder, set()).add(name)
    for folder, names in by_folder.items():
        if "dataset_dict.json" in names:
            splits = ", ".join(sorted(other.rpartition("/")[2] for other, saved in by_folder.items() if "state.json" in saved))
            problem = "expected one split of a dataset, got several"
            raise InputError(f"data.sources: {location!r}: {problem}. Name a folder of {folder}: {splits}.")
    metadata = {"state.json", "dataset_info.json"}
    saved = {folder for folder, names in by_folder.items() if metadata <= names and any(name.endswith(".arrow") for name in names)}
    parts = [(path, *path.rpartition("/")[::2]) for path in paths]
    return [path for path, folder, name in parts if folder not in saved or (name not in metadata and not name.startswith("cache-"))]


def _known(paths: list[str], source: SourceConfig) -> list[str]:
    """Return the files of known formats; token shards only if there are no documents."""
    documents = [path for path in paths if format_of(path, source) not in {None, "tokens"}]
    return documents or [path for path in paths if format_of(path, source)]


def _descriptions(paths: list[str], source: SourceConfig) -> list[str]:
    """Return the metadata of a dataset, its license, its card and its script, if there are tables, JSON lines or plain text beside them."""
    root = _common_folder(paths).rstrip("/").rpartition("/")[2]

    def describes(path: str) -> bool:
        name = path.rpartition("/")[2]
        is_text = SUFFIXES.get(format_suffix(path)) == "text"
        return name in _METADATA or (is_text and (bool(_CARD.fullmatch(name)) or name == f"{root}.py"))

    described = [path for path in paths if not describes(path)]
    has_data = any(format_of(path, source) in _DATA for path in described)
    is_plain = bool(described) and all(format_suffix(path) in _PLAIN for path in described)
    return [path for path in paths if describes(path)] if has_data or is_plain else []


def _splits(paths: list[str], source: SourceConfig) -> dict[str, str]:
    """Return the first split that each path names below the common folder. Programs and pages may be called test for other reasons."""
    start = len(_common_folder(paths))
    data = (path for path in paths if format_of(path, source) in _DATA or format_suffix(path) in _PLAIN)
    return {path: found[1].lower() for path in data if (found := _SPLIT.search(path[start:]))}


def _common_folder(paths: list[str]) -> str:
    """Return the folder that holds all files, with a slash at its end."""
    prefix = os.path.commonprefix([path.rpartition("/")[0] + "/" for path in paths])  # noqa: RUF071  cut at a slash
    return prefix[: prefix.rfind("/") + 1]
