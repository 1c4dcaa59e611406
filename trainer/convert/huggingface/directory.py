"""Directories of transformers: which files an import needs, and what an export may overwrite.

Does not import torch, so that a mistake is reported before seconds are spent on it.
"""

import json
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash
from pydantic_core import from_json

from manta.data.errors import InputError, cut, one_line
from manta.data.storage.regular_file import read_regular
from manta.trainer.checkpoint.errors import SaveError
from manta.trainer.run_directory import RunDirectory

CONFIG, TOKENIZER, CARD = "config.json", "tokenizer.json", "README.md"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
KEPT_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
MAX_BYTES = 2**27  # of a JSON file
EXPORTED = {CONFIG, CARD, SINGLE, INDEX, *KEPT_FILES}


def check_import(directory: Path, output: Path) -> None:
    """Raises InputError if `output` is not new or empty, or `directory` lacks config, tokenizer or weights."""
    if _names(output):
        raise InputError(f"{output}: expected a new or empty directory, got one with files. Choose another with --output.")
    read_json(directory, CONFIG)
    if find_file(directory, TOKENIZER) is None:
        raise InputError(f"{directory}: expected {TOKENIZER}, got no such file. Write it with AutoTokenizer's save_pretrained().")
    weight_files(directory)


def import_name(directory: Path) -> str:
    """Return the default name of an import: the directory's, or the run's if it is an export of one."""
    path = directory.absolute()
    return path.parents[1].name if path.parts[-2:] == ("export", "hf") and path.parents[1].name else path.name


def weight_files(directory: Path) -> list[Path]:
    """Raises InputError if there are no safetensors, or files that the index names are missing."""
    if (single := find_file(directory, SINGLE)) is not None:
        return [single]
    index = directory / INDEX
    if find_file(directory, INDEX) is None:
        pickled = next((path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(directory.glob(pattern))), None)
        if pickled:
            remedy = "If you trust it, load it with transformers, and import what save_pretrained() writes."
            raise InputError(f"{directory}: expected {SINGLE}, got {pickled}, a pickle, which can run code. {remedy}")
        raise InputError(f"{directory}: expected {SINGLE} or {INDEX}, got neither. Name the directory of a model.")
    weight_map = read_json(directory, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map: expected tensors and their files, got {cut(repr(weight_map))}. Fetch it again.")
    files: dict[str, Path] = {}
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: expected names of files beside it, got {cut(repr(name))}. Fetch it again.")
        if name not in files:
            if (file := find_file(directory, name)) is None:
                raise InputError(f"{directory}: expected {cut(name)}, which {INDEX} names, got no such file. Fetch it.")
            files[name] = file
    return [files[name] for name in sorted(files)]


def find_file(directory: Path, name: str) -> Path | None:
    """Return the path of a file of the model, with links resolved; None if there is none.

    Raises InputError if it is no regular file, or a link that leaves the model: what it links to was never part of it. Links within a
    repository of the Hugging Face cache, from snapshots/REVISION/NAME to blobs/HASH, stay in the model.
    """
    path = directory / name
    try:
        root, file = directory.resolve(strict=True), path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return None
        problem = "a link to nothing"
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a link to itself; ValueError: a NUL in the name
        problem = f"an error: {one_line(error)}"
    else:
        if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
            root = root.parents[1]
        inside = file.is_relative_to(root)
        if inside and file.is_file():
            return file
        problem = "none that can be read to its end" if inside else f"a link to {file}, outside of the model"
    raise InputError(f"{cut(str(path), 1000)}: expected a file of the model, got {problem}. Replace it by a copy of the file.")


@contextmanager
def staged(directory: Path) -> Generator[Path]:
    """Yield a new directory beside `directory`, which is renamed to it after the block, or removed if the block fails.

    By then `directory` must be absent or empty. If it is a link, so is what it links to. Raises InputError if nothing can be written
    there, SaveError if the files cannot be written.
    """
    directory = directory.resolve()
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--output: expected a writable directory, got {directory} ({error.strerror}). Choose another.") from None
    try:
        yield partial
        partial.replace(directory)
    except OSError as error:
        raise SaveError(f"{directory}: {error.strerror}. Free space, or choose another directory with --output.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_kept_files(source: Path, target: Path) -> None:
    """Copy the files of a model that an import keeps, and that an export of the import returns. Raises InputError if one is no JSON."""
    for name in KEPT_FILES:
        if (file := find_file(source, name)) is not None:
            read_json(source, name)
            shutil.copyfile(file, target / name, follow_symlinks=False)


def refuse_to_overwrite(directory: Path, run_directory: RunDirectory) -> None:
    """Raises InputError unless `directory` is new, empty, or an earlier export of this run."""
    names, card = _names(directory), ""
    with suppress(OSError):
        card = read_regular(directory / CARD, MAX_BYTES).decode(errors="replace")
    foreign = {name for name in names - EXPORTED if not SHARD.fullmatch(name)}
    if foreign or (names and marker(run_directory) not in card):
        raise InputError(f"{directory}: expected a new directory, or an export of this run, got other files. Choose another with --output.")


def _names(directory: Path) -> set[str]:
    """Return what is in a directory, which may be absent."""
    try:
        return {entry.name for entry in directory.iterdir()}
    except FileNotFoundError:
        return set()
    except NotADirectoryError:
        return {"a file"} if directory.exists() else set()
    except OSError as error:
        raise InputError(f"--output: expected a directory, got {directory} ({error.strerror}). Choose another.") from None


def marker(run_directory: RunDirectory) -> str:
    """Return the line that identifies an export of this run: its path, hashed, because model cards are published."""
    return f"<!-- manta export {xxhash.xxh3_64_hexdigest(str(run_directory.path.resolve()).encode())} -->"


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of a model. Raises InputError if there is none, with the line of a mistake."""
    file = find_file(directory, name) or directory / name
    try:
        content = from_json(read_regular(file, MAX_BYTES))
        json.dumps(content, allow_nan=False)  # 1e999 is infinite
    except OSError as error:
        raise InputError(
            f"{directory / name}: expected JSON, got {error.strerror}. Name the directory of a model, such as hf download writes."
        ) from None
    except ValueError as error:
        raise InputError(f"{directory / name}: expected JSON, got an invalid file ({one_line(error)}). Fetch it again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{directory / name}: expected an object, got {type(content).__name__}. Fetch it again.")
    return content
