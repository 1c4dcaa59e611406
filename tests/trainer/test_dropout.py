"""Dropout masks depend only on seed, sample, module and position, and look random."""

import math

import pytest
import torch
from torch import nn

from manta.trainer.model import dropout
from manta.trainer.model.dropout import AttentionDropout, Dropout, DropoutKeys, name_dropouts

GOLDEN = [
    "11010101011111110000100011100010",
    "01111001101000101101011111111001",
    "11011101111011110110001111011001",
    "10111100101001101001111010010110",
]
GOLDEN_WEIGHTS = "0001011010100001100000111000010000001111"


class Parts(nn.Module):
    def __init__(self, rate=0.1):
        super().__init__()
        self.first, self.second, self.attention = Dropout(rate), Dropout(rate), AttentionDropout(rate)
        name_dropouts(self)


def dropout_keys(samples=4, length=256, *, first=0):
    return DropoutKeys(torch.arange(first, first + samples) * 7919, torch.arange(length).expand(samples, -1))


def mask(module, keys, channels=256):
    """Return 1 for kept and 0 for dropped elements: [B, T, C]."""
    return (module(torch.ones(*keys.rows_BT.shape, channels), keys) > 0).float()


def standardized(kept, rate):
    return (kept - (1 - rate)) / math.sqrt(rate * (1 - rate))


def correlation(one, other, rate):
    """Return the correlation of two masks, in standard deviations of that of random masks."""
    return float((standardized(one, rate) * standardized(other, rate)).sum() / math.sqrt(one.numel()))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_rate_holds_overall_per_row_and_per_channel(rate):
    z = standardized(mask(Parts(rate).first, dropout_keys()), rate).flatten(0, 1)
    rows, channels = z.shape
    assert abs(float(z.sum())) / math.sqrt(z.numel()) < 4
    assert abs(float(z.sum(1).square().mean()) / channels - 1) < 6 * math.sqrt(2 / rows) + 0.05
    assert abs(float(z.sum(0).square().mean()) / rows - 1) < 6 * math.sqrt(2 / channels) + 0.05


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_neighboring_samples_positions_and_channels_are_independent(rate, dimension):
    kept = mask(Parts(rate).first, dropout_keys(16, 128))
    for distance in (1, 2, 3, 4, 8):
        length = kept.shape[dimension] - distance
        assert abs(correlation(kept.narrow(dimension, 0, length), kept.narrow(dimension, distance, length), rate)) < 4.5


def test_no_two_channels_are_correlated():
    z = standardized(mask(Parts(0.1).first, dropout_keys(64, 256), channels=128), 0.1).flatten(0, 1)
    pairs = (z.T @ z / math.sqrt(len(z))).fill_diagonal_(0)
    assert pairs.abs().max() < 6
    spread = torch.linalg.eigvalsh(z.T @ z / len(z))  # of independent columns (Marchenko and Pastur 1967)
    edge = math.sqrt(128 / len(z))
    assert (1 - edge) ** 2 - 0.02 < spread.min()
    assert spread.max() < (1 + edge) ** 2 + 0.02


def test_modules_have_independent_masks():
    parts = Parts()
    first, second = mask(parts.first, dropout_keys()), mask(parts.second, dropout_keys())
    assert abs(correlation(first, second, 0.1)) < 4.5
    assert abs(correlation(first, mask(parts.first, dropout_keys()), 0.1)) > 100  # the control


def test_mask_is_the_same_for_a_part_of_the_batch_or_sequence():
    module, whole = Parts().first, dropout_keys(4, 64)
    kept = mask(module, whole)
    for samples, positions in ((slice(2, 3), slice(None)), (slice(None), slice(16, 32)), (slice(1, 4), slice(63, 64))):
        part = DropoutKeys((torch.arange(4) * 7919)[samples], torch.arange(64).expand(4, -1)[samples, positions])
        assert torch.equal(mask(module, part), kept[samples, positions])
    assert not torch.equal(mask(module, dropout_keys(1, 64, first=1)), kept[:1])


def test_attention_mask_is_the_same_for_a_share_of_heads_or_samples():
    module = Parts(0.5).attention
    weights = torch.ones(4, 8, 16, 16)
    whole = module(weights, dropout_keys(4, 16))
    module.first_head = 6
    assert torch.equal(module(weights[:2, :2], dropout_keys(2, 16)), whole[:2, 6:])
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert not torch.equal(whole[:, :, 0], whole[:, :, 1])


def test_attention_weights_are_dropped_independently_at_the_rate():
    z = standardized((Parts().attention(torch.ones(4, 8, 64, 64), dropout_keys(4, 64)) > 0).float(), 0.1)
    assert abs(float(z.sum())) / math.sqrt(z.numel()) < 4
    for dimension in range(4):
        length = z.shape[dimension] - 1
        pairs = z.narrow(dimension, 0, length) * z.narrow(dimension, 1, length)
        assert abs(float(pairs.sum())) / math.sqrt(pairs.numel()) < 4.5


