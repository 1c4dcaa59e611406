"""An engine's state as logical tensors: `master/<parameter>` and `<state>/<parameter>`, whatever the layout.

Private parts of DeepSpeed relied on (ZeRO 1, 2): `param._hp_mapping` and its addresses, `single_partition_of_fp32_groups`,
`update_lp_params`, `_lazy_init_hp_params_optimizer_state`. A contract test names them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manta.trainer.checkpoint.pieces import Pieces
from manta.trainer.engine import Engine
from manta.trainer.optim import STATES


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """This rank's share of one parameter: `count` weights from `start` of the whole, at `offset` of the group's flat masters."""

    name: str
    shape: tuple[int, ...]
    start: int
    flat: Tensor
    offset: int
    count: int


def logical_state(engine: Engine) -> dict[str, Pieces]:
    """Masters and optimizer state, as views: saving reads them, loading writes them."""
    state: dict[str, Pieces] = {}
    for fragment in _fragments(engine):
        held = {"master": fragment.flat.data, **_optimizer_state(engine, fragment.flat)}
        for key, flat in held.items():
            view = flat.narrow(0, fragment.offset, fragment.count)
            state[f"{key}/{fragment.name}"] = Pieces(fragment.shape, view, fragment.start)
    return state


def logical_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Every key that a checkpoint of this model has, over all ranks."""
    keys = ("master", *STATES[type(engine.zero.optimizer)])
    return {f"{key}/{name}": tuple(p.shape) for name, p in engine.module.named_parameters() for key in keys}


def optimizer_steps(engine: Engine) -> int:
    """Steps that the optimizer's bias correction has counted."""
    counts = {int(held["step"]) for held in engine.zero.optimizer.state.values() if "step" in held}
    assert len(counts) <= 1, f"groups have counted {counts} steps"
    return next(iter(counts), 0)


def after_load(engine: Engine, steps: int) -> None:
    """Once the views are filled: the step counts, and the training-precision weights from their masters."""
    for flat in engine.zero.single_partition_of_fp32_groups:
        held = engine.zero.optimizer.state[flat]
        if "step" in held:
            held["step"] = torch.full_like(held["step"], float(steps))  # each group its own: a shared one would run ahead
    engine.zero._lazy_init_hp_params_optimizer_state()  # noqa: SLF001
    engine.zero.update_lp_params()


def _fragments(engine: Engine) -> Iterator[Fragment]:
    for name, parameter in engine.module.named_parameters():
        mapping: Any = getattr(parameter, "_hp_mapping")  # noqa: B009  DeepSpeed hangs it there, unknown to torch
        if mapping is None:  # all of it lies on other ranks
            continue
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat = engine.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        yield Fragment(name=name, shape=tuple(parameter.shape), start=lp.start, flat=flat, offset=hp.start, count=hp.numel)


def _optimizer_state(engine: Engine, flat: Tensor) -> dict[str, Tensor]:
    """The state of one group's flat masters. Before the first step there is none: it is made, as the first step would, of zeros."""
    optimizer = engine.zero.optimizer
    held, names = optimizer.state[flat], STATES[type(optimizer)]
    for name in names:
        if held.get(name) is None:
            held[name] = torch.zeros_like(flat)
    if isinstance(optimizer, torch.optim.AdamW) and "step" not in held:
        held["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
    return {name: held[name] for name in names}
