"""Generate text with a trained decoder, token by token.

Shapes: B = 1 batch, T time, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manta.data.errors import InputError
from manta.trainer.model.attention import KVCache
from manta.trainer.model.decoder import Decoder
from manta.trainer.model.gpt2 import GPT2
from manta.trainer.pretrained.load import Pretrained, load_pretrained
from manta.trainer.run_directory import RunDirectory
from manta.trainer.serve.texts import GeneratedText

__all__ = ["Sampling", "generate", "generate_text", "generate_texts"]

MIN_TEMPERATURE = 1e-6  # logits divided by less overflow


class Sampling(NamedTuple):
    """How the next token is sampled."""

    temperature: float = 0.8  # below MIN_TEMPERATURE: the most likely token
    top_k: int | None = None  # sample from the k most likely
    top_p: float | None = None  # sample from the most likely with this total probability (Holtzman et al. 2020)
    seed: int = 1


def generate_text(run_directory: RunDirectory, prompt: str, *, count: int, sampling: Sampling) -> Iterator[str]:
    """Yield the prompt, then text as it is generated, with the newest checkpoint of a run or an imported model.

    count: the most tokens. Raises InputError if the model is not a decoder.
    """
    yield from _stream(load_pretrained(run_directory), prompt, count=count, sampling=sampling)


def generate_texts(run_directory: RunDirectory, prompt: str, *, seeds: Sequence[int], count: int) -> Iterator[GeneratedText]:
    """Yield a text for each seed, all with the newest checkpoint of a run or an imported model, which is loaded once.

    count: the most tokens of each. Raises InputError if the model is not a decoder.
    """
    pretrained = load_pretrained(run_directory)
    for seed in seeds:
        text = "".join(_stream(pretrained, prompt, count=count, sampling=Sampling(seed=seed)))
        yield GeneratedText(step=pretrained.checkpoint.progress.step, seed=seed, prompt=prompt, text=text)


def _stream(pretrained: Pretrained, prompt: str, *, count: int, sampling: Sampling) -> Iterator[str]:
    model, tokenizer = pretrained.model, pretrained.tokenizer
    if not isinstance(model, Decoder):
        path, family = pretrained.run_directory.path, pretrained.config.family
        raise InputError(f"{path}: model.family: expected a decoder, llama or gpt2, got {family!r}. Use another run.")
    end = tokenizer.end_of_text
    ids = [int(token) for token in tokenizer.encode([prompt])[0]]
    yielded = prompt
    yield prompt
    # An empty prompt starts a document, which follows the end of another.
    for token in generate(model, ids or [end], count=count, vocabulary=tokenizer.vocabulary, end=end, sampling=sampling):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # an incomplete character
            yield text[len(yielded) :]
            yielded = text


@torch.inference_mode()
def generate(model: Decoder, prompt: list[int], *, count: int, vocabulary: int, end: int, sampling: Sampling) -> Iterator[int]:
    """Yield up to `count` tokens after `prompt` (not empty), until `end` is sampled. Ids from `vocabulary` up are padding.

    If learned positions run out, the last half of the context is read again from position 0.
    """
    device = model.head.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    limit = model.position_embedding.num_embeddings if isinstance(model, GPT2) else None
    ids, cached = list(prompt), 0
    caches = [KVCache() for _ in model.blocks]
    for _ in range(count):
        if limit is not None and len(ids) > limit:
            ids, cached = ids[-max(1, limit // 2) :], 0
            caches = [KVCache() for _ in model.blocks]
        tokens_BT = torch.tensor([ids[cached:]], device=device)
        logits_V = model.logits(tokens_BT, first=cached, caches=caches)[0, -1, :vocabulary].float()
        cached = len(ids)
        token = sample(logits_V, sampling, generator)
        if token == end:
            return
        yield token
        ids.append(token)


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature < MIN_TEMPERATURE:
        return int(logits_V.argmax())
    logits, order = (logits_V / sampling.temperature).sort(descending=True)
    if sampling.top_k is not None:
        logits = logits[: sampling.top_k]
    probabilities = logits.softmax(dim=0)
    if sampling.top_p is not None:
        more_likely = probabilities.cumsum(dim=0) - probabilities  # 0 for the most likely, which is always kept
        probabilities = probabilities.where(more_likely < sampling.top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
