"""YAML as people mean it."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from manta.data.errors import InputError


class ConfigError(InputError):
    """Something in a config is wrong; a line for each thing."""


class Loader(yaml.SafeLoader):
    """YAML 1.1 as people mean it: 1e-4 is a number, 24:00:00 a time and not 86,400, and a key stands once."""


class Dumper(yaml.SafeDumper):
    """What it writes is read as it was: a text that would be taken for a number stands in quotes."""


for _either in (Loader, Dumper):
    _either.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
    )

_TIME = ("tag:yaml.org,2002:str", re.compile(r"^\d+(:\d+)+$"))
for _digit in "0123456789":
    Loader.yaml_implicit_resolvers[_digit].insert(0, _TIME)


def _mapping(loader: Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: dict[object, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{key.start_mark.name}:{line}: got a list or section for a key, wants a name; write name: value")
        if key.value in seen:
            raise ConfigError(
                f"{key.start_mark.name}:{line}: {key.value}: got it twice, first in line {seen[key.value]}, wants it once; remove one"
            )
        seen[key.value] = line
    loader.flatten_mapping(node)
    return {loader.construct_object(key, deep=True): loader.construct_object(value, deep=True) for key, value in node.value}


Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
