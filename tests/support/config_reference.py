"""Write docs/config.md: every key of a config, with its default and description.

.venv/bin/python tests/support/config_reference.py > docs/config.md
"""

import json
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from manta.launch.config import RunConfig
from manta.launch.config_errors import description, section_of

INTRODUCTION = """\
A YAML file has these sections. `section.key=value` on the command line overrides it.

Values are read as the type of the key. Where it is text, plain text stays what was written: a directory may be called `2024`, a source
`no`. Where it is an integer, `4.0` and `1e4` are integers. `~` at the start of a path is the home directory. A URL with a password is
refused: set the store's credentials in the environment.
"""


def reference() -> str:
    """Return the Markdown text of docs/config.md."""
    lines = ["# Every key of a config", "", *INTRODUCTION.splitlines(), ""]
    for name, field in RunConfig.model_fields.items():
        section = section_of(field)
        if section is None:
            lines += [f"## {name}", "", f"Default `{field.default}`. {description(field)}", ""]
            continue
        lines += [f"## {name}", "", "| key | default | |", "|---|---|---|", *_rows(section, name), ""]
    return "\n".join(lines)


def _rows(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"| `{prefix}.{name}` | {_default(field)} | {description(field)} |"
        if (inner := section_of(field)) is not None:
            yield from _rows(inner, f"{prefix}.{name}")


def _default(field: FieldInfo) -> str:
    """Return the default as JSON; nothing for a section, whose keys follow with their own defaults."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "" if isinstance(default, BaseModel) else f"`{json.dumps(default, default=str)}`"


if __name__ == "__main__":
    print(reference())  # noqa: T201
