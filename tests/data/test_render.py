"""Rendered examples contain each token once, and each target of a masked objective."""

import numpy as np
import pytest
from sample_cases import WAYS, config_of, open_way, write_sources
from small_corpora import SMALL

from manta.data.objectives.examples import IGNORED
from manta.data.objectives.render import Renderer
from manta.data.prepare import prepare


@pytest.mark.parametrize("way", WAYS)
def test_each_token_of_an_example_is_rendered_once(tmp_path, way):
    folder = write_sources(tmp_path)
    samples = open_way(folder, **WAYS[way])
    separated = open_way(folder, **WAYS[way] | {"separate_documents": True})
    file = prepare.find_prepared(config_of(folder, **WAYS[way]), SMALL).tokenizer
    is_masked = WAYS[way].get("objective") == "masked"
    renderer = Renderer(file, end_of_text="<|endoftext|>", masked=is_masked)
    examples, other = (one.train(np.arange(40)) for one in (samples, separated))
    decode = renderer._tokenizer.decode
    for row, rendered in enumerate(renderer(examples, other)):
        tokens, targets = examples.tokens[row], examples.targets[row]
        has_last_target = not is_masked and targets[-1] != IGNORED
        assert sum(document.tokens for document in rendered.documents) + rendered.padding == len(tokens) + has_last_target
        pieces = [piece for document in rendered.documents for piece in document.pieces]
        predicted = [piece for piece in pieces if piece.kind in {"hidden", "replaced", "kept"}]
        assert len(predicted) == is_masked * (targets != IGNORED).sum()
        wanted = [decode([target]).strip() for target in targets[targets != IGNORED]]
        assert [piece.wanted.strip() for piece in predicted] == wanted[: len(predicted)]
        if not is_masked:
            real = [*tokens[: len(tokens) - rendered.padding].tolist(), *targets[-1:][: int(has_last_target)].tolist()]
            assert "".join(document.text for document in rendered.documents) == decode(real)
            assert all(document.pieces[-1].text == "<|endoftext|>" for document in rendered.documents[:-1]) or "packed" in way
