"""Expert parallelism (GShard, Lepikhin et al. 2021): each rank of a group holds some of the experts, and tokens travel to them.

The router, its losses and its load are the model's own on every rank; only the experts' work is dealt out, and no token is dropped.

Shapes: M tokens sorted by expert, D model width, E experts, L = E / P of them here, P ranks of the group.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from manta.trainer.dist.collectives import exchange
from manta.trainer.model.moe import MixtureOfExperts


def share(model: nn.Module, group: ProcessGroup) -> None:
    for module in list(model.modules()):
        if isinstance(module, MixtureOfExperts):
            module.experts.forward = TravellingTokens(module.experts.forward, group)


class TravellingTokens:
    """Sends each token to the rank that holds its expert, and brings back what the expert made of it."""

    def __init__(self, work: Callable[[Tensor, Tensor], Tensor], group: ProcessGroup) -> None:
        self.work, self.group, self.ranks = work, group, dist.get_world_size(group)

    def __call__(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        counts_PL = counts_E.view(self.ranks, -1)  # for each rank's experts
        came_PL = torch.empty_like(counts_PL)  # from each rank, for our experts
        dist.all_to_all_single(came_PL, counts_PL.contiguous(), group=self.group)
        sent, received = torch.stack((counts_PL, came_PL)).sum(dim=2).tolist()  # the one time that the host waits
        arrived = exchange(x_MD, sent, received, self.group)
        # They come rank by rank, each sorted by expert; our experts want them expert by expert.
        experts = torch.arange(came_PL.shape[1], device=x_MD.device).repeat(self.ranks)
        order = experts.repeat_interleave(came_PL.flatten(), output_size=sum(received)).argsort(stable=True)
        worked = self.work(arrived[order], came_PL.sum(dim=0))
        return exchange(worked[order.argsort()], received, sent, self.group)
