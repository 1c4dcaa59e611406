"""Examples depend on text, seed and sample number alone, and are exactly what the papers define."""

from pathlib import Path

import numpy as np
import pytest
from example_cases import END, FIELDS, ONLY, bins, digest, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import SMALL, config, documents, write_lines

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.objectives.causal import causal_examples
from manta.data.objectives.examples import IGNORED, Examples, merge_documents, number_documents
from manta.data.prepare import prepare
from manta.data.sampling.order import Order
from manta.data.sampling.samples import Samples
from manta.data.shards.manifest import PreparedData
from manta.data.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_lines(tmp_path_factory.mktemp("source") / "lines.jsonl", ["[MASK] [SEP] <|endoftext|>", *documents(300)])


@pytest.fixture(scope="module")
def settings_of(source, tmp_path_factory) -> dict[str, DataConfig]:
    directory = tmp_path_factory.mktemp("corpora")
    kinds = {"causal": {}, "separate": {"separate_documents": True}, "masked": {"objective": "masked"}}
    return {name: config(directory, source, sequence_length=64, **kind) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def prepared(settings_of) -> dict[str, PreparedData]:
    return {name: prepare.prepare(data, SMALL) for name, data in settings_of.items()}


@pytest.fixture(scope="module")
def opened(settings_of, prepared) -> dict[str, Samples]:
    return {name: Samples(prepared[name], data, SMALL, seed=7) for name, data in settings_of.items()}


@pytest.mark.parametrize("kind", ["causal", "separate", "masked"])
@settings(deadline=None, max_examples=50)
@given(numbers=st.lists(st.integers(0, 2**40), min_size=1, max_size=9), data=st.data())
def test_an_example_does_not_depend_on_its_batch(opened, kind, numbers, data):
    samples = opened[kind]
    together = rows(samples.train(np.array(numbers)))
    assert together == [rows(samples.train(np.array([number])))[0] for number in numbers]
    indices = data.draw(st.lists(st.integers(0, samples.validation_windows - 1), min_size=1, max_size=9))
    assert rows(samples.validation(np.array(indices))) == [rows(samples.validation(np.array([index])))[0] for index in indices]


@pytest.mark.parametrize("kind", ["causal", "separate", "masked"])
def test_arrays_have_their_types_and_shapes(opened, kind):
    for examples in (opened[kind].train(np.arange(5)), opened[kind].validation(np.arange(3))):
        count = len(examples.samples)
        present = {name for name in FIELDS if getattr(examples, name) is not None}
        more = {"causal": set(), "separate": {"documents"}, "masked": {"segments", "next_sentence"}}[kind]
        assert present == {"tokens", "targets", "positions", "samples"} | more
        for name in present:
            array = getattr(examples, name)
            assert array.dtype == np.int64
            assert array.flags.writeable  # torch warns about read-only memory
            assert array.shape == ((count,) if name in {"samples", "next_sentence"} else (count, 64))


def test_a_causal_example_by_hand():
    (row,) = rows(causal_examples(np.array([[7, END, 8, 9, END]]), ONLY + 3))
    assert (row["tokens"], row["targets"], row["positions"]) == ([7, END, 8, 9], [END, 8, 9, END], [0, 1, 2, 3])
    assert row["samples"] == 3


def separate(text_KW: np.ndarray) -> Examples:
    return causal_examples(text_KW, np.arange(len(text_KW)), number_documents(text_KW, END))


def test_separate_documents_by_hand():
    _ = IGNORED
    (row,) = rows(separate(np.array([[7, 8, END, 9, END, END, 5, 6, 7]])))
    assert row["tokens"] == [7, 8, END, 9, END, END, 5, 6]
    assert row["targets"] == [8, END, _, END, _, _, 6, 7]
    assert row["documents"] == [0, 0, 0, 1, 1, 2, 3, 3]
    assert row["positions"] == [0, 1, 2, 0, 1, 0, 0, 1]


@given(window=st.lists(st.sampled_from([END, 7, 8]), min_size=2, max_size=40))
def test_separate_documents_by_definition(window):
    (row,) = rows(separate(np.array([window])))
    document = position = 0
    for at, token in enumerate(window[:-1]):
        assert (row["documents"][at], row["positions"][at]) == (document, position)
        assert row["targets"][at] == (IGNORED if token == END else window[at + 1])
        document, position = (document + 1, 0) if token == END else (document, position + 1)


def test_padding_predicts_nothing_and_nothing_predicts_it():
    _ = IGNORED
    text_KW, documents_KW = bins([[7, 8, END], [9, 5, END]], [[7, 8, 9, 6, 5, 7, 8, END]], width=9)
    first, second = rows(causal_examples(text_KW, np.arange(2), documents_KW))
    assert first["tokens"] == [7, 8, END, 9, 5, END, END, END]
    assert first["targets"] == [8, END, _, 5, END, _, _, _]
    assert first["positions"] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert first["documents"] == [0, 0, 0, 1, 1, 1, -1, -1]
    assert second["targets"] == [8, 9, 6, 5, 7, 8, END, _]
    first, _second = rows(causal_examples(text_KW, np.arange(2), merge_documents(documents_KW)))
    assert first["targets"] == [8, END, 9, 5, END, _, _, _]
    assert first["positions"] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert first["documents"] == [0, 0, 0, 0, 0, 0, -1, -1]


def test_masks_depend_on_epoch_and_seed(opened, prepared, settings_of):
    samples = opened["masked"]
    total = len(samples.sampler.sources[0].dataset)
    epoch = np.arange(total)
    _, windows = Order(total, seed=7)(np.concatenate([epoch, epoch + total]))
    examples = samples.train(np.concatenate([epoch, epoch + total]))
    twice = [np.flatnonzero(windows == window) for window in range(30)]
    assert all(len(pair) == 2 for pair in twice)
    assert all((examples.targets[a] != examples.targets[b]).any() for a, b in twice)
    again = Samples(prepared["masked"], settings_of["masked"], SMALL, seed=7)
    assert rows(again.train(epoch[:20])) == rows(samples.train(epoch[:20]))
    other = Samples(prepared["masked"], settings_of["masked"], SMALL, seed=8)
    assert rows(other.train(epoch[:20])) != rows(samples.train(epoch[:20]))
    assert rows(other.validation(np.arange(5))) == rows(samples.validation(np.arange(5)))


def test_masked_windows_cover_the_text_without_overlap(opened, prepared):
    """Windows of W = T - 3 tokens are consecutive: special tokens around the text replace none of it."""
    samples = opened["masked"]
    text = samples._validation.read(np.arange(samples.validation_windows)).tokens
    assert text.shape[1] == 61
    end = Tokenizer(prepared["masked"].tokenizer).end_of_text
    tokens = np.fromfile(next(Path(prepared["masked"].corpora[0]).glob("*.validation.bin")), dtype=np.uint16)
    assert sorted(text.tolist()) == sorted(tokens[: text.size].reshape(text.shape).tolist())
    assert end in text


def test_causal_examples_are_frozen():
    text_KW, numbers = np.random.RandomState(3).randint(0, 9, (20, 65)), np.arange(20)
    assert digest(causal_examples(text_KW, numbers)) == "f02e7eb70e3145a2"
    assert digest(separate(text_KW)) == "e288a5882dbd1c68"


def test_a_masked_objective_trains_another_tokenizer_and_corpus(prepared, settings_of):
    assert prepared["causal"] == prepared["separate"]
    assert prepared["masked"].tokenizer != prepared["causal"].tokenizer
    assert not set(prepared["masked"].corpora) & set(prepared["causal"].corpora)
    assert {name: prepare.find_prepared(data, SMALL) for name, data in settings_of.items()} == prepared


def test_masked_and_causal_share_a_corpus_if_the_tokenizer_suits_both(prepared, source, tmp_path):
    tokens = TokenizerConfig(file=prepared["masked"].tokenizer)
    made = prepare.prepare(config(tmp_path, source, objective="masked"), tokens)
    assert prepare.find_prepared(config(tmp_path, source), tokens) == made
    assert made.fingerprint == prepared["masked"].fingerprint


def test_an_unsuitable_tokenizer_is_refused_before_anything_is_written(prepared, source, tmp_path):
    data = config(tmp_path / "corpora", source, objective="masked")
    file = prepared["causal"].tokenizer
    with pytest.raises(InputError) as caught:
        prepare.prepare(data, TokenizerConfig(file=file))
    assert str(caught.value).startswith(
        f"{file}: expected [CLS] [SEP] [MASK] [PAD] (or <s> </s> <mask> <pad>) for data.objective masked, got no token [CLS] or <s>"
    )
    with pytest.raises(InputError) as caught:
        prepare.prepare(data, TokenizerConfig(vocabulary=260))
    expected = "at least 261 (256 bytes and <|endoftext|> [CLS] [MASK] [PAD] [SEP])"
    assert str(caught.value) == f"tokenizer.vocabulary: expected {expected}, got 260. Raise it."
    assert not (tmp_path / "corpora").exists()


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A tokenizer.json like BERT's: word pieces, lower case, no end-of-text token, and a post-processor."""
    from tokenizers import Tokenizer as Reference
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    reference = Reference(models.WordPiece(unk_token="[UNK]"))
    reference.normalizer = normalizers.BertNormalizer()
    reference.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    reference.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    reference.train_from_iterator(documents(100), trainer)
    reference.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    path = tmp_path_factory.mktemp("bert") / "tokenizer.json"
    reference.save(str(path))
    return path


def test_a_bert_tokenizer_ends_documents_with_its_sep(bert, source, tmp_path):
    tokens = TokenizerConfig(file=bert, end_of_text="[SEP]")
    data = config(tmp_path, source, objective="masked", sequence_length=32)
    prepared = prepare.prepare(data, tokens)
    samples = Samples(prepared, data, tokens, seed=1)
    windows = samples.sampler.sources[0].dataset
    text = np.concatenate([windows.read(np.arange(len(windows))).tokens, samples._validation.read(np.arange(3)).tokens])
    assert set(text[text < 5]) == {1, 3}  # unknown words and the ends of documents: no text became [MASK]
    examples = samples.train(np.arange(200))
    assert (examples.tokens[:, 0] == 2).all()
    assert (examples.tokens[:, -1] == 3).all()
    assert (examples.targets[examples.targets != IGNORED] >= 5).all()
    assert (examples.tokens == 4).any()
    (ids,) = Tokenizer(bert, end_of_text="[SEP]").encode(["etaoin [MASK] [SEP] [CLS]"])
    assert not set(ids.tolist()) & {2, 3, 4}
