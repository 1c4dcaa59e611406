"""The config of one source of documents: its path, how to read it, and which documents to keep."""

import re
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from manta.data.storage.location import expand, expand_local

Count = Annotated[int, Field(le=2**40)]
"""Of steps, samples, bytes and so on. Sums and products of some of them fit into 64 bits."""
Size = Annotated[int, Field(le=2**24)]
"""Of a model or a sequence."""
Location = Annotated[str, AfterValidator(expand)]
"""A path or URL, with `~` replaced by the home directory."""
LocalPath = Annotated[Path, BeforeValidator(expand_local)]
"""The same, and local."""

LONGEST_DOCUMENT = 256_000_000  # bytes: more than any book, and tokenizing it takes up to 30 GB of memory


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class FilterConfig(Section):
    """Which documents of a source are kept."""

    minimum_characters: Count = Field(default=0, ge=0)
    """Shorter documents are removed."""
    maximum_characters: Count | None = Field(default=None, ge=1)
    """Longer documents are removed."""
    matching: str | None = None
    """A regular expression (Python's); documents without a match are removed."""
    not_matching: str | None = None
    """A regular expression (Python's); documents that contain a match are removed."""
    dedup: bool = False
    """Keep only the first of documents with identical text; reads the files twice."""

    @property
    def accepts_all(self) -> bool:
        """Whether text does not matter; only such a filter makes sense for token ids. `dedup` depends on other documents."""
        return self.model_copy(update={"dedup": False}) == FilterConfig()

    def rejection(self, text: str) -> str | None:
        """Return the reason to remove a document, of a fixed set of reasons; None to keep it. Ignores `dedup`."""
        if len(text) < self.minimum_characters:
            return "shorter than minimum_characters"
        if self.maximum_characters is not None and len(text) > self.maximum_characters:
            return "longer than maximum_characters"
        if self.matching and not re.search(self.matching, text):
            return "matching not found"
        if self.not_matching is not None and re.search(self.not_matching, text):
            return "not_matching found"
        return None

    @field_validator("matching", "not_matching")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"expected a regular expression, got {value!r} ({error}). Fix it.") from None
        return value

    @model_validator(mode="after")
    def _keeps_some(self) -> Self:
        if self.maximum_characters is not None and self.maximum_characters < self.minimum_characters:
            expected = f"at least minimum_characters ({self.minimum_characters})"
            raise ValueError(f"maximum_characters: expected {expected}, got {self.maximum_characters}. Raise it.")
        return self


class SourceConfig(Section):
    """One source of documents. A path can be given instead of a section with only a path."""

    path: Location = Field(min_length=1, examples=["my-text/*.txt"])
    """File, directory, glob or URL (s3://…, any fsspec store), `hf:name[:config]`, `hf:/local/dir`, or `stdlib:` (Python's own source)."""

    name: str | None = Field(default=None, min_length=1)
    """Its name in mixtures and reports; the path if omitted."""
    format: Literal["text", "json", "parquet", "arrow", "megatron", "nanogpt", "llm.c"] | None = None
    """text, json, parquet, arrow, megatron, nanogpt or llm.c; by suffix if omitted, except nanogpt, whose files are bare token ids."""
    text_field: str | None = Field(default=None, min_length=1)
    """Overrides data.text_field for this source. Lists of integers in the field are used as token ids."""
    template: str | None = None
    """Joins several fields into one text: "{title}\\n\\n{body}"; write {{ and }} for braces."""
    validation: Location | None = Field(default=None, min_length=1)
    """Path of this source's validation documents; data.validation then does not apply to it."""
    epochs: float | None = Field(default=None, gt=0)
    """Maximum number of epochs; a run that would read more is refused."""
    filter: FilterConfig = FilterConfig()
    """Which of its documents are kept."""

    @property
    def resolved_name(self) -> str:
        return self.name or self.path

    @field_validator("template")
    @classmethod
    def _has_fields(cls, value: str | None) -> str | None:
        if value is not None:
            expected = "text with fields in braces, such as {title}"
            try:
                parts = list(Formatter().parse(value))
            except ValueError as error:
                raise ValueError(f"expected {expected}, got {value!r} ({error}). Fix it.") from None
            names = [name for _, name, _, _ in parts if name is not None]
            options = any(spec or conversion for _, _, spec, conversion in parts)
            if options or not names or not all(re.fullmatch(r"\w[\w .-]*", name) for name in names):
                raise ValueError(f"expected {expected}, got {value!r}. Write field names alone, without : and !.")
        return value

    @model_validator(mode="after")
    def _has_one_way_to_text(self) -> Self:
        if self.template is not None and self.text_field is not None:
            raise ValueError("template: expected template or text_field, got both. Remove one.")
        return self
