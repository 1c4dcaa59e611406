"""The health of a model at a step: gradients, weights and updates by group of weights, activations, attention logits, expert load.

Everything is of the whole model, whatever the layout: ranks add what they hold, each weight and each token once.

- Gradient norms are of the global gradient, unscaled and before clipping: the squares of all groups add up to the square of `grad_norm`.
- Weights are the masters, before the update that the ratio is of.
- Activations and logits come from a separate forward pass, without dropout, over the step's batches and with the step's weights. The
  training step records nothing, so that compiled blocks and recomputed activations are not affected.

Legend: B sequences, T tokens on this rank, D model width, G groups of weights, L blocks.
"""

import math
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from manta.trainer.checkpoint.engine_state import Fragment, fragments, torch_optimizer
from manta.trainer.dataloader.batch import Batch
from manta.trainer.dist.world import Mesh
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.metrics import Line
from manta.trainer.model.layers import Attention
from manta.trainer.parallel.sharding import is_sharded

GRADIENT, WEIGHT, UPDATE = range(3)  # sums of squares of each group


def group_of(weight: str) -> str:
    """Return the group of a weight: embedding (of tokens, positions, segments), blocks.3, blocks.3.experts, or the name of its module."""
    first, *rest = weight.split(".")
    if first == "blocks":
        return f"blocks.{rest[0]}.experts" if "experts" in rest else f"blocks.{rest[0]}"
    return "embedding" if "embedding" in first else first


class Health:
    """The measurement of one step. All ranks call its methods together and in this order: activations, update, line."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._update = engine, UpdateSquares(engine)
        blocks = len(engine.module.blocks)
        self._activations_2L = torch.zeros(2, blocks, dtype=torch.float64, device=engine.device)  # sums of squares, and how many numbers
        self._logits_L = torch.full((blocks,), -math.inf, dtype=torch.float64, device=engine.device)

    def measure_activations(self, batches: Iterable[Batch]) -> None:
        """Run these batches forward, before `accumulate` and the update. Of attention, the first sequence of each one is measured."""
        mesh = self._engine.mesh
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would not call hooks
            for batch in batches:
                real_BT = batch.shard(mesh.sequence_rank, mesh.layout.sequence).real
                with self._recording(None if real_BT is None else real_BT.to(self._engine.device)):
                    self._engine.evaluate(batch)

    @contextmanager
    def _recording(self, real_BT: Tensor | None) -> Generator[None]:
        """Record the output and the attention logits of each block. real_BT: False for padding, which is not counted."""
        layers: list[tuple[int, Attention]] = []
        with ExitStack() as stack:
            for number, block in enumerate(self._engine.module.blocks):
                handle = block.register_forward_hook(partial(self._record, number, real_BT))
                stack.callback(handle.remove)
                layers += [(number, module) for module in block.modules() if isinstance(module, Attention)]
            for _, layer in layers:
                layer.measured = []
                stack.callback(setattr, layer, "measured", None)
            yield
            for number, layer in layers:
                for logit in layer.measured or []:
                    self._logits_L[number] = torch.maximum(self._logits_L[number], logit.double())

    def _record(self, block: int, real_BT: Tensor | None, _: nn.Module, __: object, output: Any) -> None:
        x_BTD = output[0] if isinstance(output, tuple) else output
        if not isinstance(x_BTD, Tensor) or not x_BTD.is_floating_point():  # a block of the user's may return anything
            return
        if real_BT is not None and x_BTD.shape[:2] == real_BT.shape:
            x_BTD = x_BTD[real_BT]
        self._activations_2L[0, block] += torch.linalg.vector_norm(x_BTD, dtype=torch.float64).square()
        self._activations_2L[1, block] += x_BTD.numel()

    def measure_update(self) -> AbstractContextManager[None]:
        """Measure the update that is done inside; it may be skipped."""
        return self._update.measure()

    def line(self, grad_norm: float, max_grad_norm: float) -> Line:
        """Return the keys of metrics.jsonl. grad_norm: the step's, before clipping to max_grad_norm."""
        squares_3G, blocks = self._update.total(), len(self._logits_L)
        if self._engine.mesh.tensor_rank > 0:
            self._activations_2L.zero_()  # the ranks of a tensor group have the same activations
        sums = torch.cat((squares_3G.flatten(), self._activations_2L.flatten()))
        dist.all_reduce(sums)
        dist.all_reduce(self._logits_L, dist.ReduceOp.MAX)
        gradients, weights, updates = sums[: squares_3G.numel()].view_as(squares_3G).sqrt().tolist()
        squares, counts = sums[squares_3G.numel() :].view(2, blocks).tolist()
        groups, names = self._update.groups, [f"blocks.{number}" for number in range(blocks)]
        clipped = max(1.0, (grad_norm + 1e-6) / max_grad_norm)  # the optimizer has seen gradients divided by this
        line: Line = {}
        if any(weights):  # the update was not skipped
            line |= _named("grad_norm", groups, [norm * clipped for norm in gradients])
            line |= _named("weight_norm", groups, weights)
            line |= _named("update_ratio", groups, map(_ratio, updates, weights))
        line |= _named("activation_rms", names, map(math.sqrt, map(_ratio, squares, counts)))
        line |= _named("attention_logit", names, self._logits_L.tolist())
        return line | _named("expert_entropy", self._engine.expert_loads, map(entropy, self._engine.expert_loads.values()))


