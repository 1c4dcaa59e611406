"""Text generation: a cache changes nothing, and learned positions may run out."""

import pytest
import torch
from saved_models import EQUIVALENT, random_run

from manta.data.errors import InputError
from manta.trainer.pretrained.load import load_pretrained
from manta.trainer.serve.generate import Sampling, generate, generate_text


@pytest.mark.parametrize("case", ["gpt2", "llama", "window", "experts", "experts balanced by a bias"])
def test_a_cache_generates_the_same_tokens_as_none(case, tmp_path):
    model = load_pretrained(random_run(tmp_path, **EQUIVALENT[case][0])).model
    tokens = list(generate(model, [5, 17, 99], count=16, vocabulary=270, end=-1, sampling=Sampling(temperature=0)))
    uncached = [5, 17, 99]
    for _ in range(16):
        uncached.append(int(model.logits(torch.tensor([uncached]))[0, -1, :270].argmax()))
    assert tokens == uncached[3:]


def test_generation_continues_when_learned_positions_run_out(tmp_path):
    model = load_pretrained(random_run(tmp_path, family="gpt2", positions=32)).model
    sampling = Sampling(temperature=0)
    tokens = [1, *generate(model, [1], count=40, vocabulary=270, end=-1, sampling=sampling)]
    assert len(tokens) == 41
    recomputed = generate(model, tokens[17:33], count=1, vocabulary=270, end=-1, sampling=sampling)
    assert tokens[33] == next(recomputed), "the last half is read again"
    assert len(list(generate(model, [1] * 100, count=2, vocabulary=270, end=-1, sampling=sampling))) == 2


def test_bert_generates_no_text(tmp_path):
    with pytest.raises(InputError, match="expected a decoder, llama or gpt2"):
        next(generate_text(random_run(tmp_path, family="bert"), "one", count=1, sampling=Sampling()))
