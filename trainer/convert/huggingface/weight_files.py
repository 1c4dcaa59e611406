"""Read safetensors one tensor at a time, and write them one file at a time."""

import json
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from manta.data.errors import InputError
from manta.trainer.convert.huggingface.directory import INDEX, SINGLE, weight_files

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(directory: Path, specs: dict[str, TensorSpec], read: Callable[[str], Tensor], *, limit: int) -> None:
    """Write tensors into files of at most `limit` bytes each, unless a single tensor is larger. Holds one file's at a time."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.bytes
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: read(name).to(specs[name].dtype).contiguous() for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(spec.bytes for spec in specs.values())}, "weight_map": dict(sorted(files.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


class WeightFiles:
    """The tensors of a directory, by name."""

    def __init__(self, files: Iterable[Any]) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self.other_dtypes: dict[str, str] = {}  # of tensors that cannot be imported, such as boolean masks
        self._files: dict[str, Any] = {}
        for file in files:
            for name in file.keys():  # noqa: SIM118  not a mapping
                piece = file.get_slice(name)
                if (dtype := DTYPES.get(piece.get_dtype())) is None:
                    self.other_dtypes[name] = piece.get_dtype()
                else:
                    self._files[name], self.specs[name] = file, TensorSpec(tuple(piece.get_shape()), dtype)

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


@contextmanager
def open_weights(directory: Path) -> Generator[WeightFiles]:
    """Raises InputError if safetensors are missing or damaged."""
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(directory)]
        except (SafetensorError, OSError) as error:
            problem = " ".join(str(error).split())
            raise InputError(f"{directory}: expected complete safetensors, got {problem}. Fetch them again.") from None
        yield WeightFiles(files)
