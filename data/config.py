"""The `data` and `tokenizer` sections of a run's config."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from manta.data.source_config import LONGEST_DOCUMENT, Count, LocalPath, Location, Section, Size, SourceConfig
from manta.data.storage.location import check_local

BYTES = 256  # a byte-level vocabulary has a token for each byte, so that it can encode any text


class MixtureStageConfig(Section):
    """Weights of the sources from a number of tokens on."""

    from_tokens: int = Field(default=0, ge=0, le=2**60)
    """Start this stage after this many tokens, counting those that data.skip excludes; 0 for the first stage."""
    weights: dict[str, float] = Field(min_length=1, examples=["{web: 0.7, code: 0.3}"])
    """Share of each source by name, normalized to sum to 1; a source without a weight is not read."""

    @field_validator("weights")
    @classmethod
    def _check_positive(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not weight > 0:
                raise ValueError(f"expected weights above 0, got {weight:g} for {name!r}. Remove a source that is not to be read.")
        return value


class CurriculumStageConfig(Section):
    """The sequence length from a number of tokens on."""

    from_tokens: int = Field(default=0, ge=0, le=2**60)
    """Start this stage at the first step after this many tokens; 0 for the first stage."""
    sequence_length: Size = Field(ge=2, examples=[256])
    """Tokens per sequence: a divisor of data.sequence_length, into which samples are cut."""


class CacheConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """The cache of remote shards on each node."""

    directory: Annotated[Path, BeforeValidator(check_local)] = Path("~/.cache/manta/shards")
    """Directory on a local disk, shared by all runs on the node; `~` is the home directory there."""
    bytes: Count = Field(default=200_000_000_000, ge=1)
    """Maximum size; the least recently used shards are removed first."""


class DataConfig(Section):
    sources: tuple[SourceConfig, ...] = Field(min_length=1, examples=["[my-text/*.txt]"])
    """Text to train on: a list of paths, a list of sections with the keys below, or a mapping from names to paths or sections."""

    mixture: tuple[MixtureStageConfig, ...] = ()
    """Sampling weights of the sources: one set, or a list of stages; if omitted, each source is read in proportion to its size."""

    sequence_length: Size = Field(ge=2, examples=[1024])
    """Tokens per sample."""

    curriculum: tuple[CurriculumStageConfig, ...] = ()
    """Stages of shorter sequences, with the same number of tokens per step; for causal objectives with `packing: cut`."""

    packing: Literal["cut", "best_fit"] = "cut"
    """How samples are made: cut takes running text at fixed lengths, best_fit packs whole documents and pads."""

    separate_documents: bool = False
    """Limit attention to the token's own document, with positions restarting in each; a sentence pair counts as one document."""

    objective: Literal["causal", "masked"] = "causal"
    """What is predicted: the next token (causal), or masked tokens from all others as in BERT (masked)."""

    fill_in_the_middle: float = Field(default=0.0, ge=0, le=1)
    """Share of documents whose middle is moved to the end and predicted from both sides; for causal objectives."""

    suffix_first: float = Field(default=0.5, ge=0, le=1)
    """Share of the fill-in-the-middle documents that show the suffix before the prefix."""

    mask_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of tokens that a masked objective predicts: 80 % are masked, 10 % replaced by random tokens, 10 % kept."""

    whole_words: bool = False
    """Mask whole words instead of single tokens."""

    pairs: Literal["next_sentence", "sentence_order", "none"] = "next_sentence"
    """Second task of a masked objective: does B follow A (BERT), were A and B swapped (ALBERT), or none (RoBERTa)."""

    skip: tuple[tuple[Count, Count], ...] = ()
    """Ranges [first, end) of sample numbers to exclude, as `manta data sample-at` prints them; the samples after them are read earlier."""

    shuffle_shards: Count | None = Field(default=None, ge=1)
    """Shuffle within groups of this many shards, so that a corpus may be larger than the cache; default: all at once."""

    directory: Location = Field(default="corpora", min_length=1)
    """Directory or URL of prepared corpora, which runs share."""

    cache: CacheConfig = CacheConfig()
    """Each node's cache of shards from a remote directory."""

    text_field: str = Field(default="text", min_length=1)
    """Field of a JSONL line, or column of a table, that has a document's text."""

    validation: float = Field(default=0.01, ge=0, lt=0.5)
    """Share of documents held out for validation, chosen by a hash of their text; 0 for none, and then no validation loss is measured."""

    bad_rows: Literal["fail", "skip"] = "fail"
    """What a malformed line or row does: fail stops the preparation, skip excludes the row and counts it."""

    longest_document: Count = Field(default=LONGEST_DOCUMENT, ge=1)
    """Bytes of the longest line, or text of a row, that is read into memory; a longer one is a malformed row."""

    workers: Count | None = Field(default=None, ge=1)
    """Processes that prepare a corpus, without effect on the result; default: one per core."""

    ray_address: Location | None = Field(default=None, min_length=1)
    """Address of a Ray cluster whose cores prepare the corpus (auto, or ray://…); all its nodes must see the directory."""

    live: bool = False
    """Tokenize text while training, without preparation; text is read in file order, and the number of data ranks must not change."""

    @field_validator("sources", mode="before")
    @classmethod
    def _normalize_sources(cls, value: object) -> object:
        """Accept a single source and sources keyed by name. YAML reads an unquoted `[stdlib:]` as a section."""
        if isinstance(value, dict) and not _is_unquoted(value) and "path" not in value:
            named = cast("dict[str, Any]", value)
            value = [{"name": name, **(source if isinstance(source, dict) else {"path": source})} for name, source in named.items()]
        listed = [value] if isinstance(value, (str, dict)) else value
        if not isinstance(listed, (list, tuple)):
            return listed
        quoted = (f"{next(iter(source))}:" if _is_unquoted(source) else source for source in cast("Sequence[Any]", listed))
        return tuple({"path": source} if isinstance(source, str) else source for source in quoted)

    @field_validator("mixture", mode="before")
    @classmethod
    def _accept_single_stage(cls, value: object) -> object:
        if isinstance(value, dict):
            stage = cast("dict[str, Any]", value)
            is_whole = isinstance(stage.get("weights"), dict) and stage.keys() <= MixtureStageConfig.model_fields.keys()
            return (stage if is_whole else {"weights": stage},)
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        if self.objective == "masked":
            least, frame = (3, "[CLS] text [SEP]") if self.pairs == "none" else (5, "[CLS] A [SEP] B [SEP]")
            if self.sequence_length < least:
                raise ValueError(f"sequence_length: expected at least {least} for {frame} (masked), got {self.sequence_length}. Raise it.")
            if self.packing == "best_fit" and self.pairs != "none":
                raise ValueError(f"packing: expected cut with pairs {self.pairs}, got best_fit. Set pairs=none, or use cut.")
        others = {"causal": ("whole_words", "pairs", "mask_share"), "masked": ("fill_in_the_middle", "suffix_first", "curriculum")}
        for key, value in self._changed(*others[self.objective]):
            raise ValueError(f"{key}: expected no value with objective {self.objective}, got {value}. Remove it.")
        return self

    @model_validator(mode="after")
    def _check_sources_and_stages(self) -> Self:
        counts = Counter(source.resolved_name for source in self.sources)
        for name, count in counts.items():
            if count > 1:
                raise ValueError(f"sources: expected each source once, got {name!r} {count} times. Remove the others.")
        check_stages("mixture", [stage.from_tokens for stage in self.mixture])
        check_stages("curriculum", [stage.from_tokens for stage in self.curriculum])
        names = counts.keys()
        weighted = {name for stage in self.mixture for name in stage.weights}
        for name in sorted(weighted - names):
            raise ValueError(f"mixture: expected names of sources, got {name!r}. Use {', '.join(sorted(names))}.")
        for name in sorted(names - weighted) if self.mixture else ():
            raise ValueError(f"mixture: expected a weight for each source, got none for {name!r}. Add one, or remove it from sources.")
        for stage in self.curriculum:
            if self.sequence_length % stage.sequence_length:
                wanted = f"a divisor of data.sequence_length {self.sequence_length}"
                raise ValueError(f"curriculum: expected {wanted}, got sequence_length {stage.sequence_length}. Change one of the two.")
        if self.curriculum and self.packing != "cut":
            raise ValueError("curriculum: expected packing cut, which can be cut into shorter sequences, got best_fit. Remove one.")
        return self

    @model_validator(mode="after")
    def _check_skip(self) -> Self:
        previous = 0
        for first, end in self.skip:
            if not previous <= first < end:
                raise ValueError(f"skip: expected ascending ranges [first, end) without overlap, got [{first}, {end}]. Sort or merge them.")
            previous = end
        return self

    @model_validator(mode="after")
    def _check_live(self) -> Self:
        if not self.live:
            return self
        for key, value in self._changed("mixture", "curriculum", "packing", "skip", "shuffle_shards", "ray_address"):
            raise ValueError(f"{key}: expected no value with live, which reads files in their order, got {value}. Remove one of the two.")
        for source in self.sources:
            if source.filter.dedup or source.epochs is not None:
                key = "filter dedup" if source.filter.dedup else f"epochs {source.epochs:g}"
                name = source.resolved_name
                raise ValueError(f"sources: expected no {key} with live, which reads text once, got it for {name!r}. Remove it.")
        if self.objective == "masked" and self.pairs == "next_sentence":
            raise ValueError("pairs: expected no next_sentence with live, which has no second text for B. Use sentence_order or none.")
        return self

    def skip_also(self, ranges: Sequence[tuple[int, int]]) -> Self:
        """Return this config with more ranges of sample numbers in `skip`."""
        if not ranges:
            return self
        merged: list[tuple[int, int]] = []
        for first, end in sorted((*self.skip, *ranges)):
            if merged and first <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((first, end))
        return self.model_copy(update={"skip": tuple(merged)})

    def _changed(self, *keys: str) -> Iterator[tuple[str, str]]:
        """Yield those of these keys that differ from their defaults, with their values as text."""
        for key in keys:
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                yield key, str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, str | int | float) else "one"


