"""What a prepared corpus says of itself. A directory without a manifest is no corpus: it is written last, at once."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import xxhash
from pydantic import BaseModel, ValidationError

from manta.data.config import CacheConfig
from manta.data.errors import InputError
from manta.data.shards.corpus_directory import Home
from manta.data.shards.shard import Shard
from manta.data.tokenizer import tokenizer

FORMAT = 2
NAME = "manifest.json"
_REMEDY = "run `manta prepare` again"


class SplitRecord(BaseModel, frozen=True, extra="forbid"):
    """The shards of one piece; its file beside them says that they are complete."""

    train: Shard | None
    validation: Shard | None
    left_out: dict[str, int] = {}
    """Documents, by the reason."""
    refused: str | None = None
    """The first of the malformed rows, where those are skipped."""

    def shards(self) -> tuple[Shard, ...]:
        return tuple(shard for shard in (self.train, self.validation) if shard)


class Split(BaseModel, frozen=True, extra="forbid"):
    tokens: int
    documents: int
    text_bytes: int
    unigram_entropy: float | None
    """Nats a token, of the split's own token frequencies: what a model that knows only these would reach. Of validation alone."""
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, parts: tuple[Shard, ...], unigram_entropy: float | None = None) -> Self:
        return cls(
            tokens=sum(shard.tokens for shard in parts),
            documents=sum(shard.documents for shard in parts),
            text_bytes=sum(shard.text_bytes for shard in parts),
            unigram_entropy=unigram_entropy,
            shards=parts,
        )


class Manifest(BaseModel, frozen=True, extra="forbid"):
    format: int
    source: str
    """What the config calls it."""
    path: str
    held_out: str
    """Which share is held out, or the path of what is."""
    tokenizer: str
    """Fingerprint of the tokenizer that wrote the ids."""
    vocabulary: int
    """One more than the tokenizer's largest id."""
    encoder: str
    """Which library encoded, and why that one; or how token ids were taken over."""
    text_bytes: int
    left_out: dict[str, int]
    """Documents that are not in it, by the reason."""
    train: Split
    validation: Split
    fingerprint: str
    """Identity of the content: the hash of all shards' hashes, in order."""

    def problem(self, home: Home, *, contents: bool = False) -> str | None:
        """What is wrong with the corpus's files, if anything; sizes only, or where asked, every byte."""
        if self.fingerprint != content_identity(self.train.shards, self.validation.shards):
            return f"{home.at(NAME)}: its fingerprint is not that of its shards"
        found = (home.problem(shard, contents=contents) for shard in (*self.train.shards, *self.validation.shards))
        return next((problem for problem in found if problem), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What `prepare` hands on: where tokens lie, and which they are. The run's own manifest keeps it."""

    tokenizer: Path
    """On this node's disk."""
    corpora: tuple[str, ...]
    """Directories or URLs."""
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        return {"tokenizer": str(self.tokenizer), "corpora": list(self.corpora), "fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        return cls(tokenizer=Path(content["tokenizer"]), corpora=tuple(content["corpora"]), fingerprint=content["fingerprint"])


def load(home: Home) -> Manifest:
    """Raises InputError where there is no manifest, or one this version can not read."""
    path = home.at(NAME)
    try:
        content = json.loads(home.read(NAME))
        if isinstance(content, dict) and content.get("format") != FORMAT:
            raise InputError(f"{path}: format {content.get('format')}; this version reads {FORMAT}: {_REMEDY}")
        return Manifest.model_validate(content)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; the corpus is not prepared, or only in part: {_REMEDY}") from None
    except ValidationError as error:
        raise InputError(f"{path}: {error.error_count()} fields are wrong; the file is damaged: {_REMEDY}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: malformed JSON ({error}); the file is damaged: {_REMEDY}") from None


def is_there(prepared: Prepared, cache: CacheConfig) -> bool:
    """Whether all of it lies where it lay when it was prepared."""
    try:
        for root in prepared.corpora:
            Home(root, cache).read(NAME)
    except FileNotFoundError:
        return False
    return prepared.tokenizer.exists()


def load_checked(prepared: Prepared, cache: CacheConfig) -> tuple[tuple[Home, Manifest], ...]:
    """Where a run's corpora lie and their manifests, once their files are there and the ones that were prepared; else InputError."""
    homes = [Home(root, cache) for root in prepared.corpora]
    manifests = tuple(load(home) for home in homes)
    for home, manifest in zip(homes, manifests, strict=True):
        if problem := manifest.problem(home):
            raise InputError(f"{problem}; {_REMEDY}")
    if not prepared.tokenizer.is_file():
        raise InputError(f"{prepared.tokenizer}: missing; {_REMEDY}")
    written_by = tokenizer.fingerprint(tokenizer.read_tokenizer(prepared.tokenizer))
    if any(manifest.tokenizer != written_by for manifest in manifests):
        raise InputError(f"{prepared.tokenizer}: not the tokenizer that the corpora were written with; {_REMEDY}")
    if (got := joint_fingerprint(manifests)) != prepared.fingerprint:
        where = ", ".join(map(str, prepared.corpora))
        raise InputError(
            f"{where}: fingerprint {got}; the run wants {prepared.fingerprint}: the corpus is another one than the run began with"
        )
    return tuple(zip(homes, manifests, strict=True))


def content_identity(train: tuple[Shard, ...], validation: tuple[Shard, ...]) -> str:
    hashes = [[(shard.tokens, shard.bin_xxh3, shard.idx_xxh3) for shard in split] for split in (train, validation)]
    return digest(hashes)


def joint_fingerprint(manifests: tuple[Manifest, ...]) -> str:
    """Which tokens a run reads: its corpora in order, and the tokenizer that wrote them."""
    return digest([[manifest.fingerprint, manifest.tokenizer] for manifest in manifests])


def digest(value: object) -> str:
    """A hash of anything JSON can spell."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value).encode())
