"""An engine's state as logical tensors: `master/<weight>` and `<state>/<weight>`, whole, whatever the layout.

The masters' keys also hold `master/<router>.bias`, which a mixture is balanced by without a gradient: it has no state.

Private parts of DeepSpeed relied on. ZeRO 1, 2: `param._hp_mapping` and its addresses, `single_partition_of_fp32_groups`,
`update_lp_params`. ZeRO 3: `param.ds_shape`, `ds_numel`, `ds_process_group`, `grad_position` by `get_param_id`,
`fp32_partitioned_groups_flat`, `checkpoint_event_prologue` and `_epilogue`, `_reassign_or_swap_out_partitioned_parameters`.
fp16: the fields of `loss_scaler`. Offloading leaves them where they are. A contract test names them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.backend import CheckpointBackend
from manta.trainer.checkpoint.manifest import LOSS_SCALER, Checkpoint, Progress
from manta.trainer.checkpoint.shards import Pieces
from manta.trainer.dist import sharding
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.optim.optimizers import STATES


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """This rank's share of one parameter: `count` weights from `start` of the part that lies here, at `offset` of a master."""

    name: str
    held: tuple[int, ...]  # the part's shape
    start: int
    master: Tensor  # what the optimizer steps on: many parameters, flat; without ZeRO the parameter itself
    offset: int
    count: int


def logical_state(engine: Engine) -> dict[str, Pieces]:
    """Masters and optimizer state, as views: saving reads them, loading writes them."""
    optimizer = _with_state(engine)
    state: dict[str, Pieces] = {}
    for fragment in _fragments(engine):
        whole, offsets = sharding.whole(fragment.name, fragment.held, engine.mesh.part)
        tensors = {"master": fragment.master.data} | {key: optimizer.state[fragment.master][key] for key in STATES[type(optimizer)]}
        for key, tensor in tensors.items():
            flat = tensor.view(-1).narrow(0, fragment.offset, fragment.count)
            state[f"{key}/{fragment.name}"] = Pieces.of(whole, flat, held=fragment.held, offsets=offsets, start=fragment.start)
    for name, bias_E in _biases(engine):
        state[f"master/{name}"] = Pieces.all_of(bias_E)
    return state


