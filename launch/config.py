"""From a YAML file and overrides to one validated config. Each problem is one line: file, key, what was expected, what was set, remedy."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from manta.cluster.config import ClusterConfig
from manta.data.config_history import upgrade, version_1_keys
from manta.data.errors import InputError, cut, shown
from manta.data.storage.location import expand_local
from manta.launch.config_errors import render_errors
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.plain_scalars import field_type
from manta.trainer.config.training import TrainingConfig
from manta.trainer.config.yaml_file import COMMAND_LINE, ConfigError, did_you_mean, parse_value, read_yaml, to_yaml
from manta.trainer.run_directory import RunDirectory

PRESETS = Path(__file__).parent / "presets"
Tree = dict[str, Any]


class RunConfig(TrainingConfig):
    """The config of a run: the sections that each rank reads, and where the ranks run."""

    cluster: ClusterConfig = ClusterConfig()

    def to_yaml(self) -> str:
        return to_yaml(self.model_dump(mode="json"))


def load(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config in `file`, with overrides `section.key=value` applied. Raises ConfigError.

    A run directory's config is read under today's key names; in a user's file an old name is an error.
    """
    tree, complete = read_yaml(file, RunConfig), set(ModelConfig.model_fields)
    run_dir, excluded = RunDirectory(file.parent), ()
    if file == run_dir.config_file and run_dir.manifest_file.exists():  # an earlier version may have written it, and known fewer keys
        tree, complete, excluded = upgrade(tree), version_1_keys("model"), run_dir.rolled_back()
    sources = dict.fromkeys(_leaves(tree), str(file))
    for override in overrides:
        key, value = _parse_override(override)
        _set(tree, key, value)
        sources = {name: source for name, source in sources.items() if not f"{name}.".startswith(f"{key}.")}
        sources |= dict.fromkeys((key, *_leaves(value, key)), COMMAND_LINE)
    if isinstance(model := tree.get("model"), dict) and "preset" in model and not model.keys() >= complete:
        values = preset(model["preset"], sources.get("model.preset", str(file)))
        tree["model"] = _merge(values, model)
        if _is_path(model["preset"]):
            sources = {f"model.{key}": str(model["preset"]) for key in values} | sources
    return validate(tree, file, sources).skip_also(excluded)


def find_run(directory: Path) -> RunDirectory:
    """Raises InputError if it is no run directory."""
    run_dir = RunDirectory(directory.absolute())
    run_dir.check()
    if not run_dir.config_file.exists():
        raise no_run(directory, run_dir.config_file.name)
    return run_dir


def no_run(directory: Path, missing: str) -> InputError:
    """Return the error for a directory without a file that each run has. It names a run just in it, or that it is part of."""
    inner = sorted(path.parent for path in directory.glob("*/config.yaml"))  # skips what cannot be read
    near = (RunDirectory(path) for path in (*inner, *directory.absolute().parents))
    meant = next((run for run in near if run.config_file.exists() and run.manifest_file.exists()), None)
    quoted = shlex.quote(str(directory))
    if meant:
        remedy = f"Did you mean {meant.quoted}?"
    elif (directory / "source.json").exists():
        remedy = f"It is an import; train it: manta train FILE --weights-only {quoted}"
    elif (directory / "config.json").exists():
        remedy = f"Import it first: manta import {quoted}"
    else:
        remedy = f"Start a run: manta train FILE run.dir={quoted}"
    return InputError(f"{directory}: expected a run directory, got no {missing}. {remedy}")


def find_trained_run(directory: Path) -> RunDirectory:
    """Return the directory of a run that has a checkpoint, or of an import. Raises InputError before torch is imported."""
    RunDirectory(directory.absolute()).check()
    if (directory / "source.json").exists():
        return RunDirectory(directory.absolute())
    run_dir = find_run(directory)
    load(run_dir.config_file)
    if not run_dir.saved_step():
        raise InputError(f"{directory}: expected a run with a checkpoint, got none. Train it first: manta resume {run_dir.quoted}")
    return run_dir


def validate(tree: Tree, file: Path, sources: Mapping[str, str]) -> RunConfig:
    """Return the config. Raises ConfigError. sources: for each dotted key, the file or command line that set it."""
    try:
        # Strict JSON does not read text as a number, nor `yes` as true, and still reads paths and tuples.
        return RunConfig.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(render_errors(error, RunConfig, str(file), sources))) from None
    except TypeError as error:
        raise ConfigError(f"{file}: expected numbers, texts, lists and sections, got another type: {error}. Change it.") from None


def preset(name: object, place: str) -> Tree:
    """Return the model section of a named preset, or of a YAML file whose path is relative to the working directory.

    place: what set model.preset, for the message. Raises ConfigError.
    """
    if not _is_path(name):
        names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
        if name not in names:
            remedy = did_you_mean(str(name), names) or "Use one of them."
            expected = f"the path of a YAML file, or one of {', '.join(names)}"
            raise ConfigError(f"{place}: model.preset: expected {expected}, got {shown(name)}. {remedy}")
        return read_yaml(PRESETS / f"{name}.yaml", ModelConfig)
    try:
        path = expand_local(Path(str(name)))
    except ValueError as error:
        raise ConfigError(f"{place}: model.preset: {error}") from None
    if not path.is_file():
        remedy = "Name a model.yaml, relative to the working directory."
        raise ConfigError(f"{place}: model.preset: expected the path of a YAML file, got {shown(name)}, which is no file. {remedy}")
    tree = read_yaml(path, ModelConfig)
    if "preset" in tree or any(section in tree for section in RunConfig.model_fields):
        raise ConfigError(f"{path}: expected the keys of a model section, got {', '.join(tree)}. Write layers: 12 and so on.")
    return tree


def _is_path(preset: object) -> bool:
    return isinstance(preset, str) and (preset.endswith((".yaml", ".yml")) or "/" in preset)


def _merge(below: Tree, above: Tree) -> Tree:
    """Return both, key by key and section by section; `above` wins."""
    both = {key for key in below.keys() & above.keys() if isinstance(below[key], dict) and isinstance(above[key], dict)}
    return {**below, **above, **{key: _merge(below[key], above[key]) for key in both}}


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)*", key):
        raise ConfigError(f"{COMMAND_LINE}: expected section.key=value, got {cut(repr(text))}. Write train.steps=100, for example.")
    if value != (readable := value.encode(errors="replace").decode()):
        raise ConfigError(f"{COMMAND_LINE}: {key}: expected UTF-8, got {shown(readable)}. Write it in UTF-8.")
    return key, parse_value(key, value, field_type(RunConfig, key))


def _set(tree: Tree, dotted: str, value: object) -> None:
    *sections, key = dotted.split(".")
    for name in sections:
        inner = tree.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{COMMAND_LINE}: {dotted}: expected {name} to be a section, got {shown(inner)}. Set {name} instead.")
        tree = inner
    tree[key] = value


def _leaves(tree: object, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix
