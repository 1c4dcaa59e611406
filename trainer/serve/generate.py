"""Text from a trained decoder, token by token.

Shapes: B = 1 batch, T time, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from manta.data.errors import InputError
from manta.trainer.model.attention import Cache
from manta.trainer.model.decoder import Decoder
from manta.trainer.model.gpt2 import GPT2
from manta.trainer.pretrained.load import load_pretrained
from manta.trainer.run_directory import RunDirectory

COLDEST = 1e-6  # below it logits that are divided by it are infinite


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8  # 0, or what is as good as 0, takes the likeliest
    top_k: int | None = None  # draw from the k likeliest
    top_p: float | None = None  # draw from the likeliest that together have this probability (Holtzman et al. 2020)
    seed: int = 1


def write(home: RunDirectory, prompt: str, *, count: int, sampling: Sampling) -> Iterator[str]:
    """Text from the newest checkpoint of a run, or from an imported model, the prompt first, as it is drawn.

    Raises InputError where the model is none that writes.
    """
    trained = load_pretrained(home)
    model = trained.model
    if not isinstance(model, Decoder):
        raise InputError(f"{home.path}: model.family: got {trained.config.family!r}, wants a decoder, llama or gpt2: others write no text")
    end = trained.tokenizer.end_of_text
    ids = [int(token) for token in trained.tokenizer.encode([prompt])[0]]
    shown = prompt
    yield prompt
    # An empty prompt begins a document: after the end of another.
    for token in generate(model, ids or [end], count=count, vocabulary=trained.tokenizer.vocabulary, end=end, sampling=sampling):
        ids.append(token)
        text = trained.tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # half a character
            yield text[len(shown) :]
            shown = text


@torch.inference_mode()
def generate(model: Decoder, prompt: list[int], *, count: int, vocabulary: int, end: int, sampling: Sampling) -> Iterator[int]:
    """Up to `count` new tokens after `prompt` (not empty), until `end` is drawn. Ids from `vocabulary` up are padding, never drawn.

    Learned positions come to an end: there, and of a longer prompt, the last half of what they hold is read anew from position 0.
    """
    device = model.head.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    limit = model.position_embedding.num_embeddings if isinstance(model, GPT2) else None
    ids, read = list(prompt), 0
    caches = [Cache() for _ in model.blocks]
    for _ in range(count):
        if limit is not None and len(ids) > limit:
            ids, read = ids[-max(1, limit // 2) :], 0
            caches = [Cache() for _ in model.blocks]
        tokens_BT = torch.tensor([ids[read:]], device=device)
        logits_V = model.logits(tokens_BT, first=read, caches=caches)[0, -1, :vocabulary].float()
        read = len(ids)
        token = draw(logits_V, sampling, generator)
        if token == end:
            return
        yield token
        ids.append(token)


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token."""
    if sampling.temperature < COLDEST:
        return int(logits_V.argmax())
    logits, order = (logits_V / sampling.temperature).sort(descending=True)
    if sampling.top_k is not None:
        logits = logits[: sampling.top_k]
    probabilities = logits.softmax(dim=0)
    if sampling.top_p is not None:
        before = probabilities.cumsum(dim=0) - probabilities  # the likeliest has 0 before it, and always stays
        probabilities = probabilities.where(before < sampling.top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
