"""A checkpoint's manifest: its tensors, where their bytes are stored, and the hashes of its files. Written last, it is the commit.

    {"xxh3": of everything after this line,
     "format": 2, "step": …, "samples_consumed": …, …
     "files": [[name, bytes, [xxh3 of each block]], …]
     "tensors": {key: {"dtype": "F32", "shape": […], "chunks": [[file, first byte, [offsets], [sizes]], …]}}}

A chunk is a rectangle of a whole tensor, in row-major order. The chunks of a tensor cover each element once, and no two chunks share bytes.
A manifest that says otherwise is damaged, even if its hash is right.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import xxhash
from pydantic import FailFast, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from manta.data.errors import one_line
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.rectangles import Rectangle, cover_once

FORMAT = 2
MANIFEST = "manifest.json"
MAX_BYTES = 1 << 28  # of a manifest: that of 5 TB in a million chunks is half as large
BLOCK = 1 << 20  # bytes that share a hash
Dtype = Literal["F32", "F16", "BF16", "F64", "I64"]  # safetensors' names
DTYPE_BYTES: dict[Dtype, int] = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8}
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of fp16, in DeepSpeed's names: all that change

Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=500, pattern=r"^\P{C}*$")]  # without control characters
ScalerField = Annotated[str, Field(pattern=f"^({'|'.join(LOSS_SCALER_FIELDS)})$")]
CursorField = Annotated[str, Field(pattern="^(epoch|piece|document|token)$")]
FilePath = Annotated[str, Field(pattern=r"^([A-Za-z0-9-]{1,64}/)?rank-[0-9]{4,9}\.safetensors$")]  # in an object store below a token
Hash = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Offsets = Annotated[tuple[Count, ...], Field(max_length=8)]
Sizes = Annotated[tuple[Annotated[int, Field(strict=True, ge=1, lt=2**63)], ...], Field(max_length=8)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run has come. The rest of its position follows from its config."""

    step: Count  # optimizer steps taken
    samples_consumed: Count
    optimizer_steps: Count  # as counted by the optimizer's bias correction
    loss_scaler: dict[ScalerField, Annotated[int, Field(strict=True)] | Finite] | None = (
        None  # of fp16: the state of the dynamic loss scale
    )
    cursors: list[dict[CursorField, Count]] | None = None  # of data.live: each data rank's position in its text
    window: list[tuple[Finite, Finite]] | None = None  # of the guard: losses and gradient norms of the last steps


class CheckpointFile(NamedTuple):
    name: FilePath
    bytes: Count
    xxh3: Annotated[tuple[Hash, ...], FailFast()]  # of each block of BLOCK bytes; the last may be shorter


class Chunk(NamedTuple):
    """A rectangle of a tensor, and the position of its bytes."""

    file: Count  # index of the checkpoint's file
    start: Count  # byte
    offsets: Offsets
    sizes: Sizes

    @property
    def rectangle(self) -> Rectangle:
        return Rectangle(self.offsets, self.sizes)


class StoredTensor(NamedTuple):
    """A whole tensor, as chunks that cover each element once."""

    dtype: Dtype
    shape: Offsets
    chunks: Annotated[tuple[Chunk, ...], FailFast()]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a manifest says to users, and nothing depends on: who wrote it, when, with which config."""

    attempt: Count | None = None
    written: Text | None = None  # UTC
    layout: Text | None = None
    ranks: Count | None = None
    validation_loss: Annotated[float, Field(strict=True)] | None = None
    config: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint, as its manifest describes it."""

    location: str  # path or URL
    progress: Progress
    identity: dict[Text, Text]  # fingerprints of what the weights depend on
    files: Annotated[tuple[CheckpointFile, ...], FailFast()]
    tensors: dict[Text, StoredTensor]
    about: About = field(default_factory=About)
    partial: frozenset[str] = frozenset()  # keys of tensors that loading fills only in part; of no manifest

    @property
    def name(self) -> str:
        return self.location.rpartition("/")[2]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: stored.shape for key, stored in self.tensors.items()}

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@cache  # built only by a command that reads a manifest
def _adapter() -> TypeAdapter[Checkpoint]:
    return TypeAdapter(Checkpoint)


def name_of_step(step: int) -> str:
    return f"step-{step:08d}"


def step_of_name(name: str) -> int | None:
    """Return the step of a checkpoint's name, or None for any other name."""
    match = re.fullmatch(r"step-([0-9]{8,18})", name)
    return int(match[1]) if match and name == name_of_step(int(match[1])) else None


