"""What is dropped depends on nothing but where it stands, and looks like chance."""

import math

import pytest
import torch
from torch import nn

from manta.trainer.model import dropout
from manta.trainer.model.dropout import AttentionDropout, Dropout, Noise, name_dropouts

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


def noise(samples=4, length=256, *, first=0):
    return Noise(torch.arange(first, first + samples) * 7919, torch.arange(length).expand(samples, -1))


def mask(module, drawn, channels=256):
    """1 where kept, 0 where dropped: [B, T, C]."""
    return (module(torch.ones(*drawn.rows_BT.shape, channels), drawn) > 0).float()


def standardised(kept, rate):
    return (kept - (1 - rate)) / math.sqrt(rate * (1 - rate))


def likeness(one, other, rate):
    """In standard deviations of what chance gives."""
    return float((standardised(one, rate) * standardised(other, rate)).sum() / math.sqrt(one.numel()))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_is_met_overall_in_each_row_and_in_each_channel(rate):
    z = standardised(mask(Parts(rate).first, noise()), rate).flatten(0, 1)
    rows, channels = z.shape
    assert abs(float(z.sum())) / math.sqrt(z.numel()) < 4
    assert abs(float(z.sum(1).square().mean()) / channels - 1) < 6 * math.sqrt(2 / rows) + 0.05
    assert abs(float(z.sum(0).square().mean()) / rows - 1) < 6 * math.sqrt(2 / channels) + 0.05


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("across", [0, 1, 2])
def test_neighbours_are_independent_whether_samples_positions_or_channels(rate, across):
    kept = mask(Parts(rate).first, noise(16, 128))
    for distance in (1, 2, 3, 4, 8):
        apart = kept.shape[across] - distance
        assert abs(likeness(kept.narrow(across, 0, apart), kept.narrow(across, distance, apart), rate)) < 4.5


def test_no_pair_of_channels_goes_together():
    z = standardised(mask(Parts(0.1).first, noise(64, 256), channels=128), 0.1).flatten(0, 1)
    pairs = (z.T @ z / math.sqrt(len(z))).fill_diagonal_(0)
    assert pairs.abs().max() < 6
    spread = torch.linalg.eigvalsh(z.T @ z / len(z))  # of independent columns (Marchenko and Pastur 1967)
    edge = math.sqrt(128 / len(z))
    assert (1 - edge) ** 2 - 0.02 < spread.min()
    assert spread.max() < (1 + edge) ** 2 + 0.02


def test_streams_are_independent():
    parts = Parts()
    first, second = mask(parts.first, noise()), mask(parts.second, noise())
    assert abs(likeness(first, second, 0.1)) < 4.5
    assert abs(likeness(first, mask(parts.first, noise()), 0.1)) > 100  # the control


def test_a_mask_is_the_same_for_a_part_of_the_batch_or_the_sequence():
    module, whole = Parts().first, noise(4, 64)
    kept = mask(module, whole)
    for samples, positions in ((slice(2, 3), slice(None)), (slice(None), slice(16, 32)), (slice(1, 4), slice(63, 64))):
        part = Noise((torch.arange(4) * 7919)[samples], torch.arange(64).expand(4, -1)[samples, positions])
        assert torch.equal(mask(module, part), kept[samples, positions])
    assert not torch.equal(mask(module, noise(1, 64, first=1)), kept[:1])


def test_a_mask_of_attention_is_the_same_for_a_share_of_the_heads_or_the_samples():
    module = Parts(0.5).attention
    weights = torch.ones(4, 8, 16, 16)
    whole = module(weights, noise(4, 16))
    module.first_head = 6
    assert torch.equal(module(weights[:2, :2], noise(2, 16)), whole[:2, 6:])
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert not torch.equal(whole[:, :, 0], whole[:, :, 1])


def test_weights_of_attention_are_dropped_at_the_rate_and_independently():
    z = standardised((Parts().attention(torch.ones(4, 8, 64, 64), noise(4, 64)) > 0).float(), 0.1)
    assert abs(float(z.sum())) / math.sqrt(z.numel()) < 4
    for across in range(4):
        apart = z.shape[across] - 1
        pairs = z.narrow(across, 0, apart) * z.narrow(across, 1, apart)
        assert abs(float(pairs.sum())) / math.sqrt(pairs.numel()) < 4.5