def check_stages(key: str, starts: Sequence[int]) -> None:
    """Raise ValueError unless stages start at 0 tokens and their starts rise."""
    if starts and starts[0] != 0:
        raise ValueError(f"{key}: expected a first stage with from_tokens 0, got {starts[0]}. Lower it, or add a stage before it.")
    for before, after in pairwise(starts):
        if after <= before:
            raise ValueError(f"{key}: expected ascending from_tokens, got {after} after {before}. Sort the stages.")


class TokenizerConfig(Section):
    algorithm: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    """Tokenizer to train: byte-level BPE, byte-level unigram, or BERT's WordPiece."""

    vocabulary: int = Field(default=4096, ge=BYTES + 1, le=2**24)
    """Vocabulary size of the tokenizer to train, including special tokens; a small corpus may yield fewer tokens."""

    lowercase: bool = False
    """Lowercase text and strip accents, as BERT's uncased models do; for wordpiece."""

    file: LocalPath | None = None
    """A tokenizer.json to load instead of training; a masked objective needs `[CLS] [SEP] [MASK] [PAD]` or `<s> </s> <mask> <pad>`."""

    train_bytes: Count = Field(default=30_000_000, ge=1)
    """Bytes of text to train the tokenizer on: a fixed sample of all sources."""

    end_of_text: str = Field(default="<|endoftext|>", min_length=1)
    """The token at the end of each document; use [SEP] for a BERT tokenizer."""

    @model_validator(mode="after")
    def _check_lowercase(self) -> Self:
        if self.lowercase and self.algorithm != "wordpiece":
            raise ValueError(f"lowercase: expected false with algorithm {self.algorithm}, got true. Remove it, or use wordpiece.")
        return self


def _is_unquoted(source: object) -> bool:
    """Whether YAML made a section of a source such as `stdlib:`."""
    return isinstance(source, dict) and list(cast("dict[str, Any]", source).values()) == [None]
