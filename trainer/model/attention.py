"""Attention: who sees whom, and the kernel that answers it fastest where we are.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, H head width. The queries are the last T of S positions.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from manta.data.errors import InputError
from manta.trainer.hardware.compiler import ask_for_compiler

log = logging.getLogger(__name__)
PLAIN_LIMIT = 256  # keys up to which plain matrix products beat SDPA's backward on CPU: +15 % at 256, a loss at 512
FLEX_LEAST = 16  # head width below which FlexAttention has no kernel


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


class Visibility:
    """Which keys a query sees. Made once a forward pass and handed to every layer: its masks are drawn once.

    causal: a query sees no key after its own position. window: a query at i sees a key at j if i - j < window, and j - i < window where it
    may look ahead; at least 1. documents [B, S]: a query sees keys of its own document only. Padding, -1, is a document like any other, so
    that no query sees nothing.
    """

    def __init__(self, *, causal: bool = True, window: int | None = None, documents: Tensor | None = None) -> None:
        self.causal, self.window, self.documents = causal, window, documents
        self._mask: Tensor | None = None
        self._bias: Tensor | None = None
        self._blocks: BlockMask | None = None

    def draw(self, T: int, S: int, device: torch.device, *, dropped: bool = False) -> None:
        """What the layers will most likely ask for: drawn ahead, the first of compiled or recomputed layers is like the others.

        dropped: whether they drop some of the attention weights.
        """
        plain = dropped or _short(S, device)
        if self.everything(T, S) or (self.all_before(T, S) and not plain):
            return
        if plain:
            self.bias(T, S, device)
        elif _flexes(T, S, device):
            self.blocks(T, S, device)
        else:
            self.mask(T, S, device)

    def mask(self, T: int, S: int, device: torch.device) -> Tensor:
        """-> seen_B1TS, or seen_11TS where there are no documents."""
        drawn = self._mask
        if drawn is None or drawn.shape[2:] != (T, S):
            queries_T1, keys_S = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)
            drawn = self._near(queries_T1, keys_S)[None, None]
            if self.documents is not None:
                drawn = drawn & (self.documents[:, None, S - T :, None] == self.documents[:, None, None, :])
            self._mask = drawn
        return drawn

    def bias(self, T: int, S: int, device: torch.device) -> Tensor:
        """The mask as what is added to scores: unlike filling, it costs nothing on the way back. In fp32: so is then their softmax."""
        drawn = self._bias
        if drawn is None or drawn.shape[2:] != (T, S):
            unseen = ~self.mask(T, S, device)
            drawn = torch.zeros(unseen.shape, device=device).masked_fill(unseen, float("-inf"))
            self._bias = drawn
        return drawn

    def blocks(self, T: int, S: int, device: torch.device) -> BlockMask:
        """The same for FlexAttention, which leaves out the blocks in which no query sees a key."""
        drawn = self._blocks
        if drawn is None or drawn.shape[2:] != (T, S):
            documents, first = self.documents, S - T

            def seen(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                near = self._near(query + first, key)
                return near if documents is None else near & (documents[b, query + first] == documents[b, key])

            drawn = _fast(create_block_mask, device)(seen, None if documents is None else len(documents), None, T, S, device)
            self._blocks = drawn
        return drawn

    def all_before(self, T: int, S: int) -> bool:
        """Whether it is what kernels call causal: each query sees all keys up to its own."""
        return self.causal and T == S and self._whole(S)

    def everything(self, T: int, S: int) -> bool:
        return (T == 1 or not self.causal) and self._whole(S)

    def _whole(self, S: int) -> bool:
        return self.documents is None and (self.window is None or self.window >= S)

    def _near(self, queries: Tensor, keys: Tensor) -> Tensor:
        distance = queries - keys
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (distance.abs() < self.window)
        return seen


def attend(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    visible: Visibility,
    *,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """-> o_BNTH. `dropout` is applied to the softmax's weights_BNTS: only the plain products have them to show."""
    T, S, device = q_BNTH.shape[2], k_BKSH.shape[2], q_BNTH.device
    if dropout is not None or _short(S, device):
        return _plain(q_BNTH, k_BKSH, v_BKSH, visible, dropout)
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    if grouped and device.type == "cuda" and q_BNTH.dtype == torch.float32:  # for which no kernel but the slowest knows of groups
        k_BKSH, v_BKSH = (x.repeat_interleave(q_BNTH.shape[1] // x.shape[1], dim=1) for x in (k_BKSH, v_BKSH))
        grouped = False
    sdpa = functools.partial(F.scaled_dot_product_attention, q_BNTH, k_BKSH, v_BKSH, enable_gqa=grouped)
    if visible.all_before(T, S):
        return sdpa(is_causal=True)
    if visible.everything(T, S):
        return sdpa()
    if _flexes(T, S, device) and q_BNTH.shape[3] >= FLEX_LEAST and q_BNTH.dtype != torch.float64:
        return _flex(q_BNTH, k_BKSH, v_BKSH, visible)
    return sdpa(attn_mask=visible.mask(T, S, device))


def _flexes(T: int, S: int, device: torch.device) -> bool:
    return device.type == "cuda" and T == S and (torch.compiler.is_compiling() or _has_compiler())


@functools.cache
def _has_compiler() -> bool:
    try:
        ask_for_compiler("cuda")
    except InputError as error:
        log.warning("windows and documents go by a mask, and not by FlexAttention, which costs speed: %s", error)
        return False
    return True


def _short(S: int, device: torch.device) -> bool:
    return device.type == "cpu" and S <= PLAIN_LIMIT


def _plain(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, visible: Visibility, dropout: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Softmax of masked scores, as written in the paper (Vaswani et al. 2017, section 3.2.1)."""
    B, N, T, H = q_BNTH.shape
    K, S, device = *k_BKSH.shape[1:3], q_BNTH.device
    q_BKGTH = q_BNTH.reshape(B, K, N // K * T, H)  # a group's queries stand one under another: its keys are read once
    if device.type == "cpu" and q_BNTH.dtype == torch.bfloat16:  # a CPU's fp32 products are the faster ones, and the more exact
        q_BKGTH, k_BKSH, v_BKSH = q_BKGTH.float(), k_BKSH.float(), v_BKSH.float()
    scores_BNTS = ((q_BKGTH * H**-0.5) @ k_BKSH.transpose(2, 3)).view(B, N, T, S)
    if not visible.everything(T, S):
        scores_BNTS = scores_BNTS + visible.bias(T, S, device)
    weights_BNTS = scores_BNTS.softmax(dim=-1, dtype=torch.promote_types(scores_BNTS.dtype, torch.float32))
    if dropout is not None:
        weights_BNTS = dropout(weights_BNTS)
    return (weights_BNTS.view(B, K, N // K * T, S).to(v_BKSH.dtype) @ v_BKSH).view(B, N, T, H).to(q_BNTH.dtype)


def _flex(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, visible: Visibility) -> Tensor:
    """FlexAttention (Dong et al. 2024): its kernel is compiled, where there is a GPU to compile it for."""
    T, S, device = q_BNTH.shape[2], k_BKSH.shape[2], q_BNTH.device
    q_BNTH, k_BKSH = q_BNTH.to(v_BKSH.dtype), k_BKSH.to(v_BKSH.dtype)  # autocast, which rotation and norms leave for fp32, passes it by
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    seen, options = visible.blocks(T, S, device), {"FORCE_USE_FLEX_ATTENTION": True}  # the kernel for short queries knows few group sizes
    return _fast(flex_attention, device)(q_BNTH, k_BKSH, v_BKSH, block_mask=seen, enable_gqa=grouped, kernel_options=options)


def _fast(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Compiled, unless it is called in what is compiled anyway."""
    return function if device.type != "cuda" or torch.compiler.is_compiling() else _compiled(function)


@functools.cache  # importing this file must not load the compiler
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
