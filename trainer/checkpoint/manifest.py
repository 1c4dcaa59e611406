"""A checkpoint's manifest: its tensors, where their bytes are stored, and the hashes of its files. Written last, it is the commit.

    {"xxh3": of everything after this line,
     "format": 2, "step": …, "samples_consumed": …, …
     "files": [[name, bytes, [xxh3 of each block]], …]
     "tensors": {key: {"dtype": "F32", "shape": […], "chunks": [[file, first byte, [offsets], [sizes]], …]}}}

A chunk is a rectangle of a whole tensor, in row-major order.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import xxhash
from pydantic import TypeAdapter

from manta.data.errors import one_line
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.rectangles import Rectangle

FORMAT = 2
MANIFEST = "manifest.json"
BLOCK = 1 << 20  # bytes that share a hash
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of fp16, in DeepSpeed's names: all that change


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run has come. The rest of its position follows from its config."""

    step: int  # optimizer steps taken
    samples_consumed: int
    optimizer_steps: int  # as counted by the optimizer's bias correction
    loss_scaler: dict[str, int | float] | None = None  # of fp16: the state of the dynamic loss scale
    cursors: list[dict[str, int]] | None = None  # of data.live: each data rank's position in its text


class CheckpointFile(NamedTuple):
    name: str
    bytes: int
    xxh3: tuple[str, ...]  # of each block of BLOCK bytes; the last may be shorter


class Chunk(NamedTuple):
    """A rectangle of a tensor, and the position of its bytes."""

    file: int  # index of the checkpoint's file
    start: int  # byte
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def rectangle(self) -> Rectangle:
        return Rectangle(self.offsets, self.sizes)


class StoredTensor(NamedTuple):
    """A whole tensor, as chunks that cover each element once."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint, as its manifest describes it."""

    location: str  # path or URL
    progress: Progress
    identity: dict[str, str]  # fingerprints of what the weights depend on
    files: tuple[CheckpointFile, ...]
    tensors: dict[str, StoredTensor]
    about: dict[str, Any] = field(default_factory=dict)  # for users: who wrote it, when, with which config

    @property
    def name(self) -> str:
        return self.location.rpartition("/")[2]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: stored.shape for key, stored in self.tensors.items()}

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


_ADAPTER = TypeAdapter(Checkpoint)


def name_of_step(step: int) -> str:
    return f"step-{step:08d}"


def step_of_name(name: str) -> int | None:
    """Return the step of a checkpoint's name, or None for any other name."""
    match = re.fullmatch(r"step-(\d{8,})", name)
    return int(match[1]) if match else None


def to_bytes(checkpoint: Checkpoint) -> bytes:
    manifest: dict[str, Any] = {
        "format": FORMAT,
        **asdict(checkpoint.progress),
        "identity": checkpoint.identity,
        "about": checkpoint.about,
        "files": checkpoint.files,  # named tuples are written as lists
        "tensors": {key: stored._asdict() for key, stored in checkpoint.tensors.items()},
    }
    body = json.dumps(manifest, separators=(",", ":"))[1:].encode()
    return b'{"xxh3":"%s",\n%s\n' % (xxhash.xxh3_128_hexdigest(body).encode(), body)


def from_bytes(content: bytes, location: str) -> Checkpoint:
    """Return the checkpoint that a manifest describes. Raises CheckpointError if it is damaged, or of another format."""
    try:
        manifest = json.loads(content)
        if (form := manifest["format"]) != FORMAT:
            remedy = "Export it with the manta that wrote it." if isinstance(form, int) and form < FORMAT else "Use a newer manta."
            raise CheckpointError(f"{location}: format: expected {FORMAT}, got {form}. {remedy}")
        head, body = content.split(b"\n", 1)
        xxh3 = xxhash.xxh3_128_hexdigest(body.rstrip(b"\n"))
        if xxh3 != manifest["xxh3"] or head != b'{"xxh3":"%s",' % xxh3.encode():
            raise CheckpointError(f"{location}/{MANIFEST}: xxh3: expected {manifest['xxh3']}, got {xxh3}")
        return _ADAPTER.validate_python({**manifest, "location": location, "progress": manifest})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{location}/{MANIFEST}: damaged ({type(error).__name__}: {one_line(error)})") from None


def first_difference(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> str:
    """Describe the first tensor, by name, that is missing, surplus or of another shape, and how many more are."""
    keys = [key for key in sorted(expected.keys() | got.keys()) if expected.get(key) != got.get(key)]
    key, more = keys[0], f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    return f"{key}: expected {expected.get(key, 'nothing')}, got {got.get(key, 'nothing')}{more}"
