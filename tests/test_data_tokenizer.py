"""The tokenizer: deterministic, lossless, deaf to special text, and tiktoken only where it is proven equal."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.data import tokenizer
from manta.data.errors import InputError
from manta.data.tokenizer import Tokenizer

TEXTS = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:30]]
END = "<|endoftext|>"
TRICKY = [
    "",
    " ",
    "\n\n\n",
    "  x  ",
    "don't I'LL we've",
    "1234567 ½ ٣",
    "a<|endoftext|>b",
    "naïve 雪 🙂👩‍👩‍👧",
    "x \u2003\u3000 y",
    "\x00\x7f\u200b",
    "tab\t\tq ",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tokenizer.train(TEXTS, vocabulary=600, end_of_text=END), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def fast(file) -> Tokenizer:
    opened = Tokenizer(file)
    assert opened.choose_encoder(TEXTS + TRICKY).startswith("tiktoken: same ids as tokenizers on 41 documents")
    return opened


@pytest.fixture(scope="module")
def reference(file) -> Tokenizer:
    return Tokenizer(file)


def altered(file: Path, directory: Path, alter) -> Path:
    spec = json.loads(file.read_text())
    alter(spec)
    path = directory / "altered.json"
    path.write_text(json.dumps(spec))
    return path


def test_training_twice_gives_the_same_file(file):
    assert tokenizer.train(TEXTS, vocabulary=600, end_of_text=END) == file.read_text(encoding="utf-8")
    assert Tokenizer(file).vocabulary == 600
    assert Tokenizer(file).fingerprint == tokenizer.fingerprint(file.read_text(encoding="utf-8"))


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back(fast, reference, text):
    (ids,) = reference.encode([text])
    assert reference.decode(ids) == text
    assert np.array_equal(fast.encode([text])[0], ids)


def test_special_text_in_a_document_stays_text(fast, file):
    for opened in (fast, Tokenizer(file)):
        (ids,) = opened.encode([f"a{END}b"])
        assert opened.end_of_text not in ids
        assert opened.decode(ids) == f"a{END}b"
        assert opened.decode([opened.end_of_text]) == END


def test_a_sea_of_blanks_does_not_drown_the_fast_encoder(fast, file):
    """tiktoken's regular expression overflows its stack near a million blanks; such a document goes to the reference."""
    text = "x" + " " * 1_000_000 + "y"
    assert np.array_equal(fast.encode([text])[0], Tokenizer(file).encode([text])[0])


def test_both_encoders_know_the_same_characters(fast, file):
    """Letters, digits and blanks are told apart by each library's own Unicode tables; these agree on the whole first plane."""
    texts = ["".join(f"a{chr(c)}1{chr(c)} {chr(c)} " for c in range(start, start + 256)) for start in range(0, 0xD800, 256)]
    fast_ids, ids = fast.encode(texts), Tokenizer(file).encode(texts)
    assert all(np.array_equal(a, b) for a, b in zip(fast_ids, ids, strict=True))


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda spec: spec.update(normalizer={"type": "NFC"}), "it normalizes text"),
        (lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True), "does not split text as GPT-2 does"),
        (lambda spec: spec["model"].update(ignore_merges=True), "BPE has options of its own"),
        (lambda spec: spec["added_tokens"][0].update(special=False), "adds tokens that are not special"),
        (lambda spec: spec["model"]["merges"].reverse(), "ids do not follow its merges"),
        (lambda spec: spec.update(model={"type": "WordLevel", "vocab": {END: 0, "a": 1}, "unk_token": "a"}), "its model is WordLevel"),
    ],
)
def test_a_tokenizer_tiktoken_can_not_copy_is_left_to_the_reference(file, tmp_path, alter, reason):
    opened = Tokenizer(altered(file, tmp_path, alter))
    choice = opened.choose_encoder(TEXTS[:3])
    assert opened.encoder == "tokenizers"
    assert choice.startswith("tokenizers: ")
    assert reason in choice


