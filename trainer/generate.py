"""Text from a trained model, token by token.

Shapes: B = 1 batch, T time, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from manta.trainer.model.attention import Cache
from manta.trainer.model.gpt import GPT
from manta.trainer.pretrained import load_pretrained
from manta.trainer.rundir import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8  # 0 takes the likeliest
    top_k: int | None = None  # draw from the k likeliest
    top_p: float | None = None  # draw from the likeliest that together have this probability (Holtzman et al. 2020)
    seed: int = 1


def write(home: RunDirectory, prompt: str, *, count: int, sampling: Sampling) -> Iterator[str]:
    """Text from a run's newest checkpoint, the prompt first, as it is drawn."""
    trained = load_pretrained(home)
    end = trained.tokenizer.end_of_text
    ids = [int(token) for token in trained.tokenizer.encode([prompt])[0]]
    shown = prompt
    yield prompt
    # An empty prompt begins a document: after the end of another.
    for token in generate(trained.model, ids or [end], count=count, vocabulary=trained.tokenizer.vocabulary, end=end, sampling=sampling):
        ids.append(token)
        text = trained.tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # half a character
            yield text[len(shown) :]
            shown = text


@torch.inference_mode()
def generate(model: GPT, prompt: list[int], *, count: int, vocabulary: int, end: int, sampling: Sampling) -> Iterator[int]:
    """Up to `count` new tokens after `prompt` (not empty), until `end` is drawn. Ids from `vocabulary` up are padding, never drawn."""
    device = model.head_weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    caches = [Cache() for _ in model.layers]
    tokens_BT, first = torch.tensor([prompt], device=device), 0
    for _ in range(count):
        logits_V = model.logits(tokens_BT, first=first, caches=caches)[0, -1, :vocabulary].float()
        token = draw(logits_V, sampling, generator)
        if token == end:
            return
        yield token
        first += tokens_BT.shape[1]
        tokens_BT = torch.tensor([[token]], device=device)


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits, order = (logits_V / sampling.temperature).sort(descending=True)
    if sampling.top_k is not None:
        logits = logits[: sampling.top_k]
    probabilities = logits.softmax(dim=0)
    if sampling.top_p is not None:
        before = probabilities.cumsum(dim=0) - probabilities  # the likeliest has 0 before it, and always stays
        probabilities = probabilities.where(before < sampling.top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
