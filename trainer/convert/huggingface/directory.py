"""Directories of transformers: which files an import needs, and what an export may overwrite.

Does not import torch, so that a mistake is reported before seconds are spent on it.
"""

import json
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from manta.data.errors import InputError
from manta.trainer.run_directory import RunDirectory

CONFIG, TOKENIZER, CARD = "config.json", "tokenizer.json", "README.md"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
KEPT_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
EXPORTED = {CONFIG, CARD, SINGLE, INDEX, *KEPT_FILES}


def check_import(directory: Path, output: Path) -> None:
    """Raises InputError if `output` is not new or empty, or `directory` lacks config, tokenizer or weights."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: expected a new or empty directory, got one with files. Choose another with --output.")
    read_json(directory / CONFIG)
    if not (directory / TOKENIZER).exists():
        raise InputError(f"{directory}: expected {TOKENIZER}, got no such file. Write it with AutoTokenizer's save_pretrained().")
    weight_files(directory)


def import_name(directory: Path) -> str:
    """Return the default name of an import: the directory's, or the run's if it is an export of one."""
    path = directory.absolute()
    return path.parents[1].name if path.parts[-2:] == ("export", "hf") and path.parents[1].name else path.name


def weight_files(directory: Path) -> list[Path]:
    """Raises InputError if there are no safetensors, or files that the index names are missing."""
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.exists():
        pickled = next((path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(directory.glob(pattern))), None)
        if pickled:
            remedy = "If you trust it, load it with transformers, and import what save_pretrained() writes."
            raise InputError(f"{directory}: expected {SINGLE}, got {pickled}, a pickle, which can run code. {remedy}")
        raise InputError(f"{directory}: expected {SINGLE} or {INDEX}, got neither. Name the directory of a model.")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: expected an index of safetensors, got {type(error).__name__}: {error}. Fetch it again.") from None
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index}: expected names of files beside it, got {name!r}. Fetch it again.")
        if not (directory / name).is_file():
            raise InputError(f"{directory}: expected {name}, which {INDEX} names, got no such file. Fetch it.")
    return [directory / name for name in names]


@contextmanager
def staged(directory: Path) -> Generator[Path]:
    """Yield a new directory beside `directory`, which is renamed to it after the block, or removed if the block fails.

    By then `directory` must be absent or empty. Raises InputError if nothing can be written there.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--output: expected a writable directory, got {directory} ({error.strerror}). Choose another.") from None
    try:
        yield partial
        partial.replace(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_kept_files(source: Path, target: Path) -> None:
    """Copy the files of a model that an import keeps, and that an export of the import returns."""
    for name in KEPT_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def refuse_to_overwrite(directory: Path, run_directory: RunDirectory) -> None:
    """Raises InputError unless `directory` is new, empty, or an earlier export of this run."""
    if not directory.exists():
        return
    names = {entry.name for entry in directory.iterdir()} if directory.is_dir() else {"a file"}
    foreign = {name for name in names - EXPORTED if not SHARD.fullmatch(name)}
    card = directory / CARD
    if foreign or (names and not (card.is_file() and marker(run_directory) in card.read_text(errors="replace"))):
        raise InputError(f"{directory}: expected a new directory, or an export of this run, got other files. Choose another with --output.")


def marker(run_directory: RunDirectory) -> str:
    """Return the line that identifies an export of this run: its path, hashed, because model cards are published."""
    return f"<!-- manta export {xxhash.xxh3_64_hexdigest(str(run_directory.path.resolve()).encode())} -->"


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{file}: expected JSON, got {problem}. Name the directory of a model.") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected an object, got {type(content).__name__}. Fetch it again.")
    return content