@pytest.mark.parametrize("chunk", [1, 1000])
def test_chunk_size_does_not_change_the_mask(chunk, monkeypatch):
    before = mask(Parts().first, dropout_keys(3, 50), channels=97)
    monkeypatch.setattr(dropout, "CHUNK", {"cpu": chunk, "cuda": chunk})
    assert torch.equal(mask(Parts().first, dropout_keys(3, 50), channels=97), before)


def python_hash(key, position, stream, channel):
    """The same hash with Python's integers."""

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    row = mix(mix(mix(key ^ 0x9E3779B97F4A7C15) ^ position) ^ stream)
    x = (channel ^ row >> 32) * (row % 2**32 | 1) % 2**32
    x = (x ^ x >> 15) * 0x7FEB352D % 2**32
    return x ^ x >> 16


def test_hash_equals_exact_integer_arithmetic():
    module, keys = Parts().first, dropout_keys(2, 3)
    hashes = dropout._hash(dropout._mix(keys.rows_BT ^ module.stream).reshape(-1, 1), torch.arange(5, dtype=torch.int32))
    expected = [[python_hash(b * 7919, t, int(module.stream), c) for c in range(5)] for b in range(2) for t in range(3)]
    assert (hashes.long() % 2**32).tolist() == expected


def test_splitmix_returns_the_published_first_number():
    assert int(dropout._mix(torch.tensor([0x9E3779B97F4A7C15 - 2**64]))) % 2**64 == 0xE220A8397B1DCDAF


def test_masks_equal_those_of_earlier_versions():
    module, keys = Parts(0.5), DropoutKeys(torch.tensor([2**62 + 12345, -1]), torch.tensor([[0, 1], [1023, 2**31]]))
    rows = ["".join(str(int(bit)) for bit in row) for row in mask(module.second, keys, channels=32).flatten(0, 1)]
    assert rows == GOLDEN
    weights = module.attention(torch.ones(1, 2, 4, 5), DropoutKeys(torch.tensor([7]), torch.arange(5)[None]))
    assert "".join(str(int(weight > 0)) for weight in weights.flatten()) == GOLDEN_WEIGHTS


def test_expectation_and_gradient_are_preserved():
    module = Parts(0.25).first
    x = torch.randn(4, 64, 32, dtype=torch.float64, requires_grad=True)
    kept = mask(module, dropout_keys(4, 64), channels=32).double()
    out = module(x, dropout_keys(4, 64))
    torch.testing.assert_close(out, x * kept / 0.75)
    out.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.75)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_does_not_change_the_mask(dtype):
    out = Parts().first(torch.ones(2, 8, 16, dtype=dtype), dropout_keys(2, 8))
    assert out.dtype == dtype
    assert torch.equal((out > 0).float(), mask(Parts().first, dropout_keys(2, 8), channels=16))


def test_nothing_is_dropped_in_evaluation_without_keys_or_at_rate_zero():
    x, parts = torch.randn(2, 8, 16), Parts()
    assert parts.first(x, None) is x
    assert parts.attention.bind(None) is None
    assert Parts(0.0).first(x, dropout_keys(2, 8)) is x
    assert Parts(0.0).attention.bind(dropout_keys(2, 8)) is None
    parts.eval()
    assert parts.first(x, dropout_keys(2, 8)) is x
    assert parts.attention.bind(dropout_keys(2, 8)) is None
    assert parts.train().attention.bind(dropout_keys(2, 8)) is not None


def test_dropout_without_a_name_fails():
    with pytest.raises(AssertionError, match="name_dropouts"):
        Dropout(0.1)(torch.ones(1, 2, 3), dropout_keys(1, 2))


def test_checkpoints_do_not_contain_dropout_streams():
    assert Parts().state_dict() == {}


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="torch's headers are in a path with a space, which torch.compile cannot read on a CPU")
@pytest.mark.timeout(120)
def test_compiled_dropout_has_the_same_mask():
    parts, keys = Parts(0.5), dropout_keys(3, 50)
    torch.compiler.reset()

    def both(x, weights):
        attention_dropout = parts.attention.bind(keys)
        assert attention_dropout is not None
        return parts.first(x, keys), parts.second(x, keys), attention_dropout(weights)

    inputs = torch.randn(3, 50, 97), torch.rand(3, 2, 50, 50)
    compiled = torch.compile(both, fullgraph=True)
    for output, expected in zip(compiled(*inputs), both(*inputs), strict=True):
        torch.testing.assert_close(output, expected)
        assert torch.equal(output == 0, expected == 0)
