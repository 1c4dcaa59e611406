"""The files of plain DeepSpeed: which there are, and what they hold, without a line of theirs being run.

    DIR/latest                                                   the newest folder's name
    DIR/global_step10/mp_rank_00_model_states.pt                 weights, counts; without ZeRO the optimizer, too
        zero_pp_rank_1_mp_rank_00_model_states.pt                ZeRO-3: of each rank
        [bf16_]zero_pp_rank_1_mp_rank_00_optim_states.pt         ZeRO: a rank's share of masters and state

They are pickles. torch reads tensors and plain values alone out of them, and the few objects of DeepSpeed's become bare records of ours:
nothing of DeepSpeed is imported.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from manta.data.errors import InputError

LATEST, WHOLE, OF_RANK = "latest", "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"
SHARE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
CUT_OTHERWISE = re.compile(r"layer_\d+.*\.pt|.*expp_rank_.*\.pt|.*mp_rank_(?!00)\d+_.*\.pt")


class _Record:
    """What is left of an object: its fields."""


OBJECTS: list[Any] = [
    (_Record, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Record, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Record, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
"""All of DeepSpeed's that its files hold, and what we read each as."""


def folder(directory: Path) -> Path:
    """Of the newest checkpoint; or the directory itself."""
    latest = directory / LATEST
    if latest.is_file():
        at = directory / latest.read_text(errors="replace").strip()
        if not at.is_dir():
            raise InputError(f"{latest}: got {at.name}, and there is no such folder beside it; name the folder to convert")
        return at
    if directory.is_dir() and any((directory / name).exists() for name in (WHOLE, OF_RANK.format(0))):
        return directory
    wants = f"what engine.save_checkpoint wrote: a directory with {LATEST} in it, or one of its folders, with {WHOLE}"
    raise InputError(f"{directory}: got no {LATEST}, wants {wants}")


def model_file(at: Path) -> Path:
    """The first rank's, or that of all. Raises InputError where a model is cut over more than ZeRO."""
    for file in sorted(at.iterdir()):
        if CUT_OTHERWISE.fullmatch(file.name):
            wants = "one cut by ZeRO alone"
            raise InputError(f"{file}: got a model cut over tensor, pipeline or expert ranks, wants {wants}; gather it first")
    return at / WHOLE if (at / WHOLE).exists() else at / OF_RANK.format(0)


def read(file: Path) -> dict[str, Any]:
    """Checked whole against the sums in it; then lazily, a tensor's bytes when it is used."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{file}: got bytes of {damaged} that are not as they were written; copy it again")
        with torch.serialization.safe_globals(OBJECTS):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{file}: got no such file, wants those of every rank; copy it from the node that wrote it") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            wants = "tensors, plain values and DeepSpeed's own objects alone"
            raise InputError(
                f"{file}: got {found[1]}, wants {wants}; nothing of it was run. Save without it, or leave the file alone"
            ) from None
        raise InputError(f"{file}: got a pickle that does more than hold tensors; nothing of it was run") from None
    except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
        told = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise InputError(f"{file}: got a file that can not be read ({told}), wants it whole; copy it again") from None


def share_files(at: Path, ranks: int) -> list[Path]:
    """One a rank. Raises InputError where there are fewer or more."""
    found = {int(named[1]): file for file in at.iterdir() if (named := SHARE.fullmatch(file.name))}
    for rank in range(ranks):
        if rank not in found:
            name = found[min(found)].name.replace(f"_rank_{min(found)}_", f"_rank_{rank}_", 1) if found else f"zero_pp_rank_{rank}_…"
            raise InputError(f"{at / name}: got no such file, wants those of all {ranks} ranks; copy it from the node that wrote it")
    if surplus := sorted(found.keys() - set(range(ranks))):
        raise InputError(f"{found[surplus[0]]}: got a rank's file of another save, wants those of {ranks} ranks alone; move it away")
    return [found[rank] for rank in range(ranks)]
