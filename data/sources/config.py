"""What a source of documents is, as config spells it, and which of its documents are taken."""

import re
from string import Formatter
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class FilterConfig(Section):
    """Which documents of a source are taken."""

    minimum_characters: int = Field(default=0, ge=0)
    """Shorter documents are left out."""
    maximum_characters: int | None = Field(default=None, ge=1)
    """Longer documents are left out."""
    matching: str | None = None
    """A regular expression (Python's); only documents in which it is found are taken."""
    not_matching: str | None = None
    """A regular expression (Python's); documents that contain a match are removed."""
    dedup: bool = False
    """Keep only the first of documents with identical text; reads the files twice."""

    @field_validator("matching", "not_matching")
    @classmethod
    def _is_an_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"got {value!r} ({error}), wants a regular expression; mend it") from None
        return value

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        if self.maximum_characters is not None and self.maximum_characters < self.minimum_characters:
            wants = f"at least minimum_characters {self.minimum_characters}"
            raise ValueError(f"maximum_characters: got {self.maximum_characters}, wants {wants}; raise it")
        return self


class SourceConfig(Section):
    """One source of documents; where only its path is wanted, the path may stand alone."""

    path: str = Field(min_length=1, examples=["my-text/*.txt"])
    """`stdlib:`, a file, directory or glob, a URL of any store that fsspec knows (s3://…), `hf:name`, `hf:name:config`, `hf:/local/dir`."""

    name: str | None = Field(default=None, min_length=1)
    """What mixtures and reports call it; its path where left out."""
    format: Literal["text", "json", "parquet", "arrow", "megatron", "nanogpt", "llm.c"] | None = None
    """What its files are; told by their names where left out. nanogpt's files are bare token ids, and must be named so."""
    text_field: str | None = Field(default=None, min_length=1)
    """Instead of data.text_field, for this source. A field of token ids (a list of integers) is taken as it is."""
    template: str | None = None
    """Several fields joined into one text: "{title}\\n\\n{body}"; {{ and }} stand for braces."""
    validation: str | None = Field(default=None, min_length=1)
    """A path whose documents are all held out; data.validation then takes nothing from this source."""
    epochs: float | None = Field(default=None, gt=0)
    """How often a run may read it at most; a run that would read more is refused."""
    filter: FilterConfig = FilterConfig()
    """Which of its documents are taken."""

    @property
    def called(self) -> str:
        return self.name or self.path

    @field_validator("template")
    @classmethod
    def _names_fields(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            fields = template_fields(value)
        except ValueError as error:
            raise ValueError(f"got {value!r} ({error}), wants text with {{field}} in it; mend it") from None
        if not fields or not all(re.fullmatch(r"\w[\w .-]*", name) for name in fields):
            raise ValueError(f"got {value!r}, wants text with {{field}} in it; name at least one field, and nothing but fields")
        return value

    @model_validator(mode="after")
    def _one_way_to_text(self) -> Self:
        if self.template is not None and self.text_field is not None:
            raise ValueError("template: got one beside text_field; wants one of the two: leave one out")
        return self


def template_fields(template: str) -> list[str]:
    """The names in braces, in order. Raises ValueError where it is malformed, or asks for more than a field."""
    parts = list(Formatter().parse(template))
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise ValueError("a field has no : and no ! in its braces")
    return [name for _, name, _, _ in parts if name is not None]
