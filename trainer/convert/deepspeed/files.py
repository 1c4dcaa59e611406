"""Files of a DeepSpeed checkpoint: which of them exist, and what they hold, read without running code in them.

    DIR/latest                                                   name of the newest folder
    DIR/global_step10/mp_rank_00_model_states.pt                 weights and counts; without ZeRO also the optimizer
        zero_pp_rank_1_mp_rank_00_model_states.pt                ZeRO-3: one for each rank
        [bf16_]zero_pp_rank_1_mp_rank_00_optim_states.pt         ZeRO: a rank's shard of masters and optimizer state

They are pickles. torch loads only tensors and plain values from them; DeepSpeed's few objects become bare records. Only regular files are
read, and what they hold is no larger than they are.
"""

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from manta.data.errors import InputError, cut, one_line
from manta.data.storage.regular_file import open_regular, read_regular

LATEST, MODEL, RANK_MODEL = "latest", "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"
SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
OTHER_PARALLELISM = re.compile(r"layer_\d+.*\.pt|.*expp_rank_.*\.pt|.*mp_rank_(?!00)\d+_.*\.pt")


class _Record:
    """The fields of a pickled object."""


OBJECTS: list[Any] = [
    (_Record, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Record, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Record, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
"""DeepSpeed's classes in its files, and the types that they are loaded as."""


def newest_folder(directory: Path) -> Path:
    """Return the folder that `latest` names, or the directory itself if it is one."""
    latest = directory / LATEST
    try:
        name = read_regular(latest, 1000).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        name = None
    except OSError as error:
        raise InputError(f"{latest}: expected the name of a folder, got {error.strerror}. Name the folder to convert.") from None
    if name is not None:
        if not re.fullmatch(r"[\w.-]{1,255}", name) or name in {".", ".."} or not (directory / name).is_dir():
            raise InputError(f"{latest}: expected the name of a folder beside it, got {cut(name)}. Name the folder to convert.")
        return directory / name
    if directory.is_dir() and any((directory / name).exists() for name in (MODEL, RANK_MODEL.format(0))):
        return directory
    raise InputError(f"{directory}: expected {LATEST} in it, got no such file. Name a directory that engine.save_checkpoint wrote.")


def model_file(folder: Path) -> Path:
    """Return the model file, rank 0's under ZeRO-3. Raises InputError if the model was split by anything but ZeRO."""
    for file in sorted(folder.iterdir()):
        if OTHER_PARALLELISM.fullmatch(file.name):
            raise InputError(f"{file}: expected a model split by ZeRO only, got tensor, pipeline or expert ranks. Gather it first.")
    return folder / MODEL if os.path.lexists(folder / MODEL) else folder / RANK_MODEL.format(0)


def read_file(file: Path) -> dict[str, Any]:
    """Verify the checksums in the file, then map it into memory: bytes of a tensor are read when it is used."""
    try:
        with open_regular(file) as stream:
            _check_archive(stream, file)
        with torch.serialization.safe_globals(OBJECTS):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        _check_content(content)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{file}: expected the files of every rank, got no such file. Copy it from the node that wrote it.") from None
    except OSError as error:
        raise InputError(f"{file}: expected a readable file, got {error.strerror or error}. Copy it again.") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        content = found[1] if found else "other content"
        expected = "only tensors, plain values and DeepSpeed's objects"
        raise InputError(f"{file}: expected {expected}, got {content}, and ran none of it. Save without it.") from None
    except Exception as error:  # noqa: BLE001  what a damaged pickle raises depends on where it is damaged
        problem = one_line(str(error).strip().partition("\n")[0].partition(". ")[0])
        raise InputError(f"{file}: expected a complete file, got one that cannot be read ({problem}). Copy it again.") from None
    return content


def _check_archive(stream: BinaryIO, file: Path) -> None:
    """Raises InputError if a record does not match its checksum, ValueError if the archive unpacks to more than it holds."""
    with zipfile.ZipFile(stream) as archive:
        if sum(record.file_size for record in archive.infolist()) > os.fstat(stream.fileno()).st_size:
            raise ValueError("its records are larger than the file")
        damaged = archive.testzip()
    if damaged is not None:
        raise InputError(f"{file}: expected {cut(damaged)} to match its checksum, got other bytes. Copy the file again.")


def _check_content(content: object) -> None:
    """Raises ValueError or TypeError unless it is a dict in which no tensor is larger than the bytes that it holds."""
    if not isinstance(content, dict):
        raise TypeError("not a dict")
    left, seen = list[Any]([content]), set[int]()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            is_plain = value.layout is torch.strided and value.device.type == "cpu"
            if not is_plain or value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise ValueError(f"a tensor of {list(value.shape)} with fewer bytes than elements")
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += value
        elif isinstance(value, _Record):
            left += vars(value).values()


def shard_files(folder: Path, ranks: int) -> list[Path]:
    """Return the optimizer file of each rank. Raises InputError if there are fewer or more."""
    files = {int(match[1]): file for file in folder.iterdir() if (match := SHARD.fullmatch(file.name))}
    for rank in range(ranks):
        if rank not in files:
            first = min(files, default=None)
            name = f"zero_pp_rank_{rank}_…" if first is None else files[first].name.replace(f"_rank_{first}_", f"_rank_{rank}_", 1)
            raise InputError(f"{folder / name}: expected the files of all {ranks} ranks, got no such file. Copy it from its node.")
    if surplus := sorted(files.keys() - set(range(ranks))):
        raise InputError(f"{files[surplus[0]]}: expected the files of {ranks} ranks, got one of another save. Move it away.")
    return [files[rank] for rank in range(ranks)]
