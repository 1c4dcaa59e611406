"""Read and write configs in YAML 1.1, but 1e-4 is a number and 010 is none, dates and times are text, and keys are text and unique."""

import difflib
import errno
import os
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from manta.data.errors import InputError, cut
from manta.data.storage.regular_file import read_regular
from manta.trainer.config.plain_scalars import fit

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 4 << 20, 100_000, 50
"""Of a config, which may name some thousand sources. Values are counted after aliases are replaced, which can multiply them without end."""
COMMAND_LINE = "command line"
_SURROGATE = re.compile("[\ud800-\udfff]")


class ConfigError(InputError):
    """An invalid config. The message has a line for each problem."""

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"\S{201,}", lambda match: cut(match[0]), message))


class _Loader(yaml.SafeLoader):
    values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.values += 1
        if self.values > MAX_VALUES:
            raise _too_much(self.get_mark())
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Raises ConfigError in place of the various errors of constructors: ValueError for a month 31, KeyError for `!!bool maybe`, …"""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            value = error
        is_huge = isinstance(value, int) and value.bit_length() > 1023
        if is_huge or isinstance(value, Exception) or (isinstance(value, str) and _SURROGATE.search(value)):
            kind = "text of Unicode characters" if isinstance(value, str) else f"a value of type {node.tag.rpartition(':')[2]}"
            got = repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list or section"
            raise ConfigError(f"{_place(node.start_mark)}: expected {kind}, got {cut(got)}. Change it.")
        return value


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
    )

_TIME = ("tag:yaml.org,2002:str", re.compile(r"^\d+(:\d+)+$"))
_DATE = "tag:yaml.org,2002:timestamp"
del _Loader.yaml_implicit_resolvers["="]
for _digit in "0123456789":
    _Loader.yaml_implicit_resolvers[_digit] = [
        _TIME,
        *(resolver for resolver in _Loader.yaml_implicit_resolvers[_digit] if resolver[0] != _DATE),
    ]


def _mapping(loader: _Loader, node: yaml.Node) -> dict[Hashable, Any]:
    """Keys are text, as they are written: `no` and 2024 are names."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{_place(node.start_mark)}: expected a section, got another value. Write name: value.")
    lines: dict[object, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{_place(key.start_mark)}: expected a name as the key, got a list or section. Write name: value.")
        if key.value in lines:
            raise ConfigError(
                f"{_place(key.start_mark)}: {key.value}: expected it once, got it also in line {lines[key.value]}. Remove one."
            )
        lines[key.value] = line
    loader.flatten_mapping(node)
    return {loader.construct_scalar(key): loader.construct_object(value, deep=True) for key, value in node.value}


# 010 is an error, not eight, and +1:30 is not ninety.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(str(node.value), 0))
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(file: Path, schema: object = None) -> dict[str, Any]:
    """Return the sections of a YAML file. schema: the class that will validate them, if plain values are to be read as its types.

    Raises ConfigError if there is no such file, if it is too large or no YAML, or if it has no sections.
    """
    text = ""
    try:
        text = read_regular(file, MAX_BYTES).decode()
        tree = parse_yaml(text, str(file), schema)
    except OSError as error:
        names = [path.name for path in file.parent.glob("*.y*ml")] if os.path.isdir(file.parent) else []  # noqa: PTH112  it never raises
        remedy = did_you_mean(file.name, names) or "Name a YAML file, such as examples/gpt-tiny.yaml."
        is_dangling = error.errno == errno.ENOENT and file.is_symlink()
        problem = "a link to a file that does not exist" if is_dangling else f"an error: {error.strerror}"
        raise ConfigError(f"{file}: expected a config, got {problem}. {remedy}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: expected UTF-8, got another encoding at byte {error.start}. Save it as UTF-8.") from None
    except yaml.reader.ReaderError as error:
        place = f"{file}:{text.count(chr(10), 0, error.position) + 1}"
        raise ConfigError(f"{place}: expected YAML, got the unprintable character {chr(error.character)!a}. Remove it.") from None
    except yaml.MarkedYAMLError as error:
        place = _place(error.problem_mark) if error.problem_mark else file
        raise ConfigError(f"{place}: expected YAML, got an error: {error.problem}. Correct it.") from None
    if not isinstance(tree, dict):
        got = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{file}: expected sections, got {got}. Write section: and, indented below it, key: value.")
    return tree


def parse_value(key: str, text: str, schema: object) -> Any:
    """Return a key's value on the command line as YAML reads it; text that is no valid YAML stays text.

    Raises ConfigError if it is too large.
    """
    try:
        return parse_yaml(text, f"{COMMAND_LINE}: {key}", schema)
    except yaml.YAMLError:
        return text


def parse_yaml(text: str, name: str, schema: object) -> Any:
    """Return what a text holds. name: of its file, for messages. Raises yaml.YAMLError, or ConfigError if it is too large."""
    loader = _Loader(text)
    loader.name = name
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        fit(node, schema)
        return loader.construct_document(node)
    except RecursionError:
        raise _too_much(loader.get_mark()) from None
    finally:
        loader.dispose()


def _check_size(root: yaml.Node) -> None:
    """Raises ConfigError if the values are too many or too deep, with each alias replaced by what it stands for."""
    waiting, count = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise _too_much(node.start_mark)
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        waiting += [(child, depth + 1) for entry in children for child in (entry if isinstance(entry, tuple) else (entry,))]


def _too_much(mark: yaml.Mark) -> ConfigError:
    limits = f"at most {MAX_VALUES:,} values in {MAX_DEPTH} levels, with aliases replaced by what they stand for"
    return ConfigError(f"{_place(mark)}: expected {limits}, got more. Shorten it.")


def _place(mark: yaml.Mark) -> str:
    return mark.name if mark.name.startswith(COMMAND_LINE) else f"{mark.name}:{mark.line + 1}"


def to_yaml(tree: dict[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def did_you_mean(name: str, names: Iterable[str]) -> str | None:
    """Return a question that suggests the most similar name; None if no name is similar."""
    similar = difflib.get_close_matches(name, list(names), n=1)
    return f"Did you mean {similar[0]}?" if similar else None
