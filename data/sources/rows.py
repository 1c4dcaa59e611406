"""Turn a table row or a JSON object into a document: the text of one field, a template of several fields, or token ids."""

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal, NamedTuple, Self, cast

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

Content = str | NDArray[np.uint32]
Kind = Literal["text", "ids"]
KIND_NAMES: dict[Kind, str] = {"text": "text", "ids": "a list of token ids"}

_FIX_ROW = "Fix or remove the row."
_OPENED = {b"[", b"{", b"[{"}  # a value that continues on the next lines
_ONE_PER_LINE = "Write each object in a line, for example with jq -c 'if type == \"array\" then .[] else . end' FILE."
_MAX_SHOWN = 12  # fields in an error
_USUAL_FIELDS = ("text", "content", "body", "document", "article", "raw_content", "passage", "story", "code", "input_ids")


class RowError(ValueError):
    """A row without a usable document. The message says why; the caller adds the file and the line or row."""


class MixedKindsError(RowError):
    """Text among token ids, or ids among text: an error of the source, not of the row, so it is never skipped."""


class UndecodableValue(NamedTuple):
    """A value in a row that is not UTF-8."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldReader:
    """Reads one field, which holds text or a list of token ids."""

    name: str
    key: str
    """The config key that names the field, for errors."""
    kind: Kind | None = None
    """What the source's other rows hold, if known."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, row: Mapping[str, Any]) -> Content:
        """Raises RowError."""
        value = _field(row, self.name, self.key)
        kind: Kind
        if isinstance(value, list) and value and isinstance(value[0], str):
            problem = f"expected text or a list of token ids, got a list of {len(value)} texts"
            raise RowError(f"field {self.name!r}: {problem}. Join them to one text.")
        if isinstance(value, str):
            kind, content = "text", _check_text(value, self.name)
        elif isinstance(value, list) and (self.kind != "text" or set(map(type, value)) == {int}):
            kind, content = "ids", _to_ids(cast("list[object]", value), self.name)
        else:
            raise _wrong_type(value, self.name, "text or a list of token ids" if self.kind is None else KIND_NAMES[self.kind])
        if self.kind not in {kind, None}:
            problem = f"expected {KIND_NAMES['text' if kind == 'ids' else 'ids']} as in other rows, got {KIND_NAMES[kind]}"
            raise MixedKindsError(f"field {self.name!r}: {problem}. Make two sources of it.")
        return content


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateReader:
    """Joins several fields into one text."""

    parts: tuple[tuple[str, str | None], ...]
    """Literal text and the field that follows it, if any."""
    key: str
    """The config key that holds the template, for errors."""
    kind: Kind = "text"

    @classmethod
    def parse(cls, template: str, key: str) -> Self:
        """Parse a template that the config has validated. Fields are looked up by name alone: str.format would follow attributes."""
        return cls(parts=tuple((literal, name) for literal, name, _, _ in Formatter().parse(template)), key=key)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    def read(self, row: Mapping[str, Any]) -> str:
        """Return the text; empty if all of its fields are. Raises RowError."""
        texts: list[str] = []
        has_content = False
        for literal, name in self.parts:
            texts.append(literal)
            if name is not None:
                texts.append(_format_value(_field(row, name, self.key), name))
                has_content |= bool(texts[-1])
        return "".join(texts) if has_content else ""


RowReader = FieldReader | TemplateReader


def missing_field(name: str, names: list[str], key: str) -> str:
    """Return the error for a row or a table that has only the fields `names`."""
    usual = [field for field in _USUAL_FIELDS if field in names]
    best = difflib.get_close_matches(name, names, n=1) + usual
    remedy = f"Set {key} to {best[0]!r}" if best and not key.startswith("template") else f"Set {key}"
    shown = [f"{field!r:.60}" for field in names[:_MAX_SHOWN]]
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return f"expected a field {name!r:.60}, got {', '.join(shown) or 'no fields'}{more}. {remedy}."


def column_of(name: str, names: Collection[str]) -> str:
    """Return the column that holds a field: `meta` for `meta.text`, unless a column has that name itself."""
    return name if name in names else name.partition(".")[0]


def parse_json(line: bytes) -> dict[str, Any]:
    """Parse one JSON object. Raises RowError.

    pydantic's parser is twice as fast as json's. What it rejects goes to json, which decides on byte order marks and on half a
    surrogate pair in an unused field, and which has the better error messages.
    """
    record: object
    try:
        record = from_json(line, cache_strings="keys")
    except ValueError:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise RowError(f"expected UTF-8, got an {error.reason}. Convert the file.") from None
        except (ValueError, RecursionError) as error:
            remedy = _ONE_PER_LINE if line.strip() in _OPENED else _FIX_ROW
            raise RowError(f"expected one JSON object per line, got malformed JSON ({error}). {remedy}") from None
    if isinstance(record, list) and record and isinstance(record[0], dict):
        raise RowError(f"expected one JSON object per line, got a list of objects. {_ONE_PER_LINE}")
    if not isinstance(record, dict):
        raise RowError(f"expected one JSON object per line, got {_type_name(record)}. {_FIX_ROW}")
    return cast("dict[str, Any]", record)


def _field(row: Mapping[str, Any], name: str, key: str) -> object:
    """Return the value of a field, or of a field in an object: `meta.text`. Raises RowError if there is none."""
    if name in row:
        return row[name]
    column, dot, rest = name.partition(".")
    inner = row.get(column)
    if isinstance(inner, UndecodableValue):
        return inner
    if not dot or not isinstance(inner, dict):
        raise RowError(missing_field(name, list(row), key))
    return _field(cast("dict[str, Any]", inner), rest, key)


def _to_ids(values: list[object], name: str) -> NDArray[np.uint32]:
    if set(map(type, values)) <= {int}:  # numpy would take true for 1
        numbers = cast("list[int]", values)
        if not numbers or (min(numbers) >= 0 and max(numbers) < 2**32):
            return np.array(numbers, dtype=np.uint32)
    index, value = next((i, value) for i, value in enumerate(values) if type(value) is not int or not 0 <= value < 2**32)
    shown = f"{value!r:.40}" if isinstance(value, (int, float)) else _type_name(value)
    raise RowError(f"field {name!r}: expected token ids (integers from 0 to {2**32 - 1}), got {shown} at [{index}]. {_FIX_ROW}")


def _format_value(value: object, name: str) -> str:
    if isinstance(value, str):
        return _check_text(value, name)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    raise _wrong_type(value, name, "text, a number or a boolean")


def _check_text(text: str, name: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can write half a surrogate pair; UTF-8, and so a tokenizer, cannot
            raise RowError(f"field {name!r}: expected text, got a lone surrogate. {_FIX_ROW}") from None
    return text


def _wrong_type(value: object, name: str, expected: str) -> RowError:
    if isinstance(value, UndecodableValue):
        return RowError(f"field {name!r}: expected UTF-8, got an {value.reason}. Convert it.")
    if isinstance(value, dict) and value:
        inner = f"{next(iter(cast('dict[str, Any]', value)))!r:.60}"
        return RowError(f"field {name!r}: expected {expected}, got an object with fields. Name one of them, such as {name}.{inner[1:-1]}.")
    return RowError(f"field {name!r}: expected {expected}, got {_type_name(value)}. {_FIX_ROW}")


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__
