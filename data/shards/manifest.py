"""A corpus's manifest: its shards and how they were made. It is written last, so a directory without one is not a corpus."""

import json
from pathlib import Path
from typing import Literal, Self

import xxhash
from pydantic import BaseModel, Field, ValidationError

from manta.data.config import CacheConfig
from manta.data.errors import InputError
from manta.data.shards.corpus_directory import REMEDY, CorpusDirectory
from manta.data.shards.origins import SplitOrigins
from manta.data.shards.shard import Count, Shard
from manta.data.tokenizer import tokenizer

FORMAT = 2
MANIFEST = "manifest.json"


class SplitRecord(BaseModel, frozen=True, extra="forbid"):
    """The shards of one input split. Its file beside them means that they are complete."""

    train: Shard | None
    validation: Shard | None
    left_out: dict[str, int] = {}
    """Excluded documents, by reason."""
    refused: str | None = None
    """The first bad row, if bad rows are skipped."""
    origins: SplitOrigins | None = None
    """Where the documents came from; None in corpora from before it was recorded."""

    def shards(self) -> tuple[Shard, ...]:
        return tuple(shard for shard in (self.train, self.validation) if shard)

    def problem(self, directory: CorpusDirectory, *, contents: bool) -> str | None:
        """Return what is wrong with the split's files, if anything. contents: check their hashes, not their sizes alone."""
        problems = [directory.shard_problem(shard, contents=contents) for shard in self.shards()]
        if self.origins:
            sides = (self.origins.train, self.train), (self.origins.validation, self.validation)
            problems += [origins.problem(directory, shard, contents=contents) for origins, shard in sides if origins and shard]
        return next((problem for problem in problems if problem), None)


class CorpusSplit(BaseModel, frozen=True, extra="forbid"):
    tokens: Count
    documents: Count
    text_bytes: Count
    unigram_entropy: float | None
    """Of validation: the loss in nats per token of a model that knows only its token frequencies."""
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, shards: tuple[Shard, ...], unigram_entropy: float | None = None) -> Self:
        return cls(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            unigram_entropy=unigram_entropy,
            shards=shards,
        )


class Manifest(BaseModel, frozen=True, extra="forbid"):
    format: Literal[2]
    source: str
    """Its name in the config."""
    path: str
    held_out: str
    """The share that is held out for validation, or the path of the held-out files."""
    tokenizer: str
    """Fingerprint of the tokenizer that wrote the ids."""
    vocabulary: int = Field(ge=1, le=2**24)
    """One more than the tokenizer's largest id."""
    encoder: str
    """The library that encoded the text, and why it was chosen; or how token ids were imported."""
    text_bytes: Count
    left_out: dict[str, int]
    """Excluded documents, by reason."""
    train: CorpusSplit
    validation: CorpusSplit
    fingerprint: str
    """Hash of the hashes of all shards, in order."""
    xxh3: str = ""
    """Hash of all the other values; manifests from before it was recorded have none."""

    def sealed(self) -> Self:
        """Return this manifest with its hash."""
        return self.model_copy(update={"xxh3": xxhash.xxh3_64_hexdigest(self.model_dump_json(exclude={"xxh3"}).encode())})

    def problem(self, directory: CorpusDirectory, *, contents: bool = False) -> str | None:
        """Return what is wrong with the corpus's files, if anything. contents: check their hashes, not their sizes alone."""
        if self.fingerprint != content_fingerprint(self.train.shards, self.validation.shards):
            return f"{directory.location(MANIFEST)}: its fingerprint does not match its shards"
        problems = (directory.shard_problem(shard, contents=contents) for shard in (*self.train.shards, *self.validation.shards))
        return next((problem for problem in problems if problem), None)


class PreparedData(BaseModel, frozen=True):
    """What `manta prepare` made for a run. The run's own manifest records it."""

    tokenizer: Path
    """On this node's disk."""
    corpora: tuple[str, ...]
    """Directories or URLs."""
    fingerprint: str
    sets: dict[str, "PreparedData"] = {}
    """Validation sets, by name. The fingerprint does not depend on them."""


def load_manifest(directory: CorpusDirectory) -> Manifest:
    """Return a corpus's manifest. Raises InputError if it is missing, damaged or of another format."""
    path = directory.location(MANIFEST)
    try:
        manifest = Manifest.model_validate_json(directory.read(MANIFEST))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; the corpus is not prepared, or only in part. {REMEDY}") from None
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error)}. {REMEDY}") from None
    if manifest.xxh3 and manifest.xxh3 != manifest.sealed().xxh3:
        raise InputError(f"{path}: damaged; its content has changed since it was written. {REMEDY}")
    return manifest


def is_complete(prepared: PreparedData, cache: CacheConfig) -> bool:
    """Return whether the tokenizer and all manifests are still in place."""
    return prepared.tokenizer.exists() and all(CorpusDirectory(root, cache).exists(MANIFEST) for root in prepared.corpora)


def load_corpora(prepared: PreparedData, cache: CacheConfig) -> tuple[tuple[CorpusDirectory, Manifest], ...]:
    """Return a run's corpora. Raises InputError if a file is missing, or if corpora or tokenizer are not those that were prepared."""
    directories = [CorpusDirectory(root, cache) for root in prepared.corpora]
    manifests = tuple(load_manifest(directory) for directory in directories)
    for directory, manifest in zip(directories, manifests, strict=True):
        if problem := manifest.problem(directory):
            raise InputError(f"{problem}. {REMEDY}")
    if not prepared.tokenizer.is_file():
        raise InputError(f"{prepared.tokenizer}: missing. {REMEDY}")
    tokenizer_fingerprint = tokenizer.fingerprint(tokenizer.read_tokenizer(prepared.tokenizer))
    if any(manifest.tokenizer != tokenizer_fingerprint for manifest in manifests):
        raise InputError(f"{prepared.tokenizer}: not the tokenizer that the corpora were written with. {REMEDY}")
    if (fingerprint := joint_fingerprint(manifests)) != prepared.fingerprint:
        problem = f"fingerprint: expected {prepared.fingerprint}, with which the run started, got {fingerprint}"
        raise InputError(f"{', '.join(prepared.corpora)}: {problem}. Restore the corpus, or choose another run.dir.")
    return tuple(zip(directories, manifests, strict=True))


def _first_problem(error: ValidationError) -> str:
    """Return the first of the errors, which name values of a file: in one line, and not a long one."""
    errors = error.errors(include_url=False)
    for one in errors:
        if one["loc"] == ("format",) and isinstance(one["input"], int):
            return f"format: expected {FORMAT}, got {str(one['input'])[:50]}"
    key = ".".join(map(str, errors[0]["loc"]))[:100]
    return f"damaged; {key and f'{key}: '}{errors[0]['msg'][:300]}"


def content_fingerprint(train: tuple[Shard, ...], validation: tuple[Shard, ...]) -> str:
    return digest([[(shard.tokens, shard.bin_xxh3, shard.idx_xxh3) for shard in split] for split in (train, validation)])


def joint_fingerprint(manifests: tuple[Manifest, ...]) -> str:
    """Return what identifies the tokens of a run: its corpora in order, and the tokenizer that wrote them."""
    return digest([[manifest.fingerprint, manifest.tokenizer] for manifest in manifests])


def digest(value: object) -> str:
    """Return a hash of a JSON value."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value).encode())
