"""Attention: which tokens attend to which, and the fastest kernel for the device.

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
from manta.trainer.compile_cache import use_own_compile_cache
from manta.trainer.hardware import require_compiler

log = logging.getLogger(__name__)
MATMUL_LIMIT = 256  # keys up to which plain matrix products beat SDPA's backward on CPU: +15 % at 256, a loss at 512
FLEX_MIN_WIDTH = 16  # FlexAttention has no kernel for narrower heads
MOST_LOGITS = 1 << 24  # in memory at once, while the largest is looked for


class KVCache:
    """Keys and values of earlier positions, for one layer."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions and return all of them: k_BKSH, v_BKSH."""
        if self._keys is not None and self._values is not None:
            k_BKTH, v_BKTH = torch.cat((self._keys, k_BKTH), dim=2), torch.cat((self._values, v_BKTH), dim=2)
        self._keys, self._values = k_BKTH, v_BKTH
        return k_BKTH, v_BKTH


class AttentionMask:
    """Which of S keys the last T positions attend to. One object serves all layers of a forward pass: each mask is computed once.

    causal: a query attends to no key after its own position. window (at least 1): a query at i attends to a key at j if i - j < window;
    without `causal` also j - i < window. documents [B, S]: a query attends only within its own document. Padding, -1, counts as a
    document, so that every query attends to something.
    """

    def __init__(
        self, T: int, S: int, device: torch.device, *, causal: bool = True, window: int | None = None, documents: Tensor | None = None
    ) -> None:
        self.T, self.S, self.device = T, S, device
        self.causal, self.window, self.documents = causal, window, documents
        sees_all_positions = documents is None and (window is None or window >= S)
        self.is_full = sees_all_positions and (T == 1 or not causal)
        self.is_causal = sees_all_positions and causal and T == S  # what kernels call causal
        self._boolean: Tensor | None = None
        self._additive: Tensor | None = None
        self._blocks: BlockMask | None = None

    def prepare(self, *, dropout: bool) -> None:
        """Compute the mask that the layers will most likely use, so that the first compiled or recomputed layer is like the others.

        dropout: whether the layers drop attention weights.
        """
        matmul = dropout or _prefers_matmul(self.S, self.device)
        if self.is_full or (self.is_causal and not matmul):
            return
        if matmul:
            self.additive()
        elif _can_use_flex(self):
            self.blocks()
        else:
            self.boolean()

    def boolean(self) -> Tensor:
        """Return mask_B1TS, True where a query attends to a key; mask_11TS without documents."""
        if self._boolean is None:
            first = self.S - self.T
            queries_T1, keys_S = torch.arange(first, self.S, device=self.device)[:, None], torch.arange(self.S, device=self.device)
            mask = self._in_reach(queries_T1, keys_S)[None, None]
            if self.documents is not None:
                mask = mask & (self.documents[:, None, first:, None] == self.documents[:, None, None, :])
            self._boolean = mask
        return self._boolean

    def additive(self) -> Tensor:
        """Return the mask to add to scores, 0 or -inf: unlike masked_fill it has no backward. In fp32, like the softmax that follows."""
        if self._additive is None:
            hidden = ~self.boolean()
            self._additive = torch.zeros(hidden.shape, device=self.device).masked_fill(hidden, float("-inf"))
        return self._additive

    def blocks(self) -> BlockMask:
        """Return the mask for FlexAttention, which skips blocks in which no query attends to any key."""
        if self._blocks is None:
            documents, first = self.documents, self.S - self.T

            def attends(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                in_reach = self._in_reach(query + first, key)
                return in_reach if documents is None else in_reach & (documents[b, query + first] == documents[b, key])

            B, create = None if documents is None else len(documents), _compiled_on_gpu(create_block_mask, self.device)
            mask: BlockMask = create(attends, B, None, self.T, self.S, self.device)
            self._blocks = mask
        return self._blocks

    def rows(self, sequence: int, first: int, end: int) -> Tensor:
        """Return mask_tS of queries `first` to `end`, of T, of one sequence, without the rest. False for padding."""
        earlier, S = self.S - self.T, torch.arange(self.S, device=self.device)
        queries = S[earlier + first : earlier + end, None]
        rows = self._in_reach(queries, S)
        if self.documents is not None:
            documents = self.documents[sequence]
            rows = rows & (documents[queries] == documents) & (documents[queries] >= 0)
        return rows

    def _in_reach(self, queries: Tensor, keys: Tensor) -> Tensor:
        distance = queries - keys
        in_reach = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        return in_reach if self.window is None else in_reach & (distance.abs() < self.window)


def attend(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask: AttentionMask,
    *,
    dropout: Callable[[Tensor], Tensor] | None = None,
    measured: list[Tensor] | None = None,
) -> Tensor:
    """Return o_BNTH. `dropout` is applied to the softmax weights_BNTS, which only the matrix-product kernel exposes.

    measured: the largest logit of the first sequence is appended to it.
    """
    if measured is not None:
        measured.append(largest_logit(q_BNTH[0], k_BKSH[0], mask))
    device = q_BNTH.device
    if dropout is not None or _prefers_matmul(mask.S, device):
        return _matmul_attention(q_BNTH, k_BKSH, v_BKSH, mask, dropout)
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    if grouped and device.type == "cuda" and q_BNTH.dtype == torch.float32:  # only the slowest fp32 kernel supports groups
        k_BKSH, v_BKSH = (x.repeat_interleave(q_BNTH.shape[1] // x.shape[1], dim=1) for x in (k_BKSH, v_BKSH))
        grouped = False
    sdpa = functools.partial(F.scaled_dot_product_attention, q_BNTH, k_BKSH, v_BKSH, enable_gqa=grouped)
    if mask.is_causal:
        return sdpa(is_causal=True)
    if mask.is_full:
        return sdpa()
    if _can_use_flex(mask) and q_BNTH.shape[3] >= FLEX_MIN_WIDTH and q_BNTH.dtype != torch.float64:
        return _flex_attention(q_BNTH, k_BKSH, v_BKSH, mask)
    return sdpa(attn_mask=mask.boolean())


def largest_logit(q_NTH: Tensor, k_KSH: Tensor, mask: AttentionMask, *, sequence: int = 0) -> Tensor:
    """Return the largest product of a query and a key that it attends to, scaled as before the softmax; -inf if all is padding.

    No kernel returns it: it is computed from scratch, at least in fp32, for a few queries at a time. sequence: its index in the batch.
    """
    (N, T, H), (K, S, _) = q_NTH.shape, k_KSH.shape
    precision = torch.promote_types(q_NTH.dtype, torch.float32)
    q_KGTH, keys_KHS = q_NTH.to(precision).view(K, N // K, T, H) * H**-0.5, k_KSH.to(precision).transpose(1, 2)
    largest, size = torch.full((), float("-inf"), dtype=precision, device=q_NTH.device), max(1, MOST_LOGITS // (N * S))
    for first in range(0, T, size):
        q_KGtH = q_KGTH[:, :, first : first + size]
        logits_KtS = (q_KGtH.flatten(1, 2) @ keys_KHS).view(K, N // K, -1, S).amax(dim=1)
        largest = torch.maximum(largest, logits_KtS.amax(dim=0).masked_fill(~mask.rows(sequence, first, first + size), float("-inf")).max())
    return largest


def _can_use_flex(mask: AttentionMask) -> bool:
    return mask.device.type == "cuda" and mask.T == mask.S and (torch.compiler.is_compiling() or _has_compiler())


@functools.cache
def _has_compiler() -> bool:
    try:
        require_compiler("cuda")
    except InputError as error:
        log.warning("attention uses a dense mask instead of the faster FlexAttention: %s", error)
        return False
    return True


def _prefers_matmul(S: int, device: torch.device) -> bool:
    return device.type == "cpu" and S <= MATMUL_LIMIT


def _matmul_attention(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: AttentionMask, dropout: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Softmax of masked scores, as the paper writes it (Vaswani et al. 2017, section 3.2.1)."""
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKGTH = q_BNTH.reshape(B, K, N // K * T, H)  # the queries of a group in one matrix: its keys are read once
    if q_BNTH.device.type == "cpu" and q_BNTH.dtype == torch.bfloat16:  # on a CPU fp32 products are faster, and more exact
        q_BKGTH, k_BKSH, v_BKSH = q_BKGTH.float(), k_BKSH.float(), v_BKSH.float()
    scores_BNTS = ((q_BKGTH * H**-0.5) @ k_BKSH.transpose(2, 3)).view(B, N, T, S)
    if not mask.is_full:
        scores_BNTS = scores_BNTS + mask.additive()
    weights_BNTS = scores_BNTS.softmax(dim=-1, dtype=torch.promote_types(scores_BNTS.dtype, torch.float32))
    if dropout is not None:
        weights_BNTS = dropout(weights_BNTS)
    return (weights_BNTS.view(B, K, N // K * T, S).to(v_BKSH.dtype) @ v_BKSH).view(B, N, T, H).to(q_BNTH.dtype)


def _flex_attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: AttentionMask) -> Tensor:
    """FlexAttention (Dong et al. 2024). Its kernel is compiled on a GPU."""
    q_BNTH, k_BKSH = q_BNTH.to(v_BKSH.dtype), k_BKSH.to(v_BKSH.dtype)  # autocast does not cast here, and rotation and norms return fp32
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    options = {"FORCE_USE_FLEX_ATTENTION": True}  # the kernel for short queries supports few group sizes
    kernel = _compiled_on_gpu(flex_attention, q_BNTH.device)
    return kernel(q_BNTH, k_BKSH, v_BKSH, block_mask=mask.blocks(), enable_gqa=grouped, kernel_options=options)


def _compiled_on_gpu(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Compile for a GPU, unless the caller is being compiled already."""
    return function if device.type != "cuda" or torch.compiler.is_compiling() else _compiled(function)


@functools.cache  # importing this file must not load the compiler
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel. It stays compiled where blocks are run without their compiled code: without it, it needs too much memory."""
    use_own_compile_cache()
    compiled: Callable[..., Any] = torch.compiler.set_stance("default")(torch.compile(function))
    return compiled
