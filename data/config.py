"""The `data` and `tokenizer` sections of a run's config."""

from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, Field, field_validator, model_validator

BYTES = 256  # a byte-level vocabulary holds each of them, so that any text can be encoded


class DataConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    sources: tuple[str, ...] = Field(min_length=1, examples=["[my-text/*.txt]"])
    """Where text comes from: `stdlib:`, a file, directory or glob (text, JSONL, parquet), `hf:name`, `hf:name:config`, `hf:/local/dir`."""

    sequence_length: int = Field(ge=2, examples=[1024])
    """Tokens a sample predicts."""

    objective: Literal["causal", "masked"] = "causal"
    """causal: each token is predicted from those before it. masked: hidden tokens from all the others, and whether B follows A (BERT)."""

    separate_documents: bool = False
    """Whether a token sees its own document only, of the several in a sample; positions then begin anew in each. Causal only."""

    mask_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of tokens that a masked objective predicts: 80 % of them hidden, 10 % replaced, 10 % left as they are."""

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
    def _fits_the_objective(self) -> Self:
        if self.objective == "masked" and self.separate_documents:
            raise ValueError("separate_documents: got true, wants false where objective is masked: B must see A; leave it out")
        if self.objective == "masked" and self.sequence_length < 5:
            raise ValueError(f"sequence_length: got {self.sequence_length}, wants at least 5 for [CLS] A [SEP] B [SEP] (masked); raise it")
        return self

    @model_validator(mode="after")
    def _each_source_once(self) -> Self:
        for source in self.sources:
            if self.sources.count(source) > 1:
                raise ValueError(f"sources names {source!r} {self.sources.count(source)} times; name it once")
        return self


class TokenizerConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    vocabulary: int = Field(default=4096, ge=BYTES + 1, le=2**24)
    """Size of the byte-level BPE to train, special tokens included; a small corpus may fill less of it."""

    file: Path | None = None
    """A tokenizer.json to load instead of training one; for a masked objective it has [CLS] [SEP] [MASK] [PAD] or <s> </s> <mask> <pad>."""

    train_bytes: int = Field(default=30_000_000, ge=1)
    """Bytes of text the tokenizer is trained on: a sample spread over all sources, the same each time."""

    end_of_text: str = Field(default="<|endoftext|>", min_length=1)
    """The token that ends each document; a BERT tokenizer has no other than [SEP]."""


def _is_bare(source: object) -> bool:
    return isinstance(source, dict) and list(cast("dict[str, Any]", source).values()) == [None]
