"""Dropout (Srivastava et al. 2014) without a generator: what is dropped is a hash of where it stands.

A mask depends on nothing but (sample's key, place in the model, position, channel), so that it is the same under every layout, micro batch,
recomputation and device. All is integer arithmetic that wraps around; every right shift is made a logical one.

Shapes: B batch, T queries, S keys, N heads of this rank, C channels, R rows: a row is hashed well once, its channels cheaply from it.
"""

import functools
from collections.abc import Callable

import torch
import xxhash
from torch import Tensor, nn

CHUNK = {"cpu": 2**17, "cuda": 2**26}  # elements hashed at once: on a CPU they stay in its cache; elsewhere it bounds the memory held
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # splitmix64's (Steele, Lea and Flood 2014)
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio: zero does not stay zero
_FINAL = 0x7FEB352D  # odd and below 2^31: an int32 tensor stays one


class Noise:
    """What dropout may depend on besides its place in the model. Made once a forward pass.

    keys_B: a hash of the run's seed and the sample's number. positions_BT: places in the sample, no two of a sample alike.
    """

    def __init__(self, keys_B: Tensor, positions_BT: Tensor) -> None:
        self.keys_B = _mix(keys_B ^ _GOLDEN)
        self.rows_BT = _mix(self.keys_B[:, None] ^ positions_BT)


class _Hashed(nn.Module):
    stream: Tensor | None

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        # a tensor and no int: compiled blocks differ in it alone, and share their code
        self.register_buffer("stream", None, persistent=False)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"

    def _drop(self, x: Tensor, rows: Tensor) -> Tensor:
        """Drops from x, and scales it so that its expectation stays. rows: a hash for each vector of x."""
        assert self.stream is not None, "name_dropouts was not called"
        kept = _kept(_mix(rows ^ self.stream).reshape(-1, 1), x.shape[-1], self.rate).view(x.shape)
        return (x * kept).mul_(1 / (1 - self.rate))


class Dropout(_Hashed):
    """Of hidden states."""

    def forward(self, x_BTC: Tensor, noise: Noise | None) -> Tensor:
        if not self.training or self.rate == 0 or noise is None:
            return x_BTC
        return self._drop(x_BTC, noise.rows_BT)


class AttentionDropout(_Hashed):
    """Of attention's weights: the mask depends on (head, query, key) besides the sample and the place in the model.

    A sample's queries and keys are whole wherever attention is computed, so that their index is their position; heads may be shared out:
    `first_head` is the number of this rank's first.
    """

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        self.first_head = 0

    def under(self, noise: Noise | None) -> Callable[[Tensor], Tensor] | None:
        """What `attend` wants: None where nothing is dropped, so that it may take a faster kernel."""
        if not self.training or self.rate == 0 or noise is None:
            return None
        return functools.partial(self.forward, noise=noise)

    def forward(self, weights_BNTS: Tensor, noise: Noise) -> Tensor:
        N, T, S = weights_BNTS.shape[1:]
        device = weights_BNTS.device
        heads = torch.arange(self.first_head, self.first_head + N, device=device)
        queries = torch.arange(S - T, S, device=device)
        places_NT = (heads[:, None] << 32) + queries
        return self._drop(weights_BNTS, _mix(noise.keys_B[:, None, None] ^ places_NT))


def name_dropouts(model: nn.Module) -> None:
    """Gives each dropout of the whole model, before it is cut or wrapped, the stream of its own name."""
    for name, module in model.named_modules():
        if isinstance(module, _Hashed):
            module.stream = torch.tensor(xxhash.xxh3_64_intdigest(name.encode()) >> 1)


def _kept(rows_R1: Tensor, width: int, rate: float) -> Tensor:
    """-> kept_RC, booleans that are true with probability 1 - rate."""
    channels_C = torch.arange(width, dtype=torch.int32, device=rows_R1.device)
    threshold = round(rate * 2**32) - 2**31
    if torch.compiler.is_compiling():  # the compiler fuses it all: nothing is held
        return _hash(rows_R1, channels_C) >= threshold
    rows = max(1, CHUNK.get(rows_R1.device.type, CHUNK["cuda"]) // width)
    return torch.cat([_hash(chunk, channels_C) >= threshold for chunk in rows_R1.split(rows)])


def _hash(rows_R1: Tensor, channels_C: Tensor) -> Tensor:
    """-> int32 hashes_RC, from 63 bits of each row: one half is added to the channel, the other multiplies the sum.

    The channel meets an xor first: an index that is multiplied past its type is undefined to the C++ that torch.compile writes.
    """
    added = (rows_R1 >> 32).int()
    factor = ((rows_R1 << 32) >> 32).int() | 1
    hashes = (channels_C ^ added).mul_(factor)
    hashes ^= (hashes >> 15).bitwise_and_(0x1FFFF)
    hashes *= _FINAL
    hashes ^= (hashes >> 16).bitwise_and_(0xFFFF)
    return hashes


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer: a bijection of int64 in which each bit of x moves every bit of the result."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX[0]
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX[1]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
