"""Causal attention: one question, the kernel that answers it fastest where we are.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, H head width. The queries are the last T of S positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN_LIMIT = 256  # keys up to which plain matrix products beat SDPA's backward on CPU: +15 % at 256, a loss at 512


class Cache:
    """Keys and values of the positions already seen, for one layer."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new positions; gives all of them: k_BKSH, v_BKSH."""
        if self._keys is not None and self._values is not None:
            k_BKTH, v_BKTH = torch.cat((self._keys, k_BKTH), dim=2), torch.cat((self._values, v_BKTH), dim=2)
        self._keys, self._values = k_BKTH, v_BKTH
        return k_BKTH, v_BKTH


def attend(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
    """-> o_BNTH. Each query sees the keys up to its own position."""
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    if q_BNTH.device.type == "cpu" and S <= PLAIN_LIMIT:
        return _plain(q_BNTH, k_BKSH, v_BKSH)
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    if T == S:
        return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, is_causal=True, enable_gqa=grouped)
    seen_TS = None if T == 1 else _seen(T, S, q_BNTH.device)
    return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, attn_mask=seen_TS, enable_gqa=grouped)


def _plain(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
    """Softmax of masked scores, as written in the paper (Vaswani et al. 2017, section 3.2.1)."""
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKGTH = q_BNTH.reshape(B, K, N // K * T, H)  # a group's queries stand one under another: its keys are read once
    scores = (q_BKGTH * H**-0.5) @ k_BKSH.transpose(2, 3)
    scores = scores.view(B, K, N // K, T, S).masked_fill(~_seen(T, S, q_BNTH.device), float("-inf"))
    weights = scores.softmax(dim=-1).view(B, K, N // K * T, S)
    return (weights @ v_BKSH).view(B, N, T, H)


def _seen(T: int, S: int, device: torch.device) -> Tensor:
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
