"""An engine's state as logical tensors: `master/<weight>` and `<optimizer state>/<weight>`, whole, independent of the layout.

The masters include `master/<router>.bias`, which balances a mixture of experts without a gradient, and so has no optimizer state.

Private parts of DeepSpeed that are used, and named by a contract test. ZeRO 1, 2: `param._hp_mapping` and its addresses,
`single_partition_of_fp32_groups`, `update_lp_params`. ZeRO 3: `param.ds_shape`, `ds_numel`, `ds_process_group`, `grad_position` by
`get_param_id`, `fp32_partitioned_groups_flat`, `checkpoint_event_prologue` and `_epilogue`,
`_reassign_or_swap_out_partitioned_parameters`. fp16: the fields of `loss_scaler`. Offloading leaves them in place.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.backend import CheckpointBackend
from manta.trainer.checkpoint.manifest import LOSS_SCALER_FIELDS, Checkpoint, Progress
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.optim.optimizers import STATE_KEYS
from manta.trainer.parallel import sharding


class Fragment(NamedTuple):
    """This rank's fragment of a parameter: `size` weights from `start` of the rank's part, stored at `offset` of a master."""

    start: int
    master: Tensor  # what the optimizer updates: many parameters, flat; without ZeRO the parameter itself
    offset: int
    size: int


def logical_state(engine: Engine) -> dict[str, TensorViews]:
    """Return views of the masters and the optimizer state that this rank holds."""
    optimizer = _optimizer_with_state(engine)
    state: dict[str, TensorViews] = {}
    for name, parameter in engine.module.named_parameters():
        if (fragment := _fragment(parameter, engine)) is None:
            continue
        local_shape, (start, master, offset, count) = _local_shape(parameter), fragment
        shape, offsets = sharding.global_shape(name, local_shape, engine.mesh.shard)
        tensors = {"master": master.data} | {key: optimizer.state[master][key] for key in STATE_KEYS[type(optimizer)]}
        for key, tensor in tensors.items():
            flat = tensor.view(-1).narrow(0, offset, count)
            state[f"{key}/{name}"] = TensorViews.from_flat(shape, flat, local_shape=local_shape, offsets=offsets, start=start)
    for name, bias_E in _router_biases(engine):
        state[f"master/{name}"] = TensorViews.from_whole(bias_E)
    return state


def logical_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of every tensor in a checkpoint of this model, over all ranks."""
    parameters = engine.module.named_parameters()
    whole_shapes = {name: sharding.global_shape(name, _local_shape(parameter), engine.mesh.shard)[0] for name, parameter in parameters}
    keys = ("master", *STATE_KEYS[type(torch_optimizer(engine))])
    shapes = {f"{key}/{name}": shape for name, shape in whole_shapes.items() for key in keys}
    return shapes | {f"master/{name}": tuple(bias_E.shape) for name, bias_E in _router_biases(engine)}


def engine_progress(
    engine: Engine,
    *,
    step: int,
    samples_consumed: int,
    cursors: list[dict[str, int]] | None = None,
    window: Collection[tuple[float, float]] = (),
) -> Progress:
    """cursors: each data rank's position, if samples are read live. window: the guard's losses and gradient norms."""
    counts = {int(state["step"]) for state in torch_optimizer(engine).state.values() if "step" in state}
    assert len(counts) <= 1, f"groups have counted {counts} steps"
    scaler = {name: getattr(engine.zero_optimizer.loss_scaler, name) for name in LOSS_SCALER_FIELDS} if engine.precision == "fp16" else None
    return Progress(
        step=step,
        samples_consumed=samples_consumed,
        optimizer_steps=next(iter(counts), 0),
        loss_scaler=scaler,
        cursors=cursors,
        window=[(loss, norm) for loss, norm in window] or None,
    )


def restore(backend: CheckpointBackend, checkpoint: Checkpoint, engine: Engine, *, verify: catalog.Verification = "full") -> None:
    """Load masters and optimizer state. Call `finish_restore` once all ranks have done so.

    Raises CheckpointError if the checkpoint is damaged, or of another model or optimizer: part of the engine may be filled then.
    """
    catalog.load(backend, checkpoint, logical_state(engine), logical_shapes(engine), verify=verify)


