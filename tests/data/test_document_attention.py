"""With separate documents, the model computes a token from its own document alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from example_cases import SPECIAL, V, bins
from parity import MODELS, model
from torch import Tensor

from manta.data.objectives.causal import causal_examples, fill_in_the_middle
from manta.data.objectives.examples import Examples, Tokens, number_documents, sample_keys
from manta.data.objectives.masked import FRAME, draw_pairs, frame_next_sentence, frame_sentence_order, frame_text, mask_tokens
from manta.data.shards.windows import Windows
from manta.data.tokenizer.tokenizer import FimTokens
from manta.trainer.dataloader.batch import IGNORED, Batch
from manta.trainer.model import attention
from manta.trainer.model.bert import Bert
from manta.trainer.model.decoder import Decoder
from manta.trainer.model.transformer import Transformer

T, SAMPLES, SEED = 32, np.arange(6), 3  # the length of parity's models
KEYS = sample_keys(SAMPLES, SEED)
END = SPECIAL.end_of_text
MARKS = FimTokens(prefix=V, suffix=V + 1, middle=V + 2)


def cut(width: int) -> tuple[Tokens, Tokens]:
    """Windows of running text, which start and end inside documents."""
    rng = np.random.default_rng(0)
    text_KW = rng.integers(SPECIAL.pad + 1, V, (len(SAMPLES), width))
    text_KW[rng.random(text_KW.shape) < 0.15] = END
    return text_KW, number_documents(text_KW, END)


def best_fit(width: int) -> tuple[Tokens, Tokens]:
    """Whole documents side by side; two of three samples are padded."""
    rng = np.random.default_rng(0)
    found = [[[*rng.integers(SPECIAL.pad + 1, V, n), END] for n in (6, 3, width - 12 - k % 3 * 4)] for k in range(len(SAMPLES))]
    return bins(*found, width=width)


def next_tokens(text_KW: Tokens, documents_KW: Tokens) -> Examples:
    return causal_examples(text_KW, SAMPLES, documents_KW)


def filled(text_KW: Tokens, documents_KW: Tokens) -> Examples:
    moved = fill_in_the_middle(text_KW, documents_KW, KEYS, rate=0.7, suffix_first=0.5, marks=MARKS, end_of_text=END)
    return causal_examples(moved[0], SAMPLES, moved[1])


def masked_text(text_KW: Tokens, documents_KW: Tokens) -> Examples:
    framed = frame_text(text_KW, SAMPLES, SPECIAL, documents_KW)
    return mask_tokens(framed, KEYS, share=0.3, special=SPECIAL, whole_words=True)


def masked_next_sentence(text_KW: Tokens, documents_KW: Tokens) -> Examples:
    following, label = draw_pairs(KEYS, SAMPLES, len(SAMPLES))
    documents = documents_KW, documents_KW[following]
    windows = Windows(tokens=text_KW, second=text_KW[following], next_sentence=label)
    framed = frame_next_sentence(windows, SAMPLES, KEYS, SPECIAL, documents)
    return mask_tokens(framed, KEYS, share=0.3, special=SPECIAL)


def masked_sentence_order(text_KW: Tokens, documents_KW: Tokens) -> Examples:
    return mask_tokens(frame_sentence_order(text_KW, SAMPLES, KEYS, SPECIAL, documents_KW), KEYS, share=0.3, special=SPECIAL)


Packing = Callable[[int], tuple[Tokens, Tokens]]
Objective = Callable[[Tokens, Tokens], Examples]
CASES: list[tuple[str, Packing, Objective, int]] = [
    *(
        (name, packing, objective, T + 1)
        for name in ("llama", "gpt2")
        for packing in (cut, best_fit)
        for objective in (next_tokens, filled)
    ),
    *(("bert", packing, masked_text, T - FRAME["none"]) for packing in (cut, best_fit)),
    *(("bert", cut, objective, T - FRAME["next_sentence"]) for objective in (masked_next_sentence, masked_sentence_order)),
]
PADDED = [case for case in CASES if case[1] is best_fit]


@pytest.fixture(scope="module")
def models() -> dict[str, Transformer]:
    found = {name: model(name).eval() for name in ("llama", "gpt2", "bert")}
    found["llama"].config = MODELS["llama"].model_copy(update={"sliding_window": None})  # it would hide tokens that documents should hide
    return found


@torch.no_grad()
def logits(module: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits of each token [K, T, V], and of each pair [K, 2] if the model has any."""
    if isinstance(module, Bert):
        return module.logits(batch)
    assert isinstance(module, Decoder)
    return module.head.logits(module.hidden(batch)[0]), torch.zeros(len(batch.tokens), 2)


@pytest.mark.parametrize("kernel", ["plain", "sdpa"])
@pytest.mark.parametrize(
    ("name", "packing", "objective", "width"), CASES, ids=[f"{name}-{p.__name__}-{o.__name__}" for name, p, o, _ in CASES]
)
def test_no_token_attends_across_documents(name, packing, objective, width, kernel, models, monkeypatch):
    monkeypatch.setattr(attention, "MATMUL_LIMIT", 0 if kernel == "sdpa" else 256)
    batch = Batch.from_examples(objective(*packing(width)), seed=SEED)
    assert batch.documents is not None
    (before, pairs_before), (together, pairs_together) = (logits(models[name], one) for one in (batch, replace(batch, documents=None)))
    numbers = batch.documents.unique().tolist()
    assert len(numbers) > 2
    crossings = 0
    for number in numbers:
        inside = batch.documents == number
        changed = replace(batch, tokens=torch.where(inside, (batch.tokens + 1) % V, batch.tokens))
        after, pairs_after = logits(models[name], changed)
        moved = (after - before).abs().amax(dim=2)
        assert moved[~inside].max() == 0, "bitwise"
        assert moved[inside].min() > 1e-3
        elsewhere = ~inside[:, 0]  # [CLS], from which the pair is classified, is in another document
        assert torch.equal(pairs_after[elsewhere], pairs_before[elsewhere])

        after, pairs_after = logits(models[name], replace(changed, documents=None))
        moved = (after - together).abs().amax(dim=2)
        crossed = ~inside & (inside.any(dim=1, keepdim=True) if name == "bert" else inside.cumsum(dim=1) > 0)
        crossings += int(crossed.sum())
        assert (moved[crossed] > 0).all(), "the control: without documents, logits change"
        if name == "bert":
            assert (pairs_after != pairs_together)[inside.any(dim=1)].all()
    assert crossings > 100


@pytest.mark.parametrize(("name", "packing", "objective", "width"), PADDED, ids=[f"{n}-{o.__name__}" for n, _, o, _ in PADDED])
def test_a_loss_does_not_depend_on_padding(name, packing, objective, width, models):
    batch = Batch.from_examples(objective(*packing(width)), seed=SEED)
    assert batch.real is not None
    assert not batch.real.all()
    assert (batch.targets[~batch.real] == IGNORED).all()
    changed = replace(batch, tokens=torch.where(batch.real, batch.tokens, (batch.tokens + 1) % V))
    divisors = models[name].counts(batch).float().clamp(min=1)
    assert torch.equal(models[name](batch, divisors), models[name](changed, divisors))
