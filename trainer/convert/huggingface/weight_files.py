"""safetensors, one tensor at a time: whoever writes or reads a model holds no second one."""

import json
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manta.data.errors import InputError
from manta.trainer.convert.huggingface.directory import INDEX, SINGLE, weight_files

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # in the order in which a file holds them
NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor that is still to be written, or read."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


def write(directory: Path, tensors: dict[str, Shape], read: Callable[[str], Tensor], *, limit: int) -> None:
    """As many files as it takes for none to be larger than `limit` bytes, unless a single tensor is."""
    shards: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in tensors.items():
        if shards[-1] and size + shape.bytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += shape.bytes
    if len(shards) == 1:
        _write(directory / SINGLE, tensors, read)
        return
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write(directory / file, shard, read)
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(shape.bytes for shape in tensors.values())}, "weight_map": dict(sorted(places.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write(path: Path, tensors: dict[str, Shape], read: Callable[[str], Tensor]) -> None:
    """The bytes that safetensors would write, which wants all tensors at once."""
    widest = list(TYPES.values())
    names = sorted(tensors, key=lambda name: (widest.index(tensors[name].dtype), name.encode()))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].bytes
        header[name] = {"dtype": NAMES[tensors[name].dtype], "shape": tensors[name].sizes, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name)
            assert tuple(tensor.shape) == tensors[name].sizes, name
            file.write(tensor.to(tensors[name].dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


class Weights:
    """The tensors of a directory, by name."""

    def __init__(self, opened: Sequence[Any]) -> None:
        self.shapes: dict[str, Shape] = {}
        self.strange: dict[str, str] = {}  # the type of each that is none of ours, such as a mask of booleans
        self._files: dict[str, Any] = {}
        for file in opened:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                piece = file.get_slice(name)
                if (dtype := TYPES.get(piece.get_dtype())) is None:
                    self.strange[name] = piece.get_dtype()
                else:
                    self._files[name], self.shapes[name] = file, Shape(tuple(piece.get_shape()), dtype)

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


@contextmanager
def opened(directory: Path) -> Generator[Weights]:
    """Raises InputError where there are no safetensors, or not those that the index names, or damaged ones."""
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(directory)]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{directory}: {' '.join(str(error).split())}; wants whole safetensors: fetch them again") from None
        yield Weights(files)
