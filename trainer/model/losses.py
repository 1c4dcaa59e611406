"""What is minimised.

Shapes: N tokens (batch and time in one), D model width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = {"cpu": 2**20, "cuda": 2**27}  # logits held at once in fp32: 4 MiB stays in a CPU's cache, 512 MiB keeps a GPU busy
LEAST = 256  # tokens a chunk, whatever the vocabulary: below it, reading the weights again costs more than the products


def cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets under softmax(x weight^T), in nats a token.

    The head is part of it, so that logits for all tokens are never held at once: memory is that of a chunk, not O(N V).
    Products are taken in the weights' precision, the softmax in fp32.
    """
    return _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, torch.is_grad_enabled())  # type: ignore[no-any-return]


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of a softmax is at hand when its loss is (p - 1 at the target): it is taken on the way forward, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, wanted: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        grad_x = torch.empty_like(x_ND) if wanted else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted else None
        rows = max(LEAST, CHUNK.get(x_ND.device.type, CHUNK["cuda"]) // len(weight_VD))
        for first in range(0, len(x_ND), rows):
            chunk = slice(first, first + rows)
            logits = F.linear(x_ND[chunk], weight_VD).float()
            targets = targets_N[chunk, None]
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            total += (log_sum - logits.gather(1, targets)).sum()
            if grad_x is None or grad_weight is None:
                continue
            grad = logits.sub_(log_sum).exp_()
            grad.scatter_add_(1, targets, grad.new_full(targets.shape, -1.0))
            grad = grad.to(x_ND.dtype)
            grad_x[chunk] = grad @ weight_VD
            grad_weight += grad.T @ x_ND[chunk]
        ctx.save_for_backward(grad_x, grad_weight)
        return total / len(x_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        scale = grads[0] / len(grad_x)  # fp32 without a dimension: it lends a bf16 tensor its value, not its type
        return grad_x * scale, (grad_weight * scale).to(grad_x.dtype), None, None