def to_bytes(checkpoint: Checkpoint) -> bytes:
    manifest: dict[str, Any] = {
        "format": FORMAT,
        **asdict(checkpoint.progress),
        "identity": checkpoint.identity,
        "about": asdict(checkpoint.about),
        "files": checkpoint.files,  # named tuples are written as lists
        "tensors": {key: stored._asdict() for key, stored in checkpoint.tensors.items()},
    }
    body = json.dumps(manifest, separators=(",", ":"))[1:].encode()
    return b'{"xxh3":"%s",\n%s\n' % (xxhash.xxh3_128_hexdigest(body).encode(), body)


def from_bytes(content: bytes, location: str) -> Checkpoint:
    """Return the checkpoint that a manifest describes. Raises CheckpointError if it is damaged, or of another format."""
    try:
        head, _, body = content.partition(b"\n")
        _check_hash(head, body)
        manifest = from_json(b"{" + body)
        _check_format(manifest, location)
        checkpoint = _adapter().validate_python({**manifest, "location": location, "progress": manifest, "partial": ()})
        _check_files(checkpoint.files)
        _check_chunks(checkpoint)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        problem = f"{'.'.join(map(str, first['loc']))[:200]}: {first['msg']}"
    except ValueError as error:
        problem = one_line(error)
    else:
        return checkpoint
    raise CheckpointError(f"{location}/{MANIFEST}: damaged ({problem})")


def _check_hash(head: bytes, body: bytes) -> None:
    xxh3 = xxhash.xxh3_128_hexdigest(body.rstrip(b"\n"))
    if head != b'{"xxh3":"%s",' % xxh3.encode():
        raise ValueError(f"xxh3: expected {head[9:41].decode(errors='replace')!r}, got {xxh3!r}")


def _check_format(manifest: Mapping[str, Any], location: str) -> None:
    if (form := manifest.get("format")) != FORMAT:
        remedy = "Export it with the manta that wrote it." if isinstance(form, int) and form < FORMAT else "Use a newer manta."
        raise CheckpointError(f"{location}: format: expected {FORMAT}, got {str(form)[:20]}. {remedy}")


def _check_files(files: Sequence[CheckpointFile]) -> None:
    """Raises ValueError if two files have the same name, or if one has another number of hashes than blocks."""
    if len({file.name for file in files}) < len(files):
        raise ValueError("files: expected each name once, got one twice")
    for file in files:
        if len(file.xxh3) != -(-file.bytes // BLOCK):
            raise ValueError(f"{file.name}: expected a hash of each MiB of {file.bytes} bytes, got {len(file.xxh3)} hashes")


def _check_chunks(checkpoint: Checkpoint) -> None:
    """Raises ValueError unless the chunks cover each element of each tensor once, and are inside their files, without overlap.

    Sorts the chunks, and otherwise takes time in proportion to their number.
    """
    spans: list[list[tuple[int, int]]] = [[] for _ in checkpoint.files]
    for key, stored in checkpoint.tensors.items():
        for chunk in stored.chunks:
            if chunk.file >= len(spans) or not len(chunk.offsets) == len(chunk.sizes) == len(stored.shape):
                raise ValueError(f"{key}: expected chunks of its shape in the {len(spans)} files, got {one_line(chunk)}")
            stop = chunk.start + math.prod(chunk.sizes) * DTYPE_BYTES[stored.dtype]
            spans[chunk.file].append((chunk.start, stop))
        if not cover_once([chunk.rectangle for chunk in stored.chunks], stored.shape):
            raise ValueError(f"{key}: expected chunks that cover each element of {list(stored.shape)} once, got others")
    for file, own in zip(checkpoint.files, spans, strict=True):
        end = 8  # bytes: the length of the header
        for start, stop in sorted(own):
            if start < end:
                raise ValueError(f"{file.name}: expected chunks that share no bytes, got two at byte {start}")
            end = stop
        if end > file.bytes:
            raise ValueError(f"{file.name}: expected chunks within its {file.bytes} bytes, got one that ends at byte {end}")


def entry_name(key: str, offsets: tuple[int, ...]) -> str:
    """Return a chunk's name in the header of its file."""
    return f"{key}@{','.join(map(str, offsets))}"


def first_difference(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> str:
    """Describe the first tensor, by name, that is missing, surplus or of another shape, and how many more are."""
    keys = [key for key in sorted(expected.keys() | got.keys()) if expected.get(key) != got.get(key)]
    key, more = keys[0], f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    return f"{key}: expected {expected.get(key, 'nothing')}, got {got.get(key, 'nothing')}{more}"
