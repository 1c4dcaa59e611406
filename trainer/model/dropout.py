"""Dropout (Srivastava et al. 2014) without a random generator: a hash of an element's position decides whether it is dropped.

A mask depends only on (sample's key, module name, position, channel). It is therefore the same under every layout, micro batch,
recomputation and device. All arithmetic is on integers that wrap around; every right shift is made logical.

Shapes: B batch, T queries, S keys, N heads of this rank, C channels, R rows: a row is hashed thoroughly, its channels cheaply from it.
"""

import functools
from collections.abc import Callable

import torch
import xxhash
from torch import Tensor, nn

CHUNK = {"cpu": 2**17, "cuda": 2**26}  # elements hashed at once: they stay in a CPU's cache; on a GPU it bounds memory
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # splitmix64's (Steele, Lea and Flood 2014)
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio: zero does not stay zero
_FINAL = 0x7FEB352D  # odd and below 2^31: an int32 tensor keeps its type


class DropoutKeys:
    """All that dropout depends on besides the module's name. Computed once per forward pass.

    keys_B: a hash of the run's seed and the sample's number. positions_BT: positions in the sample, without repetition.
    """

    def __init__(self, keys_B: Tensor, positions_BT: Tensor) -> None:
        self.keys_B = _mix(keys_B ^ _GOLDEN)
        self.rows_BT = _mix(self.keys_B[:, None] ^ positions_BT)


class _HashedDropout(nn.Module):
    stream: Tensor | None

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        # A tensor and not an int: compiled blocks then differ only in its value, and share their code.
        self.register_buffer("stream", None, persistent=False)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"

    def _drop(self, x: Tensor, rows: Tensor) -> Tensor:
        """Drop elements of x and scale the others, so that the expectation stays. rows: a hash for each vector of x."""
        assert self.stream is not None, "name_dropouts was not called"
        kept = _kept(_mix(rows ^ self.stream).reshape(-1, 1), x.shape[-1], self.rate).view(x.shape)
        return (x * kept).mul_(1 / (1 - self.rate))


class Dropout(_HashedDropout):
    """Dropout of hidden states."""

    def forward(self, x_BTC: Tensor, keys: DropoutKeys | None) -> Tensor:
        """keys: None drops nothing."""
        if not self.training or self.rate == 0 or keys is None:
            return x_BTC
        return self._drop(x_BTC, keys.rows_BT)


class AttentionDropout(_HashedDropout):
    """Dropout of attention weights: the mask depends on (head, query, key) besides sample and module.

    Attention always sees a sample's queries and keys from position 0 on, so that their index is their position. Its heads may be split
    over ranks: `first_head` is the number of this rank's first.
    """

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        self.first_head = 0

    def bind(self, keys: DropoutKeys | None) -> Callable[[Tensor], Tensor] | None:
        """Return the function for `attend`; None if nothing is dropped, so that it may use a faster kernel."""
        if not self.training or self.rate == 0 or keys is None:
            return None
        return functools.partial(self.forward, keys=keys)

    def forward(self, weights_BNTS: Tensor, keys: DropoutKeys) -> Tensor:
        N, T, S = weights_BNTS.shape[1:]
        device = weights_BNTS.device
        heads = torch.arange(self.first_head, self.first_head + N, device=device)
        queries = torch.arange(S - T, S, device=device)
        positions_NT = (heads[:, None] << 32) + queries
        return self._drop(weights_BNTS, _mix(keys.keys_B[:, None, None] ^ positions_NT))


def name_dropouts(model: nn.Module) -> None:
    """Set each dropout's stream from its module's name. Call this on the whole model, before it is sharded or wrapped."""
    for name, module in model.named_modules():
        if isinstance(module, _HashedDropout):
            module.stream = torch.tensor(xxhash.xxh3_64_intdigest(name.encode()) >> 1)


def _kept(rows_R1: Tensor, width: int, rate: float) -> Tensor:
    """Return kept_RC, booleans that are true with probability 1 - rate."""
    channels_C = torch.arange(width, dtype=torch.int32, device=rows_R1.device)
    threshold = round(rate * 2**32) - 2**31
    if torch.compiler.is_compiling():  # the compiler fuses it all and keeps nothing
        return _hash(rows_R1, channels_C) >= threshold
    rows = max(1, CHUNK.get(rows_R1.device.type, CHUNK["cuda"]) // width)
    return torch.cat([_hash(chunk, channels_C) >= threshold for chunk in rows_R1.split(rows)])


def _hash(rows_R1: Tensor, channels_C: Tensor) -> Tensor:
    """Return int32 hashes_RC, from 63 bits of each row: one half is combined with the channel, the other multiplies the result.

    The channel meets an xor first: an index multiplied beyond its type is undefined in the C++ that torch.compile writes.
    """
    added = (rows_R1 >> 32).int()
    factor = ((rows_R1 << 32) >> 32).int() | 1
    hashes = (channels_C ^ added).mul_(factor)
    hashes ^= (hashes >> 15).bitwise_and_(0x1FFFF)
    hashes *= _FINAL
    hashes ^= (hashes >> 16).bitwise_and_(0xFFFF)
    return hashes


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer: a bijection of int64 in which each bit of x affects every bit of the result."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX[0]
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX[1]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
