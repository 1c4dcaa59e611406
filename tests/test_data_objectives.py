"""Examples of an objective: a function of text, seed and number, and exactly what the papers say."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_prepare import SMALL, config, documents, write_lines

from manta.data import prepare
from manta.data.config import DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.hashing import fold, hashed
from manta.data.manifest import Prepared
from manta.data.objectives import IGNORED, Examples, causal, masked, pairs
from manta.data.order import Order
from manta.data.samples import Samples
from manta.data.tokenizer import SpecialTokens, Tokenizer

V, END, CLS, SEP, MASK, PAD = 50, 0, 1, 2, 3, 4
SPECIAL = SpecialTokens(end_of_text=END, cls=CLS, sep=SEP, mask=MASK, pad=PAD, is_text=np.arange(V) > PAD)
FIELDS = Examples.__slots__
ONLY = np.zeros(1, dtype=np.int64)


def rows(examples: Examples) -> list[dict[str, list[int] | int | None]]:
    """Each example by itself."""
    found = {name: getattr(examples, name) for name in FIELDS}
    return [{name: None if value is None else value[k].tolist() for name, value in found.items()} for k in range(len(examples.samples))]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_lines(
        tmp_path_factory.mktemp("source") / "lines.jsonl", ["[MASK] [SEP] <|endoftext|>", *documents(300)]
    )  # the last tokens fill no window


@pytest.fixture(scope="module")
def settings_of(source, tmp_path_factory) -> dict[str, DataConfig]:
    directory = tmp_path_factory.mktemp("corpora")
    kinds = {"causal": {}, "separate": {"separate_documents": True}, "masked": {"objective": "masked"}}
    return {name: config(directory, source, sequence_length=64, **kind) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def prepared(settings_of) -> dict[str, Prepared]:
    return {name: prepare.prepare(data, SMALL) for name, data in settings_of.items()}


@pytest.fixture(scope="module")
def opened(settings_of, prepared) -> dict[str, Samples]:
    return {name: Samples(prepared[name], data, SMALL, seed=7) for name, data in settings_of.items()}


@pytest.mark.parametrize("kind", ["causal", "separate", "masked"])
@settings(deadline=None, max_examples=50)
@given(numbers=st.lists(st.integers(0, 2**40), min_size=1, max_size=9), data=st.data())
def test_an_example_is_the_same_whatever_it_is_asked_with(opened, kind, numbers, data):
    samples = opened[kind]
    together = rows(samples.train(np.array(numbers)))
    assert together == [rows(samples.train(np.array([number])))[0] for number in numbers]
    indices = data.draw(st.lists(st.integers(0, samples.validation_windows - 1), min_size=1, max_size=9))
    assert rows(samples.validation(np.array(indices))) == [rows(samples.validation(np.array([index])))[0] for index in indices]


@pytest.mark.parametrize("kind", ["causal", "separate", "masked"])
def test_every_array_is_whole_and_of_its_type(opened, kind):
    for examples in (opened[kind].train(np.arange(5)), opened[kind].validation(np.arange(3))):
        count = len(examples.samples)
        there = {name for name in FIELDS if getattr(examples, name) is not None}
        more = {"causal": set(), "separate": {"documents"}, "masked": {"segments", "next_sentence"}}[kind]
        assert there == {"tokens", "targets", "positions", "samples"} | more
        for name in there:
            array = getattr(examples, name)
            assert array.dtype == np.int64
            assert array.flags.writeable  # torch warns of memory that it may not write
            assert array.shape == ((count,) if name in {"samples", "next_sentence"} else (count, 64))


def test_a_causal_example_by_hand():
    (row,) = rows(causal(np.array([[7, END, 8, 9, END]]), ONLY + 3))
    assert (row["tokens"], row["targets"], row["positions"]) == ([7, END, 8, 9], [END, 8, 9, END], [0, 1, 2, 3])
    assert row["samples"] == 3


def test_separate_documents_by_hand():
    _ = IGNORED
    (row,) = rows(causal(np.array([[7, 8, END, 9, END, END, 5, 6, 7]]), ONLY, end_of_text=END))
    assert row["tokens"] == [7, 8, END, 9, END, END, 5, 6]
    assert row["targets"] == [8, END, _, END, _, _, 6, 7]
    assert row["documents"] == [0, 0, 0, 1, 1, 2, 3, 3]
    assert row["positions"] == [0, 1, 2, 0, 1, 0, 0, 1]


@given(window=st.lists(st.sampled_from([END, 7, 8]), min_size=2, max_size=40))
def test_separate_documents_by_the_definition(window):
    (row,) = rows(causal(np.array([window]), ONLY, end_of_text=END))
    document = position = 0
    for at, token in enumerate(window[:-1]):
        assert (row["documents"][at], row["positions"][at]) == (document, position)
        assert row["targets"][at] == (IGNORED if token == END else window[at + 1])
        document, position = (document + 1, 0) if token == END else (document, position + 1)


def make(seed: int, numbers: np.ndarray, text_NW: np.ndarray, share: float = 0.15) -> Examples:
    """Masked examples of windows [N] of text, sample g being of window g % N."""
    windows = numbers % len(text_NW)
    drawn = pairs(numbers, windows, count=len(text_NW), seed=seed)
    return masked(text_NW[windows], text_NW[drawn.following], drawn, numbers, share=share, special=SPECIAL)


def unmasked(examples: Examples) -> np.ndarray:
    return np.where(examples.targets == IGNORED, examples.tokens, examples.targets)


@settings(deadline=None)
@given(seed=st.integers(0, 2**63 - 1), first=st.integers(0, 2**50), width=st.integers(2, 40), count=st.integers(1, 4))
def test_a_pair_is_one_windows_beginning_and_the_same_or_anothers_end(seed, first, width, count):
    numbers = np.arange(first, first + 12)
    text_NW = np.random.default_rng(width).permuted(np.tile(np.arange(PAD + 1, PAD + 1 + width), (count, 1)), axis=1)
    text_NW += 50 * np.arange(count)[:, None]  # no token stands in two windows
    windows = numbers % count
    drawn = pairs(numbers, windows, count=count, seed=seed)
    special = SpecialTokens(end_of_text=END, cls=CLS, sep=SEP, mask=MASK, pad=PAD, is_text=np.arange(300) > PAD)
    examples = masked(text_NW[windows], text_NW[drawn.following], drawn, numbers, share=0.3, special=special)
    assert examples.tokens.shape == (12, width + 3)
    assert examples.positions.tolist() == [list(range(width + 3))] * 12
    for window, row, segments, label in zip(windows, unmasked(examples), examples.segments, examples.next_sentence, strict=True):
        (between, last) = np.flatnonzero(row == SEP)
        a, b = row[1:between], row[between + 1 : last]
        assert (row[0], last, len(a) + len(b)) == (CLS, width + 2, width)
        assert min(len(a), len(b)) >= max(1, width // 4)
        assert segments.tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert a.tolist() == text_NW[window, : len(a)].tolist()
        (other,) = [n for n in range(count) if b.tolist() == text_NW[n, len(a) :].tolist()]
        assert label == (other != window)


@settings(deadline=None)
@given(seed=st.integers(0, 2**63 - 1), share=st.floats(0.01, 0.99), ends=st.floats(0, 1), width=st.integers(2, 60))
def test_at_least_one_token_is_predicted_and_never_a_special_one(seed, share, ends, width):
    rng = np.random.default_rng(0)
    text_NW = np.where(rng.random((8, width)) < ends, END, rng.integers(PAD + 1, V, (8, width)))
    examples = make(seed, np.arange(8), text_NW, share)
    ordinary = unmasked(examples) > PAD
    predicted = examples.targets != IGNORED
    assert not (predicted & ~ordinary).any()
    there = ordinary.sum(axis=1)
    assert (abs(predicted.sum(axis=1) - share * there)[there * share >= 0.5] <= 0.5 + 1e-9).all()
    assert (predicted.sum(axis=1)[(there > 0) & (there * share < 0.5)] == 1).all()
    assert not predicted[there == 0].any()
    assert not np.isin(examples.tokens, [CLS, SEP, END, PAD])[predicted].any()


@pytest.fixture(scope="module")
def many() -> Examples:
    text_NW = np.random.default_rng(1).integers(PAD + 1, V, (64, 197))
    return make(11, np.arange(10_000), text_NW)


def near(counted: np.ndarray, share: float) -> bool:
    """Whether a share of truths is as it should be, within five standard deviations."""
    return abs(counted.mean() - share) < 5 * np.sqrt(share * (1 - share) / counted.size)


def test_of_the_tokens_15_percent_are_predicted_and_of_these_80_hidden_10_replaced_10_left(many):
    predicted = many.targets != IGNORED
    assert predicted.sum(axis=1).tolist() == [30] * 10_000  # of 197
    shown, wanted = many.tokens[predicted], many.targets[predicted]
    assert near(shown == MASK, 0.8)
    lucky = 0.1 / (V - PAD - 1)  # a replacement may be the token itself
    assert near(shown == wanted, 0.1 + lucky)
    assert near((shown != MASK) & (shown != wanted), 0.1 - lucky)
    replaced = np.bincount(shown[(shown != MASK) & (shown != wanted)], minlength=V)
    assert not replaced[: PAD + 1].any()
    expected = replaced.sum() / (V - PAD - 1)
    assert (abs(replaced[PAD + 1 :] - expected) < 5 * np.sqrt(expected)).all()


def test_what_is_predicted_is_chosen_evenly_over_places_and_apart_from_its_fate(many):
    predicted = many.targets != IGNORED
    middle = predicted[:, 1:-1]
    share = middle.mean(axis=0)[:40]  # before the first place that a [SEP] can take
    assert (abs(share - 30 / 197) < 5 * np.sqrt(0.15 * 0.85 / len(predicted))).all()
    both = predicted[:, 1:-2] & predicted[:, 2:-1]
    hidden = many.tokens == MASK
    assert near(hidden[:, 2:-1][both & hidden[:, 1:-2]], 0.8)
    assert near(hidden[:, 2:-1][both & ~hidden[:, 1:-2]], 0.8)


def test_in_half_of_the_pairs_b_follows_a_and_else_is_of_any_other_window():
    numbers = np.arange(70_000)
    windows = numbers % 8
    drawn = pairs(numbers, windows, count=8, seed=3)
    assert near(drawn.next_sentence == 0, 0.5)
    assert np.array_equal(drawn.next_sentence == 0, drawn.following == windows)
    distance = (drawn.following - windows)[drawn.next_sentence == 1] % 8
    assert all(near(distance == d, 1 / 7) for d in range(1, 8))


def test_masks_differ_by_epoch_and_seed_and_come_back_with_them(opened, prepared, settings_of):
    samples = opened["masked"]
    epoch = np.arange(samples.train_windows)
    _, windows = Order(samples.train_windows, seed=7)(np.concatenate([epoch, epoch + samples.train_windows]))
    examples = samples.train(np.concatenate([epoch, epoch + samples.train_windows]))
    twice = [np.flatnonzero(windows == window) for window in range(30)]
    assert all(len(pair) == 2 for pair in twice)
    assert all((examples.targets[a] != examples.targets[b]).any() for a, b in twice)
    again = Samples(prepared["masked"], settings_of["masked"], SMALL, seed=7)
    assert rows(again.train(epoch[:20])) == rows(samples.train(epoch[:20]))
    other = Samples(prepared["masked"], settings_of["masked"], SMALL, seed=8)
    assert rows(other.train(epoch[:20])) != rows(samples.train(epoch[:20]))
    assert rows(other.validation(np.arange(5))) == rows(samples.validation(np.arange(5)))


def test_every_token_of_the_text_is_the_first_windows_once(opened, prepared):
    """Windows of W = T - 3 tokens lie end to end: what frames the text takes none of it away."""
    samples = opened["masked"]
    text = samples.validation_text(np.arange(samples.validation_windows))
    assert text.shape[1] == 61
    end = Tokenizer(prepared["masked"].tokenizer).end_of_text
    directory = prepared["masked"].corpora[0]
    tokens = np.fromfile(next(directory.glob("*.validation.bin")), dtype=np.uint16)
    assert text.ravel().tolist() == tokens[: text.size].tolist()
    assert end in text
    assert samples.validation_unigram_entropy(np.arange(2)) == pytest.approx(entropy_of(text[:2]))


def entropy_of(tokens: np.ndarray) -> float:
    shares = np.unique(tokens, return_counts=True)[1] / tokens.size
    return float(-(shares * np.log(shares)).sum())


def test_hashes_and_examples_never_change():
    """Golden values: whoever changes these changes every masked run that is under way."""
    assert hashed(1, 2, np.array([3, 4])).tolist() == [8566811186491711777, 10240744290557228159]
    assert np.array_equal(fold(hashed(1, 2), np.array([3, 4])), hashed(1, 2, np.array([3, 4])))
    (row,) = rows(make(5, np.array([29]), np.arange(10, 43).reshape(3, 11), share=0.5))
    _ = IGNORED
    assert row["tokens"] == [CLS, 32, 33, 36, 35, MASK, SEP, 15, 16, 37, 18, MASK, MASK, SEP]
    assert row["targets"] == [_, _, _, 34, _, 36, _, _, 16, 17, _, 19, 20, _]
    assert row["next_sentence"] == 1


def test_a_masked_corpus_is_another_one_and_a_causal_one_is_left_as_it_was(prepared, settings_of):
    assert prepared["causal"] == prepared["separate"]
    assert prepared["masked"].tokenizer != prepared["causal"].tokenizer
    assert not set(prepared["masked"].corpora) & set(prepared["causal"].corpora)
    assert {name: prepare.find(data, SMALL) for name, data in settings_of.items()} == prepared


def test_masked_and_causal_share_a_corpus_where_the_tokenizers_file_has_all(prepared, source, tmp_path):
    given = TokenizerConfig(file=prepared["masked"].tokenizer)
    made = prepare.prepare(config(tmp_path, source, objective="masked"), given)
    assert prepare.find(config(tmp_path, source), given) == made
    assert made.fingerprint == prepared["masked"].fingerprint


def test_a_tokenizer_of_no_use_for_masking_is_told_before_anything_is_written(prepared, source, tmp_path):
    data = config(tmp_path / "corpora", source, objective="masked")
    given = prepared["causal"].tokenizer
    with pytest.raises(InputError) as caught:
        prepare.prepare(data, TokenizerConfig(file=given))
    assert str(caught.value).startswith(f"{given}: got no token [CLS] or <s>, wants [CLS] [SEP] [MASK] [PAD]")
    with pytest.raises(InputError) as caught:
        prepare.prepare(data, TokenizerConfig(vocabulary=260))
    wants = "wants at least 261: 256 bytes and <|endoftext|> [CLS] [MASK] [PAD] [SEP]"
    assert str(caught.value) == f"tokenizer.vocabulary: got 260, {wants}; raise it"
    assert not (tmp_path / "corpora").exists()


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A tokenizer.json as BERT's is: word pieces, lower case, no end-of-text token, and a post-processor."""
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
    text = np.concatenate([samples._train.read(np.arange(samples.train_windows)), samples.validation_text(np.arange(3))])
    assert set(text[text < 5]) == {1, 3}  # unknown words, and the ends of documents: no text became a [MASK]
    examples = samples.train(np.arange(200))
    assert (examples.tokens[:, 0] == 2).all()
    assert (examples.tokens[:, -1] == 3).all()
    assert (examples.targets[examples.targets != IGNORED] >= 5).all()
    assert (examples.tokens == 4).any()
    (ids,) = Tokenizer(bert, end_of_text="[SEP]").encode(["etaoin [MASK] [SEP] [CLS]"])
    assert not set(ids.tolist()) & {2, 3, 4}
