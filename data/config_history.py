"""Config keys of earlier versions: how written configs are read, and what the identities of runs and corpora hash.

A key may be renamed. A run directory that was written before is translated when it is read; in a user's file the old name is an error that
names the new one. Identities hash the key names of version 1, and a key that was added since counts only if it differs from its default:
checkpoints and corpora stay valid across both.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

_TABLES = yaml.safe_load(Path(__file__).with_name("config_history.yaml").read_text(encoding="utf-8"))
RENAMED: dict[str, str] = _TABLES["renamed"]
"""Old dotted key -> today's."""
_VERSION_1_NAMES = {new: old for old, new in RENAMED.items()}
_VERSION_1 = {section: set(names.split()) for section, names in _TABLES["version_1"].items()}


def version_1_keys(section: str) -> set[str]:
    """Return the keys of a section that every written config has, under today's names."""
    old = (_join(section, name) for name in _VERSION_1[section])
    return {RENAMED.get(key, key).removeprefix(_join(section, "")) for key in old}


def upgrade(written: Any, section: str = "") -> Any:
    """Return a config that an earlier version wrote, or one section of it, under today's key names."""
    return _rename(written, RENAMED, section)


def as_version_1(identity: Any, section: str = "") -> Any:
    """Return what `identifying_keys` returns under the key names of version 1, as identities hash it."""
    return _rename(identity, _VERSION_1_NAMES, section)


def identifying_keys(config: BaseModel, section: str = "") -> dict[str, Any]:
    """Return a section as JSON, without keys that were added after version 1 and are at their default.

    Keys keep the order of the fields: the directory names of corpora hash it.
    """
    dumped, kept = config.model_dump(mode="json"), dict[str, Any]()
    for name, field in type(config).model_fields.items():
        key, value = _join(section, name), getattr(config, name)
        is_added = _VERSION_1_NAMES.get(key, key).rpartition(".")[2] not in _VERSION_1.get(section, ())
        if is_added and value == field.get_default(call_default_factory=True):
            continue
        if isinstance(value, BaseModel):
            kept[name] = identifying_keys(value, key)
        elif isinstance(value, tuple) and all(isinstance(item, BaseModel) for item in value):
            kept[name] = [identifying_keys(item, key) for item in value]
        else:
            kept[name] = dumped[name]
    return kept


def _rename(tree: Any, names: Mapping[str, str], section: str) -> Any:
    """Rename keys in nested sections, and in lists of them."""
    if isinstance(tree, list):
        return [_rename(item, names, section) for item in tree]
    if not isinstance(tree, dict):
        return tree
    renamed: dict[str, Any] = {}
    for name, value in tree.items():
        key = _join(section, str(name))  # in a damaged file a key may be a number
        renamed[names.get(key, key).removeprefix(_join(section, ""))] = _rename(value, names, key)
    return renamed


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
