"""A checkpoint's manifest: what it holds, where in which file, and by which hashes to know it. Written last, it is the commit.

    {"xxh3": of all that follows this line,
     "format": 2, "step": …, "samples_consumed": …, …
     "files": [[name, bytes, [xxh3 of each block]], …]
     "tensors": {key: {"dtype": "F32", "shape": […], "chunks": [[file, first byte, [offsets], [sizes]], …]}}}

A chunk is a rectangle of a whole tensor, row by row.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.rectangles import Rectangle

FORMAT = 2
MANIFEST = "manifest.json"
BLOCK = 1 << 20  # bytes that share a hash
LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # fp16's: every field that changes, as DeepSpeed calls it


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run has come. Everything else about its position follows from its config."""

    step: int  # optimizer steps taken
    samples_consumed: int
    optimizer_steps: int  # steps counted by the optimizer's bias correction
    loss_scaler: dict[str, float] | None = None  # fp16: where the dynamic loss scale stands
    cursors: list[dict[str, int]] | None = None  # data.live: where each data rank stands in its text


@dataclass(frozen=True, slots=True)
class File:
    name: str
    bytes: int
    xxh3: tuple[str, ...]  # of each block of BLOCK bytes; the last may be shorter


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of a tensor, and where its bytes begin."""

    file: int  # which of the checkpoint's
    start: int
    place: Rectangle


@dataclass(frozen=True, slots=True)
class Stored:
    """A whole tensor, in chunks that cover it once."""

    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint, as its manifest tells."""

    at: str  # path or URL
    progress: Progress
    identity: dict[str, str]  # fingerprints of what the weights depend on
    files: tuple[File, ...]
    tensors: dict[str, Stored]
    about: dict[str, Any] = field(default_factory=dict)  # who wrote it, when, of which config: told, and never relied on

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: stored.shape for key, stored in self.tensors.items()}

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a checkpoint of this name is of; None where it is no checkpoint's."""
    found = re.fullmatch(r"step-(\d{8,})", name)
    return int(found[1]) if found else None


def to_bytes(checkpoint: Checkpoint) -> bytes:
    manifest: dict[str, Any] = {
        "format": FORMAT,
        **asdict(checkpoint.progress),
        "identity": checkpoint.identity,
        "about": checkpoint.about,
        "files": [[file.name, file.bytes, file.xxh3] for file in checkpoint.files],
        "tensors": {
            key: {
                "dtype": stored.dtype,
                "shape": stored.shape,
                "chunks": [[chunk.file, chunk.start, chunk.place.offsets, chunk.place.sizes] for chunk in stored.chunks],
            }
            for key, stored in checkpoint.tensors.items()
        },
    }
    body = json.dumps(manifest, separators=(",", ":"))[1:].encode()
    return b'{"xxh3":"%s",\n%s\n' % (xxhash.xxh3_128_hexdigest(body).encode(), body)


def from_bytes(content: bytes, at: str) -> Checkpoint:
    """Raises CheckpointError where it is of another format, or not as it was written."""
    try:
        manifest = json.loads(content)
        if (form := manifest["format"]) != FORMAT:
            remedy = "export it with the manta that wrote it" if isinstance(form, int) and form < FORMAT else "use a newer manta"
            raise CheckpointError(f"{at}: format: got {form}, wants {FORMAT}; {remedy}")
        head, body = content.split(b"\n", 1)
        if (found := xxhash.xxh3_128_hexdigest(body.rstrip(b"\n"))) != manifest["xxh3"] or head != b'{"xxh3":"%s",' % found.encode():
            raise CheckpointError(f"{at}/{MANIFEST}: xxh3: got {found}, wants {manifest['xxh3']}")
        return _checkpoint(manifest, at)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{at}/{MANIFEST}: {type(error).__name__}: {error}; it is not as it was written") from None


def _checkpoint(manifest: dict[str, Any], at: str) -> Checkpoint:
    return Checkpoint(
        at=at,
        progress=Progress(**{key: manifest[key] for key in Progress.__dataclass_fields__ if key in manifest}),
        identity=manifest["identity"],
        files=tuple(File(name, size, tuple(hashes)) for name, size, hashes in manifest["files"]),
        tensors={
            key: Stored(
                stored["dtype"],
                tuple(stored["shape"]),
                tuple(Chunk(file, start, Rectangle(tuple(offsets), tuple(sizes))) for file, start, offsets, sizes in stored["chunks"]),
            )
            for key, stored in manifest["tensors"].items()
        },
        about=manifest["about"],
    )


def difference(wanted: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> str:
    """In words, the first in order of name: of what is missing, surplus or of another shape."""

    def lines() -> Iterator[str]:
        for key in sorted(wanted.keys() | got.keys()):
            if wanted.get(key) != got.get(key):
                yield f"{key}: got {got.get(key, 'nothing')}, wants {wanted.get(key, 'nothing')}"

    found = list(lines())
    return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
