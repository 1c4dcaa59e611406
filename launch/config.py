"""From a YAML file and overrides to one validated value. Whatever is wrong is told in a line each: file, key, got, wanted, remedy."""

import difflib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from manta.cluster.config import ClusterConfig
from manta.data.config_history import RENAMED, upgrade, version_1_keys
from manta.data.errors import InputError
from manta.launch.yaml_file import ConfigError, Dumper, Loader
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.training import TrainingConfig
from manta.trainer.run_directory import RunDirectory

Tree = dict[str, Any]


class RunConfig(TrainingConfig):
    """A whole run: what each rank reads, and where the ranks are placed."""

    cluster: ClusterConfig = ClusterConfig()

    def to_yaml(self) -> str:
        return yaml.dump(self.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def load(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in `file`, with `section.key=value` laid over it. Raises ConfigError.

    A run directory's config is read under today's key names; in a file of the user's an old name is an error.
    """
    tree, complete = _read(file), set(ModelConfig.model_fields)
    if _is_of_a_run(file):  # an earlier version may have written it, and have known fewer keys
        tree, complete = upgrade(tree), version_1_keys("model")
    sources = dict.fromkeys(_leaves(tree), str(file))
    for override in overrides:
        key, value = _parse_override(override)
        _set(tree, key, value)
        sources = {name: source for name, source in sources.items() if not f"{name}.".startswith(f"{key}.")}
        sources |= dict.fromkeys((key, *_leaves(value, key)), "command line")
    if isinstance(model := tree.get("model"), dict) and "preset" in model and not model.keys() >= complete:
        values = preset(model["preset"], file)
        tree["model"] = _laid_over(values, model)
        if _is_path(model["preset"]):
            sources = {f"model.{key}": str(model["preset"]) for key in values} | sources
    return validate(tree, file, sources)


def _is_of_a_run(file: Path) -> bool:
    home = RunDirectory(file.parent)
    return file.name == home.config_file.name and home.manifest_file.exists()


def resume_config(directory: Path) -> Path:
    """The config file of the run in `directory`. Raises InputError where there is none."""
    file = RunDirectory(directory).config_file
    if not file.exists():
        start = f"manta train FILE run.dir={shlex.quote(str(directory))}"
        raise InputError(f"{directory}: got no {file.name}, wants a run directory; start one with: {start}")
    return file


def validate(tree: Tree, file: Path, sources: Mapping[str, str]) -> RunConfig:
    """`sources`: where each dotted key was set, for the message."""
    try:
        # Strict JSON: no text for a number, no `yes` for one; and still paths and tuples.
        return RunConfig.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A list with a wrong entry is told as too short besides.
        causes = [e for e in found if not any(len(o["loc"]) > len(e["loc"]) and o["loc"][: len(e["loc"])] == e["loc"] for o in found)]
        raise ConfigError("\n".join(_tell(e, file, sources) for e in causes)) from None
    except TypeError as error:
        raise ConfigError(f"{file}: {error}; wants numbers, texts, lists and sections") from None


def preset(name: object, file: Path) -> Tree:
    """A model section to start from: a named one, or a YAML file of yours, looked for from where the command is given."""
    if _is_path(name):
        path = Path(str(name))
        if not path.is_file():
            raise ConfigError(f"{file}: model.preset: got {name!r}, and {path.absolute()} is no file; wants the path of a model.yaml")
        tree = _read(path)
        if "preset" in tree or any(section in tree for section in RunConfig.model_fields):
            raise ConfigError(f"{path}: got {', '.join(tree)}, wants the keys of a model section, such as layers: 12")
        return tree
    folder = resources.files("manta.launch.presets")
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name not in names:
        wants = f"one of {', '.join(names)}, or the path of a YAML file"
        raise ConfigError(f"{file}: model.preset: got {name!r}, wants {wants}{_nearest(str(name), names)}")
    return yaml.safe_load((folder / f"{name}.yaml").read_text())


def _is_path(preset: object) -> bool:
    return isinstance(preset, str) and (preset.endswith((".yaml", ".yml")) or "/" in preset)


def _laid_over(below: Tree, above: Tree) -> Tree:
    """Key by key, sections in sections too."""
    both = {key for key in below.keys() & above.keys() if isinstance(below[key], dict) and isinstance(above[key], dict)}
    return {**below, **above, **{key: _laid_over(below[key], above[key]) for key in both}}


def _read(file: Path) -> Tree:
    try:
        with file.open(encoding="utf-8") as stream:
            tree = yaml.load(stream, Loader)  # noqa: S506  a SafeLoader
    except OSError as error:
        near = _nearest(file.name, [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else [])
        raise ConfigError(f"{file}: {error.strerror}; wants a config in YAML, such as examples/gpt-tiny.yaml{near}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start}: not UTF-8; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}; wants YAML") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: got {type(tree).__name__}, wants sections: {', '.join(RunConfig.model_fields)}")
    return tree


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)*", key):
        raise ConfigError(f"command line: got {text!r}, wants section.key=value, such as train.steps=100")
    try:
        return key, yaml.load(value, Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError:
        return key, value


def _set(tree: Tree, dotted: str, value: object) -> None:
    *sections, key = dotted.split(".")
    for name in sections:
        inner = tree.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"command line: {dotted}: {name} is no section")
        tree = inner
    tree[key] = value


def _leaves(tree: object, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix


def _tell(error: ErrorDetails, file: Path, sources: Mapping[str, str]) -> str:
    """One line for one of pydantic's errors."""
    key = ".".join(str(part) for part in error["loc"])
    where = _source(key, file, sources)
    got = json.dumps(error["input"], default=str)
    match error["type"]:
        case "missing":
            return f"{where}: {key}: got nothing, wants {_described(error['loc'])}; {_remedy(error['loc'])}"
        case "extra_forbidden":
            old = ".".join(part for part in error["loc"] if isinstance(part, str))
            if old in RENAMED:
                return f"{where}: {key}: expected a known key, got {old}, which is now {RENAMED[old]}. Rename it."
            names = list(_section(error["loc"][:-1]).model_fields)
            near = _nearest(str(error["loc"][-1]), names) or f"; use one of {', '.join(names)}"
            return f"{where}: {key}: got an unknown key, wants one that manta has{near}"
        case "value_error":
            told = str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
            # Two keys disagree: it is the one that was set last, on the command line, that brought it about.
            section = f"{key}." if key else ""
            named = {source for name, source in sources.items() if name.removeprefix(section) in re.findall(r"[a-z_.]+", told)}
            where = "command line" if "command line" in named else where
            return f"{where}: {key}{': ' if told.startswith(('got', 'expected')) else section[-1:]}{told}"
        case "too_short":
            return f"{where}: {key}: got {got}, wants at least one ({_described(error['loc'])}); {_remedy(error['loc'])}"
        case _:
            wants = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            return f"{where}: {key}: got {got}, wants {wants} ({_described(error['loc'])}); {_remedy(error['loc'])}"


def _source(key: str, file: Path, sources: Mapping[str, str]) -> str:
    """Where it was set, or something in it; else where the section was that lacks it."""
    parts = key.split(".")
    inside = (source for name, source in sources.items() if f"{name}.".startswith(f"{key}."))
    around = (sources[name] for end in range(len(parts) - 1, 0, -1) if (name := ".".join(parts[:end])) in sources)
    return next(chain(inside, around), str(file))


def _section(loc: Sequence[int | str]) -> type[BaseModel]:
    model: type[BaseModel] = RunConfig
    for part in (name for name in loc if isinstance(name, str)):  # a number is a place in a list of sections
        inner = _nested(model.model_fields[part])
        assert inner is not None
        model = inner
    return model


def _nested(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key is, be it one that may be left out."""
    annotations = (field.annotation, *get_args(field.annotation))
    return next((m for m in annotations if isinstance(m, type) and issubclass(m, BaseModel)), None)


def _field(loc: Sequence[int | str]) -> FieldInfo | None:
    names = [part for part in loc if isinstance(part, str)]
    return _section(names[:-1]).model_fields.get(names[-1])


def _key(loc: Sequence[int | str]) -> Sequence[int | str]:
    """As far as keys go: of a name in a mapping, the mapping."""
    section: type[BaseModel] | None = RunConfig
    for end, part in enumerate(loc):
        if isinstance(part, str):
            if section is None:
                return loc[:end]
            section = _nested(section.model_fields[part]) if part in section.model_fields else None
    return loc


def _described(loc: Sequence[int | str]) -> str:
    loc = _key(loc)
    field = _field(loc)
    prose = (field.description or "").strip() if field else ""
    return prose.rstrip(".") or f"the section {loc[-1]}"


def _remedy(loc: Sequence[int | str]) -> str:
    loc = _key(loc)
    field, key = _field(loc), ".".join(str(part) for part in loc if isinstance(part, str))
    if field is None:
        return f"set {key}"
    if any(isinstance(part, int) for part in loc):  # an entry of a list, which no override can name
        example = f"try {loc[-1]}={field.examples[0]}" if field.examples else "change it"
        return example if field.is_required() else f"{example}, or leave it out"
    if field.examples:
        return f"try {key}={field.examples[0]}"
    if isinstance(section := field.annotation, type) and issubclass(section, BaseModel):
        required = {name: inner for name, inner in section.model_fields.items() if inner.is_required() and inner.examples}
        needed = (f"{key}.{name}={inner.examples[0]}" for name, inner in required.items() if inner.examples)
        return f"try {' '.join(needed)}"
    return f"set {key}" if field.is_required() else f"leave it out, or try {key}={json.dumps(field.default, default=str)}"


def reference() -> str:
    """Every key of a config with its type, default and meaning, as Markdown: docs/config.md."""
    lines = ["# Every key of a config", "", "A YAML file of these sections; `section.key=value` on the command line is laid over it.", ""]
    for name, field in RunConfig.model_fields.items():
        section = _nested(field)
        if section is None:
            lines += [f"## {name}", "", f"`{field.default}` unless set: {_prose(field)}", ""]
            continue
        lines += [f"## {name}", "", "| key | default | |", "|---|---|---|", *_rows(section, name), ""]
    return "\n".join(lines)


def _rows(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"| `{prefix}.{name}` | {_default(field)} | {_prose(field)} |"
        if (inner := _nested(field)) is not None:
            yield from _rows(inner, f"{prefix}.{name}")


def _default(field: FieldInfo) -> str:
    """Empty for a section: its keys follow, with theirs."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "" if isinstance(default, BaseModel) else f"`{json.dumps(default, default=str)}`"


def _prose(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""
