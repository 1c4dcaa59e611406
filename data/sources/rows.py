"""A row, of a table or of a JSON line, gives a document's content: text of one field, of several, or token ids."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

Content = str | NDArray[np.uint32]
Kind = Literal["text", "ids"]

_IDS_WANTED = f"wants token ids: whole numbers from 0 to {2**32 - 1}"


class RowError(ValueError):
    """A row that gives no document, and why; whoever reads the file adds where it stands."""


class MixedKindsError(RowError):
    """Ids among text, or text among ids: wrong with the source and not with the row, so no row is skipped for it."""


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Stands in a row for a value that is not UTF-8."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field, which holds text or a list of token ids."""

    name: str
    key: str
    """The config's key that names the field, as an error spells it."""
    kind: Kind | None = None
    """What the source's other rows hold, where that is known."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def of(self, row: Mapping[str, Any]) -> Content:
        """Raises RowError."""
        if self.name not in row:
            raise RowError(self.missing(list(row)))
        value = row[self.name]
        if isinstance(value, str):
            _check(value, self.name)
            found: Kind = "text"
        elif isinstance(value, list) and (self.kind != "text" or set(map(type, value)) == {int}):
            value = _ids(cast("list[object]", value), self.name)
            found = "ids"
        else:
            raise RowError(_not_text(value, self.name, "text or a list of token ids" if self.kind is None else _SPELLED[self.kind]))
        if self.kind not in {found, None}:
            raise MixedKindsError(self.mixed(found))
        return value

    def mixed(self, found: Kind) -> str:
        other = "text" if found == "ids" else "ids"
        return f"field {self.name!r} holds {_SPELLED[found]}, other rows {_SPELLED[other]}; wants one kind a source: make it two"

    def missing(self, names: list[str]) -> str | None:
        """What to tell of a row or a table that has these fields, if anything."""
        return None if self.name in names else _no_field(self.name, names, self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Several fields in one text."""

    template: str
    parts: tuple[tuple[str, str | None], ...]
    """Literal text and the field that follows it, if any."""
    key: str

    @classmethod
    def parse(cls, template: str, key: str) -> Self:
        """Of a template that config has checked. Its fields are looked up by their name alone: str.format would look into them."""
        return cls(template=template, parts=tuple((text, name) for text, name, _, _ in Formatter().parse(template)), key=key)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    def of(self, row: Mapping[str, Any]) -> str:
        """Empty where all its fields are. Raises RowError."""
        spelled: list[str] = []
        filled = False
        for text, name in self.parts:
            spelled.append(text)
            if name is not None:
                if name not in row:
                    raise RowError(self.missing(list(row)))
                value = _spell(row[name], name)
                spelled.append(value)
                filled = filled or bool(value)
        return "".join(spelled) if filled else ""

    def missing(self, names: list[str]) -> str | None:
        return next((_no_field(name, names, self.key) for name in self.names if name not in names), None)


Reader = Field | Template

_SPELLED: dict[Kind, str] = {"text": "text", "ids": "a list of token ids"}


def parse_json(line: bytes) -> dict[str, Any]:
    """One JSON object. Raises RowError.

    pydantic's parser is twice as fast as json's. What it refuses goes to json, which has the last word: on a byte order mark, on half
    a surrogate pair in a field that nobody asked for, and on how to tell what is wrong.
    """
    record: object
    try:
        record = from_json(line, cache_strings="keys")
    except ValueError:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise RowError(f"not UTF-8 ({error.reason}); convert the file") from None
        except (ValueError, RecursionError) as error:
            raise RowError(f"malformed JSON ({error}); wants one JSON object a line") from None
    if not isinstance(record, dict):
        raise RowError(f"got a JSON {type(record).__name__}; wants one JSON object a line")
    return cast("dict[str, Any]", record)


def _ids(values: list[object], name: str) -> NDArray[np.uint32]:
    if set(map(type, values)) <= {int}:  # numpy would take true for 1
        numbers = cast("list[int]", values)
        if not numbers or (min(numbers) >= 0 and max(numbers) < 2**32):
            return np.array(numbers, dtype=np.uint32)
    at, value = next((at, value) for at, value in enumerate(values) if type(value) is not int or not 0 <= value < 2**32)
    spelled = f"{value!r:.40}" if isinstance(value, (int, float)) else "null" if value is None else type(value).__name__
    raise RowError(f"field {name!r} holds {spelled} at [{at}]; {_IDS_WANTED}")


def _spell(value: object, name: str) -> str:
    if isinstance(value, str):
        _check(value, name)
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    raise RowError(_not_text(value, name, "text, a number or a boolean"))


def _check(text: str, name: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; UTF-8, and so a tokenizer, can not
            raise RowError(f"field {name!r} holds a lone surrogate, which is no text; mend or drop the line") from None


def _not_text(value: object, name: str, wanted: str) -> str:
    if isinstance(value, Undecodable):
        return f"field {name!r} is not UTF-8 ({value.reason}); convert it"
    return f"field {name!r} is {'null' if value is None else type(value).__name__}; wants {wanted}"


def _no_field(name: str, names: list[str], key: str) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:8]
    return f"no field {name!r}; it has {', '.join(map(repr, near)) or 'none'}; set {key}"
