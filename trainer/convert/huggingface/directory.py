"""Directories of transformers: what must lie in one to be imported, and what may be overwritten by an export.

Knows no torch: a mistake is told before seconds are spent on loading it.
"""

import json
import re
from pathlib import Path
from typing import Any

import xxhash

from manta.data.errors import InputError
from manta.trainer.pretrained.source import KEPT
from manta.trainer.run_directory import RunDirectory

CONFIG, TOKENIZER, CARD = "config.json", "tokenizer.json", "README.md"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
FILES = {CONFIG, CARD, SINGLE, INDEX, *KEPT}


def check_import(directory: Path, output: Path) -> None:
    """Raises InputError where something already lies at `output`, or `directory` lacks config, tokenizer or weights."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: got something already there, wants a new or empty directory; choose another with --output")
    read_json(directory / CONFIG)
    if not (directory / TOKENIZER).exists():
        remedy = "write it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        raise InputError(f"{directory}: got no {TOKENIZER}, wants one; {remedy}")
    weight_files(directory)


def import_name(directory: Path) -> str:
    """What an import is called by default: as its directory, or as the run whose export it is."""
    path = directory.absolute()
    return path.parents[1].name if path.parts[-2:] == ("export", "hf") and path.parents[1].name else path.name


def weight_files(directory: Path) -> list[Path]:
    """Raises InputError where there are no safetensors, or not those that the index names."""
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.exists():
        pickled = next((path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(directory.glob(pattern))), None)
        if pickled:
            remedy = "load it with transformers where you trust it, save_pretrained() it, and import that"
            raise InputError(f"{directory}: got {pickled}, a pickle, which can run code, wants {SINGLE}; {remedy}")
        raise InputError(f"{directory}: got no {SINGLE} nor {INDEX}, wants a model's directory")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: {type(error).__name__}: {error}; wants the index that transformers writes") from None
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index}: got {name!r}, wants files that lie beside it")
        if not (directory / name).is_file():
            raise InputError(f"{directory}: got no {name}, which {INDEX} names; fetch it")
    return [directory / name for name in names]


def make_directory(partial: Path) -> None:
    """What is written beside --output and then renamed. Raises InputError where it can not be made."""
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        wants = "a directory that can be written"
        raise InputError(f"--output: got a place in {partial.parent} ({error.strerror}), wants {wants}; choose another") from None


def refuse_to_overwrite(directory: Path, home: RunDirectory) -> None:
    """Raises InputError where `directory` is not new, empty, or an earlier export of this run."""
    if not directory.exists():
        return
    names = {entry.name for entry in directory.iterdir()} if directory.is_dir() else {"a file"}
    foreign = {name for name in names - FILES if not SHARD.fullmatch(name)}
    told = directory / CARD
    if foreign or (names and not (told.is_file() and mark(home) in told.read_text(errors="replace"))):
        raise InputError(
            f"{directory}: got something that is no export of this run, wants a new or empty directory; choose another with --output"
        )


def mark(home: RunDirectory) -> str:
    """By which an export is known again as this run's: its place, hashed, since cards are published."""
    return f"<!-- manta export {xxhash.xxh3_64_hexdigest(str(home.path.resolve()).encode())} -->"


def read_json(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        told = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{file}: {told}; wants a model's directory, as transformers writes it") from None
    if not isinstance(held, dict):
        raise InputError(f"{file}: got {type(held).__name__}, wants an object")
    return held