@pytest.mark.parametrize("chunk", [1, 1000])
def test_chunks_change_nothing(chunk, monkeypatch):
    before = mask(Parts().first, noise(3, 50), channels=97)
    monkeypatch.setattr(dropout, "CHUNK", {"cpu": chunk, "cuda": chunk})
    assert torch.equal(mask(Parts().first, noise(3, 50), channels=97), before)


def hash_by_hand(key, place, stream, channel):
    """The whole of it in Python's own integers."""

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    row = mix(mix(mix(key ^ 0x9E3779B97F4A7C15) ^ place) ^ stream)
    x = (channel ^ row >> 32) * (row % 2**32 | 1) % 2**32
    x = (x ^ x >> 15) * 0x7FEB352D % 2**32
    return x ^ x >> 16


def test_the_hash_is_what_exact_integers_give():
    module, drawn = Parts().first, noise(2, 3)
    got = dropout._hash(dropout._mix(drawn.rows_BT ^ module.stream).reshape(-1, 1), torch.arange(5, dtype=torch.int32))
    wanted = [[hash_by_hand(b * 7919, t, int(module.stream), c) for c in range(5)] for b in range(2) for t in range(3)]
    assert (got.long() % 2**32).tolist() == wanted


def test_splitmix_gives_the_published_first_number():
    assert int(dropout._mix(torch.tensor([0x9E3779B97F4A7C15 - 2**64]))) % 2**64 == 0xE220A8397B1DCDAF


def test_masks_are_those_of_every_earlier_run():
    module, drawn = Parts(0.5), Noise(torch.tensor([2**62 + 12345, -1]), torch.tensor([[0, 1], [1023, 2**31]]))
    rows = ["".join(str(int(bit)) for bit in row) for row in mask(module.second, drawn, channels=32).flatten(0, 1)]
    assert rows == GOLDEN
    weights = module.attention(torch.ones(1, 2, 4, 5), Noise(torch.tensor([7]), torch.arange(5)[None]))
    assert "".join(str(int(weight > 0)) for weight in weights.flatten()) == GOLDEN_WEIGHTS


def test_the_expectation_and_the_gradient_stay():
    module = Parts(0.25).first
    x = torch.randn(4, 64, 32, dtype=torch.float64, requires_grad=True)
    kept = mask(module, noise(4, 64), channels=32).double()
    out = module(x, noise(4, 64))
    torch.testing.assert_close(out, x * kept / 0.75)
    out.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.75)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_precision_does_not_change_the_mask(dtype):
    out = Parts().first(torch.ones(2, 8, 16, dtype=dtype), noise(2, 8))
    assert out.dtype == dtype
    assert torch.equal((out > 0).float(), mask(Parts().first, noise(2, 8), channels=16))


def test_nothing_is_dropped_in_evaluation_without_noise_or_at_rate_zero():
    x, parts = torch.randn(2, 8, 16), Parts()
    assert parts.first(x, None) is x
    assert parts.attention.under(None) is None
    assert Parts(0.0).first(x, noise(2, 8)) is x
    assert Parts(0.0).attention.under(noise(2, 8)) is None
    parts.eval()
    assert parts.first(x, noise(2, 8)) is x
    assert parts.attention.under(noise(2, 8)) is None
    assert parts.train().attention.under(noise(2, 8)) is not None


def test_a_dropout_without_a_name_is_no_dropout():
    with pytest.raises(AssertionError, match="name_dropouts"):
        Dropout(0.1)(torch.ones(1, 2, 3), noise(1, 2))


def test_streams_are_no_part_of_a_checkpoint():
    assert Parts().state_dict() == {}


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="torch's headers lie in a path with a space, which torch.compile can not read on a CPU")
@pytest.mark.timeout(120)
def test_compiled_by_the_real_compiler_a_mask_is_the_same():
    parts, drawn = Parts(0.5), noise(3, 50)
    torch.compiler.reset()

    def both(x, weights):
        dropped = parts.attention.under(drawn)
        assert dropped is not None
        return parts.first(x, drawn), parts.second(x, drawn), dropped(weights)

    inputs = torch.randn(3, 50, 97), torch.rand(3, 2, 50, 50)
    compiled = torch.compile(both, fullgraph=True)
    for ours, theirs in zip(compiled(*inputs), both(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(ours == 0, theirs == 0)
