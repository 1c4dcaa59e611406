"""Render pydantic's errors, one line each: `run.yaml: train.steps: expected an integer, got "many". Set train.steps=1000, for example.`"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from manta.data.config_history import RENAMED
from manta.data.errors import LONGEST_LINE, InvalidValueError, cut, one_line, shown
from manta.trainer.config.yaml_file import did_you_mean

Location = tuple[int | str, ...]

MAX_PROBLEMS = 20  # to report at once

EXPECTED: dict[str, str] = yaml.safe_load(Path(__file__).with_name("config_errors.yaml").read_text(encoding="utf-8"))


def render_errors(error: ValidationError, root: type[BaseModel], file: str, sources: Mapping[str, str]) -> list[str]:
    """Return a line for each problem. root: the class of the whole config. sources: for each dotted key, what set it."""
    errors = error.errors(include_url=False)
    locations = [details["loc"] for details in errors]
    # A list with an invalid entry is reported as too short as well.
    inside = {loc[:end] for loc in locations for end in range(len(loc))}
    problems = [_Problem(details=details, root=root, file=file, sources=sources) for details in errors if details["loc"] not in inside]
    # A value that is none of several types is reported once for each type.
    unique = [*{problem.loc: problem for problem in reversed(problems)}.values()][::-1]
    rest = f"{file}: and {len(unique) - MAX_PROBLEMS} other problems."
    return [cut(problem.line(), LONGEST_LINE) for problem in unique[:MAX_PROBLEMS]] + ([rest] if len(unique) > MAX_PROBLEMS else [])


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the class of the section, or of the list of sections, that a field holds; None if it holds a value."""
    annotations = chain([field.annotation], get_args(field.annotation))
    return next((a for a in annotations if isinstance(a, type) and issubclass(a, BaseModel)), None)


def description(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    details: ErrorDetails
    root: type[BaseModel]
    file: str
    sources: Mapping[str, str]

    def line(self) -> str:
        details, loc = self.details, self.loc
        key, got = _dotted(loc), shown(details["input"])
        match details["type"]:
            case "value_error":
                return self._value_error(key)
            case "extra_forbidden":
                expected, remedy = self._known_keys(loc)
                got = shown(loc[-1])
            case "missing":
                expected, got, remedy = "a value", "nothing", self._remedy()
            case kind:
                expected = EXPECTED[kind].format(**_plain(details.get("ctx", {}))) if kind in EXPECTED else details["msg"]
                remedy = self._remedy()
        about = self._about()
        return f"{self._source(key)}: {key}: expected {expected}{f' ({about})' if about else ''}, got {got}. {remedy}"

    @property
    def loc(self) -> Location:
        """The location as far as it names keys: of a value with several types, pydantic appends the type."""
        loc, field = _find(self.root, self.details["loc"])
        is_mapping = field is not None and any(get_origin(a) is dict for a in (field.annotation, *get_args(field.annotation)))
        return self.details["loc"] if is_mapping or self.details["type"] == "extra_forbidden" else loc

    def _value_error(self, section: str) -> str:
        """Render a validator's error: of a field, or of a section whose keys it names."""
        error = self.details.get("ctx", {}).get("error")
        message = one_line(error) if error else self.details["msg"]
        if isinstance(value := self.details["input"], str):
            message = message.replace(quoted := repr(value)[1:-1], cut(quoted))
        if message.startswith("expected"):
            return f"{self._source(section)}: {section}: {message}"
        prefix = f"{section}." if section else ""
        keys = [f"{prefix}{key}" for key in (error.keys if isinstance(error, InvalidValueError) else [message.partition(":")[0]])]
        # If keys disagree, name the command line if it set one of them: it was set last.
        places = [self.sources[key] for key in keys if key in self.sources]
        place = "command line" if "command line" in places else self._source(section)
        return f"{place}: {prefix}{message}"

    def _known_keys(self, loc: Location) -> tuple[str, str]:
        """Return what was expected in place of an unknown key, and the remedy."""
        old = _dotted(part for part in loc if isinstance(part, str))
        if old in RENAMED:
            return "the key's new name", f"Rename it to {RENAMED[old]}."
        _, field = _find(self.root, loc[:-1])
        section = self.root if field is None else section_of(field)
        assert section is not None
        names, name = list(section.model_fields), _dotted(loc[:-1]) or "the config"
        return f"a key of {name}", did_you_mean(str(loc[-1]), names) or f"Use one of {', '.join(names)}."

    def _source(self, key: str) -> str:
        """Return what set the key or something in it; else, what set the section that lacks it."""
        parts = key.split(".")
        inside = (source for name, source in self.sources.items() if f"{name}.".startswith(f"{key}."))
        around = (self.sources[name] for end in range(len(parts) - 1, 0, -1) if (name := ".".join(parts[:end])) in self.sources)
        return next(chain(inside, around), self.file)

    def _about(self) -> str:
        """Return the start of the field's description, without its capital and period."""
        loc, field = _find(self.root, self.details["loc"])
        if field is None or isinstance(loc[-1], int):
            return ""
        sentence = re.split(r"[.;] ", description(field))[0].rstrip(".")
        return sentence[:1].lower() + sentence[1:] if sentence.partition(" ")[0].istitle() else sentence

    def _remedy(self) -> str:
        loc, field = _find(self.root, self.details["loc"])
        if field is None or isinstance(loc[-1], int):
            return "Change it."
        # No override can name a key of a list's entry.
        key = str(loc[-1]) if any(isinstance(part, int) for part in loc) else _dotted(loc)
        example, section = next(iter(field.examples or ()), None), section_of(field)
        if example is None and section is not None and field.is_required():
            required = {name: inner.examples for name, inner in section.model_fields.items() if inner.is_required() and inner.examples}
            return f"Set {' '.join(f'{key}.{name}={examples[0]}' for name, examples in required.items())}, for example."
        if example is not None:
            return f"Set {key}={example}, for example{'' if field.is_required() else ', or omit it'}."
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if default is None or isinstance(default, BaseModel):
            return f"Set {key}." if field.is_required() else "Omit it."
        return f"Omit it, or set {key}={json.dumps(default, default=str)}, the default."


def _plain(context: Mapping[str, Any]) -> dict[str, Any]:
    """Return pydantic's context with 0.0 as 0, and without the quotes around a literal's choices."""
    plain = dict(context)
    for name, value in context.items():
        if isinstance(value, str):
            plain[name] = value.replace("'", "")
        elif isinstance(value, float) and value.is_integer():
            plain[name] = int(value)
    return plain


def _dotted(parts: Iterator[int | str] | Sequence[int | str]) -> str:
    return ".".join(str(part) for part in parts)


def _find(root: type[BaseModel], loc: Location) -> tuple[Location, FieldInfo | None]:
    """Return the part of a location that names keys of the config, and the last key's field: of an entry of a mapping, the mapping's."""
    section: type[BaseModel] | None = root
    field: FieldInfo | None = None
    for end, part in enumerate(loc):
        if isinstance(part, str):  # a number is an index in a list of sections
            if section is None:
                return loc[:end], field
            field = section.model_fields.get(part)
            section = None if field is None else section_of(field)
    return loc, field