class UpdateSquares:
    """Sums of squares of each group's gradients, weights and updates, of what this rank counts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.groups = list(dict.fromkeys(group_of(name) for name, _ in engine.module.named_parameters()))
        self._squares: dict[torch.device, Tensor] = {}  # [3, G] by the device of masters: offloaded ones are in CPU memory
        self._parts: dict[int, list[tuple[int, Fragment]]] = {}  # of each master, by its id: the group and the fragment
        for name, fragment in fragments(engine):
            if is_counted(name, engine.mesh):
                self._parts.setdefault(id(fragment.master), []).append((self.groups.index(group_of(name)), fragment))
        self._before: dict[int, Tensor] = {}  # copies of the masters that are being updated

    @contextmanager
    def measure(self) -> Generator[None]:
        optimizer = torch_optimizer(self._engine)
        hooks = [optimizer.register_step_pre_hook(self._start), optimizer.register_step_post_hook(self._end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def total(self) -> Tensor:
        """Return the sums [3, G] of gradients, weights and updates on the engine's device. Gradients are clipped."""
        device = self._engine.device
        return sum((squares.to(device) for squares in self._squares.values()), start=self._zeros(device))

    def _start(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for master in self._counted(optimizer):
            self._add(GRADIENT, master, master.grad)
            self._add(WEIGHT, master, master)
            self._before[id(master)] = master.detach().clone()

    def _end(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for master in self._counted(optimizer):
            if (before := self._before.pop(id(master), None)) is not None:  # None: the guard rejects the update
                self._add(UPDATE, master, before.sub_(master.detach()))

    def _counted(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Return the masters that this call of the optimizer's step updates: ZeRO calls it for each group of masters."""
        masters = (master for group in optimizer.param_groups for master in group["params"])
        return [master for master in masters if master.grad is not None and id(master) in self._parts]

    def _add(self, kind: int, master: Tensor, values: Tensor) -> None:
        flat, squares = values.detach().reshape(-1), self._squares.setdefault(values.device, self._zeros(values.device))
        for group, fragment in self._parts[id(master)]:
            part = flat.narrow(0, fragment.offset, fragment.size)
            squares[kind, group] += torch.linalg.vector_norm(part, dtype=torch.float64).square()

    def _zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(3, len(self.groups), dtype=torch.float64, device=device)


def is_counted(name: str, mesh: Mesh) -> bool:
    """Whether this rank's part of a weight is counted: of several ranks with the same part, one is."""
    if mesh.tensor_rank > 0 and not is_sharded(name, mesh.shard, "tensor"):
        return False
    replicas = mesh.expert_replicas if is_sharded(name, mesh.shard, "expert") else mesh.replicas
    return mesh.layout.zero > 0 or dist.get_rank(replicas) == 0


def entropy(share_E: Tensor) -> float:
    """Return the entropy of experts' load over its largest value, ln E: 1 if all have the same load, 0 if one expert has it all."""
    return float(torch.special.entr(share_E.double()).sum()) / math.log(len(share_E)) if len(share_E) > 1 else 1.0


def _ratio(value: float, by: float) -> float:
    return value / by if by > 0 else math.nan


def _named(key: str, names: Iterable[str], values: Iterable[float]) -> Line:
    """Return the finite ones of these values."""
    return {f"health/{key}/{name}": value for name, value in zip(names, values, strict=True) if math.isfinite(value)}
