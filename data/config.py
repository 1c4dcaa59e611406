"""The `data` and `tokenizer` sections of a run's config."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, Field, field_validator, model_validator

from manta.data.sources.config import Section, SourceConfig

BYTES = 256  # a byte-level vocabulary holds each of them, so that any text can be encoded


class StageConfig(Section):
    """From when on sources are mixed by which weights."""

    from_tokens: int = Field(default=0, ge=0)
    """Tokens of all samples before the stage, those that data.skip leaves out too; the first begins at 0."""
    weights: dict[str, float] = Field(min_length=1, examples=["{web: 0.7, code: 0.3}"])
    """By name of source, its share of the samples; they are divided by their sum. A source that is not named gives none."""

    @field_validator("from_tokens", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return whole_number(value)

    @field_validator("weights")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not weight > 0:
                raise ValueError(f"got {weight:g} for {name!r}, wants more than 0; leave out a source that gives none")
        return value


class LengthConfig(Section):
    """From when on sequences are how long."""

    from_tokens: int = Field(default=0, ge=0)
    """Tokens that the run has read when the stage begins; it takes effect at the next step."""
    sequence_length: int = Field(ge=2, examples=[256])
    """A divisor of data.sequence_length: a sample of that many tokens is cut into so many shorter ones."""

    @field_validator("from_tokens", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return whole_number(value)


class CacheConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Where shards of a remote corpus lie on a node, once fetched."""

    directory: Path = Path("~/.cache/manta/shards")
    """On a local disk; all runs of a node share it."""
    bytes: int = Field(default=200_000_000_000, ge=1)
    """How much it may hold; the shards that were read the longest ago go first."""

    @field_validator("bytes", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return whole_number(value)


class DataConfig(Section):
    sources: tuple[SourceConfig, ...] = Field(min_length=1, examples=["[my-text/*.txt]"])
    """Where text comes from: a list of paths or of sections, or sections by name. Files are text, JSONL, parquet, Arrow or token shards."""

    mixture: tuple[StageConfig, ...] = ()
    """Shares of the sources, in stages; one stage may stand alone. Where left out, all are read as one, each in proportion to its size."""

    sequence_length: int = Field(ge=2, examples=[1024])
    """Tokens a sample predicts."""

    curriculum: tuple[LengthConfig, ...] = ()
    """Shorter sequences to begin with, in stages; as many tokens a step. Causal and packing cut only."""

    packing: Literal["cut", "best_fit"] = "cut"
    """cut: documents end to end, cut into samples. best_fit: whole documents in each sample, padded; only longer ones are cut."""

    separate_documents: bool = False
    """Whether a token sees its own document only, of the several in a sample; positions begin anew in each. Of a pair: both parts."""

    objective: Literal["causal", "masked"] = "causal"
    """causal: each token is predicted from those before it. masked: hidden tokens from all the others (BERT)."""

    fill_in_the_middle: float = Field(default=0.0, ge=0, le=1)
    """Share of a sample's documents whose middle is moved to their end and predicted from both sides. Causal only."""

    suffix_first: float = Field(default=0.5, ge=0, le=1)
    """Share of those that show the suffix before the prefix."""

    mask_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of tokens that a masked objective predicts: 80 % of them hidden, 10 % replaced, 10 % left as they are."""

    whole_words: bool = False
    """Whether a masked objective hides whole words and not single tokens."""

    pairs: Literal["next_sentence", "sentence_order", "none"] = "next_sentence"
    """What a masked objective asks of two parts: whether B follows A (BERT), whether they were swapped (ALBERT), or nothing (RoBERTa)."""

    skip: tuple[tuple[int, int], ...] = ()
    """Ranges [first, end) of sample numbers that are never read, as `manta data sample-at` tells them; later samples move up."""

    shuffle_shards: int | None = Field(default=None, ge=1)
    """So many shards at a time are shuffled through; all where left out. For a corpus that is larger than the cache."""

    directory: str = Field(default="corpora", min_length=1)
    """Where prepared corpora lie, a directory or a URL; runs share it."""

    cache: CacheConfig = CacheConfig()
    """Where shards of a remote directory are kept on each node."""

    text_field: str = Field(default="text", min_length=1)
    """The field of a JSONL line or the column of a table that holds a document's text."""

    validation: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of documents held out; a hash of its text decides on which side a document falls."""

    bad_rows: Literal["fail", "skip"] = "fail"
    """Whether a malformed line or row ends the preparation, or is left out, counted and told."""

    workers: int | None = Field(default=None, ge=1)
    """Processes that prepare a corpus; none given: one per core. The result does not depend on it."""

    ray_address: str | None = Field(default=None, min_length=1)
    """Address of a Ray cluster whose cores prepare the corpus (auto, or ray://…); all its nodes must see the directory."""

    live: bool = False
    """Whether text is tokenized while it is read, with no preparation: in the files' own order, on the same ranks only."""

    @field_validator("sources", mode="before")
    @classmethod
    def _as_meant(cls, value: object) -> object:
        """One source may stand alone; they may stand by name; and YAML takes an unquoted `[stdlib:]` for a section."""
        if isinstance(value, dict) and not _is_bare(value) and "path" not in value:
            named = cast("dict[str, Any]", value)
            value = [{"name": name, **(one if isinstance(one, dict) else {"path": one})} for name, one in named.items()]
        listed = [value] if isinstance(value, (str, dict)) else value
        if not isinstance(listed, (list, tuple)):
            return listed
        spelled = (f"{next(iter(one))}:" if _is_bare(one) else one for one in cast("Sequence[Any]", listed))
        return tuple({"path": one} if isinstance(one, str) else one for one in spelled)

    @field_validator("directory", mode="before")
    @classmethod
    def _also_a_path(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("mixture", mode="before")
    @classmethod
    def _one_stage_may_stand_alone(cls, value: object) -> object:
        if isinstance(value, dict):
            return ({"weights": value},)
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fits_the_objective(self) -> Self:
        if self.objective == "masked":
            least = 5 if self.pairs != "none" else 3
            if self.sequence_length < least:
                frame = "[CLS] A [SEP] B [SEP]" if self.pairs != "none" else "[CLS] text [SEP]"
                raise ValueError(f"sequence_length: got {self.sequence_length}, wants at least {least} for {frame} (masked); raise it")
            if self.packing == "best_fit" and self.pairs != "none":
                raise ValueError(f"packing: got best_fit beside pairs {self.pairs}, whose parts are cut from running text; set pairs none")
        others = {"causal": ("whole_words", "pairs", "mask_share"), "masked": ("fill_in_the_middle", "suffix_first", "curriculum")}
        for key in others[self.objective]:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: got {_short(getattr(self, key))}, and objective {self.objective} has none; leave it out")
        return self

    @model_validator(mode="after")
    def _each_source_once(self) -> Self:
        names = [source.called for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources names {name!r} {names.count(name)} times; name it once")
        return self

    @model_validator(mode="after")
    def _stages_follow(self) -> Self:
        names = {source.called for source in self.sources}
        for key, stages in (("mixture", self.mixture), ("curriculum", self.curriculum)):
            problem = stage_problem([stage.from_tokens for stage in stages])
            if problem:
                raise ValueError(f"{key}: {problem}")
        for stage in self.mixture:
            if unknown := sorted(stage.weights.keys() - names):
                raise ValueError(f"mixture: got {unknown[0]!r}, wants names of sources; use {', '.join(sorted(names))}")
        for name in sorted(names - {name for stage in self.mixture for name in stage.weights} if self.mixture else ()):
            raise ValueError(
                f"mixture: got no weight for {name!r} in any stage, wants each source in one; name it, or drop it from sources"
            )
        for stage in self.curriculum:
            if self.sequence_length % stage.sequence_length:
                wants = f"a divisor of data.sequence_length {self.sequence_length}"
                raise ValueError(f"curriculum: got sequence_length {stage.sequence_length}, wants {wants}; change it")
        if self.curriculum and self.packing != "cut":
            raise ValueError("curriculum: got one beside packing best_fit, which cuts no document; leave one out")
        return self

    @model_validator(mode="after")
    def _skips_in_order(self) -> Self:
        end = 0
        for first, stop in self.skip:
            if not end <= first < stop:
                raise ValueError(f"skip: got [{first}, {stop}], wants ranges [first, end) that rise and do not overlap; sort or mend them")
            end = stop
        return self

    @model_validator(mode="after")
    def _live_is_simple(self) -> Self:
        if not self.live:
            return self
        for key in ("mixture", "curriculum", "packing", "skip", "shuffle_shards", "ray_address"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: got {_short(getattr(self, key))} beside live, which reads its files as they come; leave one out")
        for source in self.sources:
            told = f"sources: got {{}} for {source.called!r} beside live, which {{}}; leave one out"
            if source.filter.dedup:
                raise ValueError(told.format("filter dedup", "reads each document once and remembers none"))
            if source.epochs is not None:
                raise ValueError(told.format(f"epochs {source.epochs:g}", "does not know beforehand how much there is"))
        if self.objective == "masked" and self.pairs == "next_sentence":
            raise ValueError("pairs: got next_sentence beside live, which has no other text to draw B from; use sentence_order or none")
        return self


def stage_problem(begins: Sequence[int]) -> str | None:
    """What is wrong with the places where stages begin, if anything."""
    if begins and begins[0] != 0:
        return f"the first stage begins at {begins[0]} tokens, wants from_tokens 0; lower it, or put a stage before it"
    for before, after in pairwise(begins):
        if after <= before:
            return f"got from_tokens {after} after {before}, wants them to rise; sort the stages"
    return None


def whole_number(value: object) -> object:
    """1e9 is a whole number, whatever YAML calls it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class TokenizerConfig(Section):
    algorithm: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    """What to train: byte-level BPE, or a byte-level unigram model (both spell any text), or BERT's WordPiece."""

    vocabulary: int = Field(default=4096, ge=BYTES + 1, le=2**24)
    """Size of the tokenizer to train, special tokens included; a small corpus may fill less of it."""

    lowercase: bool = False
    """Whether WordPiece lowers letters and drops accents, as BERT's uncased models do."""

    file: Path | None = None
    """A tokenizer.json to load instead of training one. Masked objectives need `[CLS] [SEP] [MASK] [PAD]` or `<s> </s> <mask> <pad>`."""

    train_bytes: int = Field(default=30_000_000, ge=1)
    """Bytes of text the tokenizer is trained on: a sample spread over all sources, the same each time."""

    end_of_text: str = Field(default="<|endoftext|>", min_length=1)
    """The token that ends each document; a BERT tokenizer has no other than [SEP]."""

    @model_validator(mode="after")
    def _lowers_words(self) -> Self:
        if self.lowercase and self.algorithm != "wordpiece":
            raise ValueError(f"lowercase: got true, and algorithm {self.algorithm} keeps text as it is; leave it out")
        return self


def _is_bare(source: object) -> bool:
    return isinstance(source, dict) and list(cast("dict[str, Any]", source).values()) == [None]


def _short(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, (str, int, float)) else "some"
