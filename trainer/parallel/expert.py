"""Expert parallelism (GShard, Lepikhin et al. 2021): each rank of a group holds some of the experts, and tokens are sent to them.

The router, its losses and its load stay the model's own on every rank; only the experts' computation is distributed. No token is dropped.

Shapes: M tokens sorted by expert, D model width, E experts, L = E / P experts per rank, P ranks of the group.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from manta.trainer.model.moe import MixtureOfExperts
from manta.trainer.parallel.collectives import all_to_all


def apply_expert_parallel(model: nn.Module, group: ProcessGroup) -> None:
    for module in list(model.modules()):
        if isinstance(module, MixtureOfExperts):
            module.experts.forward = partial(exchange_tokens, module.experts.forward, group)


def exchange_tokens(experts: Callable[[Tensor, Tensor], Tensor], group: ProcessGroup, x_MD: Tensor, counts_E: Tensor) -> Tensor:
    """Send each token to the rank that holds its expert, and return the expert's output."""
    ranks = dist.get_world_size(group)
    sent_PL = counts_E.view(ranks, -1)  # to each rank's experts
    received_PL = torch.empty_like(sent_PL)  # from each rank, for the local experts
    dist.all_to_all_single(received_PL, sent_PL.contiguous(), group=group)
    sent, received = torch.stack((sent_PL, received_PL)).sum(dim=2).tolist()  # the only wait for the device
    local_MD = all_to_all(x_MD, sent, received, group)
    # Rows arrive rank by rank, each sorted by expert; the local experts need them sorted by expert.
    numbers = torch.arange(received_PL.shape[1], device=x_MD.device).repeat(ranks)
    order = numbers.repeat_interleave(received_PL.flatten(), output_size=sum(received)).argsort(stable=True)
    y_MD = experts(local_MD[order], received_PL.sum(dim=0))
    return all_to_all(y_MD[order.argsort()], received, sent, group)