def logical_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Every key that a checkpoint of this model has, over all ranks."""
    wholes = {name: sharding.whole(name, _shape(parameter), engine.mesh.part)[0] for name, parameter in engine.module.named_parameters()}
    keys = ("master", *STATES[type(_optimizer(engine))])
    shapes = {f"{key}/{name}": whole for name, whole in wholes.items() for key in keys}
    return shapes | {f"master/{name}": tuple(bias_E.shape) for name, bias_E in _biases(engine)}


def progress(engine: Engine, *, step: int, samples_consumed: int, cursors: list[dict[str, int]] | None = None) -> Progress:
    """How far this engine has come: what is a number, and no tensor. cursors: of each data rank, where samples are read live."""
    counts = {int(held["step"]) for held in _optimizer(engine).state.values() if "step" in held}
    assert len(counts) <= 1, f"groups have counted {counts} steps"
    scaler = {name: getattr(engine.zero.loss_scaler, name) for name in LOSS_SCALER} if engine.precision == "fp16" else None
    return Progress(
        step=step, samples_consumed=samples_consumed, optimizer_steps=next(iter(counts), 0), loss_scaler=scaler, cursors=cursors
    )


def restore(where: CheckpointBackend, checkpoint: Checkpoint, engine: Engine, *, verify: catalog.Verify = "full") -> None:
    """Masters and optimizer state, into an engine; `settle` has it go on from there, once all ranks have theirs.

    Raises CheckpointError where the checkpoint is damaged, or of another model or optimizer: then part of the engine may be filled.
    """
    catalog.load(where, checkpoint, logical_state(engine), logical_shapes(engine), verify=verify)


def settle(progress: Progress, engine: Engine) -> None:
    """What `restore` leaves: the numbers that training goes on from, and weights as masters have them."""
    for held in _optimizer(engine).state.values():
        if "step" in held:  # each master its own: a shared one would run ahead
            held["step"] = torch.full_like(held["step"], float(progress.optimizer_steps))
    if engine.precision == "fp16":
        for name, value in (progress.loss_scaler or {}).items():
            setattr(engine.zero.loss_scaler, name, value)
    refresh(engine)


def load_masters(where: CheckpointBackend, checkpoint: Checkpoint, engine: Engine) -> None:
    """The weights alone, into an engine that has not stepped; `refresh` has it train on from them.

    Raises CheckpointError where they are another model's, or damaged.
    """
    weights = replace(checkpoint, tensors=_masters_alone(checkpoint.tensors))
    catalog.load(where, weights, _masters_alone(logical_state(engine)), _masters_alone(logical_shapes(engine)), verify="full")


def _masters_alone(named: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in named.items() if key.startswith("master/")}


def _fragments(engine: Engine) -> Iterator[Fragment]:
    """Of each parameter that this rank holds anything of."""
    for name, parameter in engine.module.named_parameters():
        held, zero, known = _shape(parameter), engine.zero, _known(parameter)
        match engine.layout.zero:
            case 0:
                yield Fragment(name=name, held=held, start=0, master=parameter, offset=0, count=parameter.numel())
            case 1 | 2:
                if known._hp_mapping is not None:  # noqa: SLF001  else all of it lies on other ranks
                    part, place = known._hp_mapping.lp_fragment_address, known._hp_mapping.hp_fragment_address  # noqa: SLF001
                    master = _masters(engine)[known._hp_mapping.param_group_index]  # noqa: SLF001
                    yield Fragment(name=name, held=held, start=part.start, master=master, offset=place.start, count=place.numel)
            case _:
                group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                start = dist.get_rank(known.ds_process_group) * size
                count = min(size, known.ds_numel - start)  # the last ranks' share is filled up
                if count > 0:
                    yield Fragment(name=name, held=held, start=start, master=_masters(engine)[group], offset=offset, count=count)


def _masters(engine: Engine) -> list[Tensor]:
    """All that the optimizer steps on here."""
    match engine.layout.zero:
        case 0:
            return list(engine.module.parameters())
        case 1 | 2:
            return engine.zero.single_partition_of_fp32_groups
        case _:
            return engine.zero.fp32_partitioned_groups_flat


def _optimizer(engine: Engine) -> torch.optim.Optimizer:
    return engine.zero if engine.layout.zero == 0 else engine.zero.optimizer


def _with_state(engine: Engine) -> torch.optim.Optimizer:
    """Before the first step an optimizer has no state: it is made, as the first step would, of zeros."""
    optimizer = _optimizer(engine)
    for master in _masters(engine):
        held = optimizer.state[master]
        for name in STATES[type(optimizer)]:
            if held.get(name) is None:
                held[name] = torch.zeros_like(master)
        if isinstance(optimizer, torch.optim.AdamW) and "step" not in held:
            held["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
    return optimizer


def _biases(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    return ((f"{name}.bias", router.bias) for name, router in engine.module.routers() if router.bias is not None)


def refresh(engine: Engine) -> None:
    """Once masters are filled: the weights that training computes with, from them. All ranks call this together."""
    zero = engine.zero
    match engine.layout.zero:
        case 0:
            pass  # they are the same
        case 1 | 2:
            zero.update_lp_params()
        case _:
            zero.checkpoint_event_prologue()  # lets go of whole weights
            for group in range(len(_masters(engine))):
                zero._reassign_or_swap_out_partitioned_parameters(group)  # noqa: SLF001
            zero.checkpoint_event_epilogue()  # gathers those that are always whole


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """Of the part that lies on this rank; ZeRO-3 leaves parameters themselves empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _known(parameter: Tensor) -> Any:
    """With what DeepSpeed hangs on it, unknown to torch."""
    return parameter
