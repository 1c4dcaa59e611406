"""The `data` and `tokenizer` sections of a run's config."""

from pathlib import Path
from typing import Any, Self, cast

from pydantic import BaseModel, Field, field_validator, model_validator

BYTES = 256  # a byte-level vocabulary holds each of them, so that any text can be encoded


class DataConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    sources: tuple[str, ...] = Field(min_length=1, examples=["[my-text/*.txt]"])
    """Where text comes from: `stdlib:`, a file, directory or glob (text, JSONL, parquet), `hf:name`, `hf:name:config`, `hf:/local/dir`."""

    sequence_length: int = Field(ge=2, examples=[1024])
    """Tokens a sample predicts."""

    directory: Path = Path("corpora")
    """Where prepared corpora live; runs share it."""

    text_field: str = Field(default="text", min_length=1)
    """The field of a JSONL line or the column of a table that holds a document's text."""

    validation: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of documents held out; a hash of its text decides on which side a document falls."""

    workers: int | None = Field(default=None, ge=1)
    """Processes that prepare a corpus; none given: one per core. The result does not depend on it."""

    @field_validator("sources", mode="before")
    @classmethod
    def _as_meant(cls, value: object) -> object:
        """One source may stand alone; and YAML takes an unquoted `[stdlib:]` for a section."""
        listed = [value] if isinstance(value, str) or _is_bare(value) else value
        if not isinstance(listed, list):
            return listed
        return tuple(f"{next(iter(one))}:" if _is_bare(one) else one for one in cast("list[Any]", listed))

    @model_validator(mode="after")
    def _each_source_once(self) -> Self:
        for source in self.sources:
            if self.sources.count(source) > 1:
                raise ValueError(f"sources names {source!r} {self.sources.count(source)} times; name it once")
        return self


class TokenizerConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    vocabulary: int = Field(default=4096, ge=BYTES + 1, le=2**24)
    """Size of the byte-level BPE to train, the end-of-text token included; a small corpus may fill less of it."""

    file: Path | None = None
    """A tokenizer.json to load instead of training one."""

    train_bytes: int = Field(default=30_000_000, ge=1)
    """Bytes of text the tokenizer is trained on: a sample spread over all sources, the same each time."""

    end_of_text: str = Field(default="<|endoftext|>", min_length=1)
    """The token that ends each document."""


def _is_bare(source: object) -> bool:
    return isinstance(source, dict) and list(cast("dict[str, Any]", source).values()) == [None]
