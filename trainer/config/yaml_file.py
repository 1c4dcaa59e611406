"""Read and write configs in YAML 1.1, with three differences: 1e-4 is a number, 24:00:00 is text, and a key may appear only once."""

import difflib
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from manta.data.errors import InputError, one_line


class ConfigError(InputError):
    """An invalid config. The message has a line for each problem."""


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
    )

_TIME = ("tag:yaml.org,2002:str", re.compile(r"^\d+(:\d+)+$"))
for _digit in "0123456789":
    _Loader.yaml_implicit_resolvers[_digit].insert(0, _TIME)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    lines: dict[object, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        where = f"{key.start_mark.name}:{line}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where}: expected a name as the key, got a list or section. Write name: value.")
        if key.value in lines:
            raise ConfigError(f"{where}: {key.value}: expected it once, got it also in line {lines[key.value]}. Remove one.")
        lines[key.value] = line
    loader.flatten_mapping(node)
    return {loader.construct_object(key, deep=True): loader.construct_object(value, deep=True) for key, value in node.value}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the sections of a YAML file. Raises ConfigError if there is no such file, or if it has no sections."""
    try:
        with file.open(encoding="utf-8") as stream:
            tree = yaml.load(stream, _Loader)  # noqa: S506  a SafeLoader
    except OSError as error:
        names = [path.name for path in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        remedy = did_you_mean(file.name, names) or "Name a YAML file, such as examples/gpt-tiny.yaml."
        raise ConfigError(f"{file}: expected a config, got an error: {error.strerror}. {remedy}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: expected UTF-8, got another encoding at byte {error.start}. Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: expected YAML, got an error: {one_line(error)}. Correct it.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected sections, got {type(tree).__name__}. Write section: and, indented below it, key: value.")
    return tree


def parse_value(text: str) -> Any:
    """Return a value as YAML reads it; text that is no valid YAML stays text."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError:
        return text


def to_yaml(tree: dict[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def did_you_mean(name: str, names: Iterable[str]) -> str | None:
    """Return a question that suggests the most similar name; None if no name is similar."""
    similar = difflib.get_close_matches(name, list(names), n=1)
    return f"Did you mean {similar[0]}?" if similar else None