def test_an_encoder_that_differs_on_the_sample_is_not_used(file, monkeypatch):
    monkeypatch.setattr(tokenizer, "_SPLIT", r"\s+|\S+")
    opened = Tokenizer(file)
    assert "tokenizers: tiktoken gave other ids on" in opened.choose_encoder(TEXTS)
    assert opened.encoder == "tokenizers"
    assert opened.decode(opened.encode([TEXTS[0]])[0]) == TEXTS[0]


def test_a_bad_tokenizer_file_is_told(file, tmp_path):
    def told(path: Path, end_of_text: str = END) -> str:
        with pytest.raises(InputError) as caught:
            Tokenizer(path, end_of_text=end_of_text)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    half = tmp_path / "half.json"
    half.write_text(file.read_text()[:500])
    assert told(half).startswith(f"{half}: not a tokenizer.json (")
    assert "cannot be read (FileNotFoundError)" in told(tmp_path / "none.json")
    assert f"{file}: no token '<eos>'; its special tokens: {END}; set tokenizer.end_of_text" in told(file, "<eos>")
    twice = altered(file, tmp_path, lambda spec: spec["model"]["vocab"].update({"a": 70}))
    assert "id 70 stands for " in told(twice)


@pytest.fixture(scope="module")
def marked(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("marked") / "tokenizer.json"
    path.write_text(tokenizer.train(TEXTS, vocabulary=600, end_of_text=END, marks=tokenizer.MARKS), encoding="utf-8")
    return path


def test_a_tokenizer_trained_for_masking_has_the_special_tokens(marked):
    opened = Tokenizer(marked)
    special = opened.special_tokens()
    assert opened.vocabulary == 600
    assert (special.end_of_text, special.cls, special.sep, special.mask, special.pad) == (0, 1, 2, 3, 4)
    assert np.flatnonzero(~special.is_text).tolist() == [0, 1, 2, 3, 4]
    assert tokenizer.train(TEXTS, vocabulary=600, end_of_text="[SEP]", marks=tokenizer.MARKS).count('"special": true') == 4


def test_the_names_of_special_tokens_stay_text_in_a_document(marked):
    text = "".join(f"a{name} " for name in (*tokenizer.MARKS, END))
    fast = Tokenizer(marked)
    assert fast.choose_encoder([*TEXTS, text]).startswith("tiktoken: same ids as tokenizers")
    for opened in (fast, Tokenizer(marked)):
        (ids,) = opened.encode([text])
        assert opened.special_tokens().is_text[ids].all()
        assert opened.decode(ids) == text


def test_special_tokens_may_have_the_names_of_others(file, tmp_path):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Reference

    reference = Reference.from_file(str(file))
    reference.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<mask>", "<pad>", "<other>")])
    reference.save(str(tmp_path / "others.json"))
    special = Tokenizer(tmp_path / "others.json", end_of_text="</s>").special_tokens()
    assert (special.end_of_text, special.cls, special.sep, special.mask, special.pad) == (601, 600, 601, 602, 603)
    assert np.flatnonzero(~special.is_text).tolist() == [0, 600, 601, 602, 603, 604]


def test_a_tokenizer_that_can_not_mask_is_told(file, marked, tmp_path):
    def told(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            Tokenizer(path).special_tokens()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    wanted = "wants [CLS] [SEP] [MASK] [PAD] (or <s> </s> <mask> <pad>) for data.objective masked"
    remedy = "set tokenizer.file to one that has them, or leave it out to train one"
    assert told(file) == f"{file}: got no token [CLS] or <s>, {wanted}; {remedy}"
    spelled = altered(marked, tmp_path, lambda spec: spec["added_tokens"][3].update(special=False))
    assert told(spelled) == f"{spelled}: got [MASK] for text that spells it, {wanted}; mark it as special among its added_tokens"