def finish_restore(progress: Progress, engine: Engine) -> None:
    """Set the step counts and the loss scale, and compute the working weights from the masters."""
    for state in torch_optimizer(engine).state.values():
        if "step" in state:  # each master its own tensor: a shared one would count several times a step
            state["step"] = torch.full_like(state["step"], float(progress.optimizer_steps))
    if engine.precision == "fp16":
        for name, value in (progress.loss_scaler or {}).items():
            setattr(engine.zero_optimizer.loss_scaler, name, value)
    refresh_weights(engine)


def load_weights(backend: CheckpointBackend, checkpoint: Checkpoint, engine: Engine) -> None:
    """Load the masters alone, into an engine that has not stepped. Call `refresh_weights` once all ranks have done so.

    Raises CheckpointError if the checkpoint is damaged, or of another model.
    """
    weights = replace(checkpoint, tensors=_masters_of(checkpoint.tensors))
    catalog.load(backend, weights, _masters_of(logical_state(engine)), _masters_of(logical_shapes(engine)), verify="full")


def refresh_weights(engine: Engine) -> None:
    """Compute the working weights from the masters. All ranks call this together."""
    zero = engine.zero_optimizer
    match engine.layout.zero:
        case 0:
            pass  # they are the same
        case 1 | 2:
            zero.update_lp_params()
        case _:
            zero.checkpoint_event_prologue()  # releases gathered weights
            for group in range(len(_masters(engine))):
                zero._reassign_or_swap_out_partitioned_parameters(group)  # noqa: SLF001
            zero.checkpoint_event_epilogue()  # gathers persistent weights


def _masters_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tensors.items() if key.startswith("master/")}


def fragments(engine: Engine) -> Iterator[tuple[str, Fragment]]:
    """Yield the name of each weight that this rank updates all or a part of, and that part."""
    for name, parameter in engine.module.named_parameters():
        if (fragment := _fragment(parameter, engine)) is not None:
            yield name, fragment


def torch_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Return the optimizer that updates the masters. ZeRO calls its `step` for one group of masters at a time."""
    return engine.zero_optimizer if engine.layout.zero == 0 else engine.zero_optimizer.optimizer


def _fragment(parameter: Any, engine: Engine) -> Fragment | None:
    """Return this rank's fragment of a parameter, with DeepSpeed's attributes; None if other ranks hold all of it."""
    zero = engine.zero_optimizer
    match engine.layout.zero:
        case 0:
            return Fragment(0, parameter, 0, parameter.numel())
        case 1 | 2:
            if (mapping := parameter._hp_mapping) is None:  # noqa: SLF001
                return None
            high = mapping.hp_fragment_address
            return Fragment(mapping.lp_fragment_address.start, _masters(engine)[mapping.param_group_index], high.start, high.numel)
        case _:
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = dist.get_rank(parameter.ds_process_group) * size
            count = min(size, parameter.ds_numel - start)  # the last ranks' fragments are padded
            return Fragment(start, _masters(engine)[group], offset, count) if count > 0 else None


def _masters(engine: Engine) -> list[Tensor]:
    """Return all tensors that the optimizer updates on this rank."""
    match engine.layout.zero:
        case 0:
            return list(engine.module.parameters())
        case 1 | 2:
            return engine.zero_optimizer.single_partition_of_fp32_groups
        case _:
            return engine.zero_optimizer.fp32_partitioned_groups_flat


def _optimizer_with_state(engine: Engine) -> torch.optim.Optimizer:
    """Return the optimizer. Before its first step it has no state: zeros are created, as the first step would."""
    optimizer = torch_optimizer(engine)
    for master in _masters(engine):
        state = optimizer.state[master]
        for name in STATE_KEYS[type(optimizer)]:
            if state.get(name) is None:
                state[name] = torch.zeros_like(master)
        if isinstance(optimizer, torch.optim.AdamW) and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
    return optimizer


def _router_biases(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    return ((f"{name}.bias", router.bias) for name, router in engine.module.routers() if router.bias is not None)


def _local_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of the part on this rank; ZeRO-3 leaves parameters themselves empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
