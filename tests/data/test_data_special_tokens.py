"""Tokens that are no text: found under the names that others give them too, and never spelled by a document. And where words begin."""

from pathlib import Path

import numpy as np
import pytest
from tokenizer_files import END, TEXTS, altered, told, trained

from manta.data.tokenizer import tokenizer
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.data.tokenizer.train import train as train_tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "unigram"])
def any_file(request, tmp_path_factory) -> Path:
    """One of each algorithm, without what a masked objective or fill-in-the-middle needs."""
    return trained(tmp_path_factory.mktemp(request.param), TEXTS[:4], 300, algorithm=request.param)


@pytest.fixture(scope="module")
def marked(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("marked") / "tokenizer.json"
    path.write_text(train_tokenizer(TEXTS, vocabulary=600, end_of_text=END, marks=tokenizer.MARKS), encoding="utf-8")
    return path


def test_a_tokenizer_trained_for_masking_has_the_special_tokens(marked):
    opened = Tokenizer(marked)
    special = opened.special_tokens()
    assert opened.vocabulary == 600
    assert (special.end_of_text, special.cls, special.sep, special.mask, special.pad) == (0, 1, 2, 3, 4)
    assert np.flatnonzero(~special.is_text).tolist() == [0, 1, 2, 3, 4]
    assert train_tokenizer(TEXTS, vocabulary=600, end_of_text="[SEP]", marks=tokenizer.MARKS).count('"special": true') == 4


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


def test_a_tokenizer_that_can_not_mask_is_told(any_file, marked, tmp_path):
    wanted = "wants [CLS] [SEP] [MASK] [PAD] (or <s> </s> <mask> <pad>) for data.objective masked"
    remedy = "set tokenizer.file to one that has them, or leave it out to train one"
    assert told(Tokenizer(any_file).special_tokens) == f"{any_file}: got no token [CLS] or <s>, {wanted}; {remedy}"
    for index, name in enumerate(tokenizer.MARKS):
        others = tuple(other for other in tokenizer.MARKS if other != name)
        (tmp_path / "lacking.json").write_text(train_tokenizer(TEXTS[:2], vocabulary=300, end_of_text=END, marks=others))
        said = told(Tokenizer(tmp_path / "lacking.json").special_tokens)
        assert f"got no token {name} or {('<s>', '</s>', '<mask>', '<pad>')[index]}, {wanted}" in said
    spelled = altered(marked, tmp_path, lambda spec: spec["added_tokens"][3].update(special=False))
    problem = f"{spelled}: got [MASK] for text that spells it, {wanted}; mark it as special among its added_tokens"
    assert told(Tokenizer(spelled).special_tokens) == problem


@pytest.mark.parametrize(
    "names",
    [
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001  the bars are DeepSeek's
        ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ],
)
def test_marks_for_fill_in_the_middle_may_be_spelled_as_others_do(any_file, tmp_path, names):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Reference

    reference = Reference.from_file(str(any_file))
    size = reference.get_vocab_size()
    path = tmp_path / "fim.json"
    reference.add_special_tokens([AddedToken(name, special=True) for name in reversed(names)])
    reference.save(str(path))
    marks = Tokenizer(path).fim_tokens()
    assert (marks.prefix, marks.suffix, marks.middle) == (size + 2, size + 1, size)
    (ids,) = Tokenizer(path).encode([f"a {names[0]} b{names[1]}c{names[2]}"])
    assert max(ids) < size


def test_a_tokenizer_trained_to_fill_in_the_middle_keeps_text_that_spells_its_marks(tmp_path):
    path = tmp_path / "fim.json"
    path.write_text(train_tokenizer(TEXTS, vocabulary=600, end_of_text=END, marks=tokenizer.FIM_MARKS))
    fast, reference = Tokenizer(path), Tokenizer(path)
    text = "".join(f"a{name} " for name in (*tokenizer.FIM_MARKS, END))
    assert fast.choose_encoder([*TEXTS, text]).startswith("tiktoken: ")
    for opened in (fast, reference):
        marks = opened.fim_tokens()
        assert (opened.end_of_text, marks.prefix, marks.suffix, marks.middle) == (0, 1, 2, 3)
        (ids,) = opened.encode([text])
        assert min(ids) > 3
        assert opened.decode(ids) == text


def test_a_tokenizer_that_can_not_fill_in_the_middle_is_told(any_file, tmp_path):
    others = "<fim_prefix> <fim_suffix> <fim_middle>, or <｜fim▁begin｜> <｜fim▁hole｜> <｜fim▁end｜>, or ▁<PRE> ▁<SUF> ▁<MID>"  # noqa: RUF001
    wanted = f"wants <|fim_prefix|> <|fim_suffix|> <|fim_middle|> (or {others}) for data.fill_in_the_middle"
    remedy = "set tokenizer.file to one that has them, or leave it out to train one"
    assert told(Tokenizer(any_file).fim_tokens) == f"{any_file}: got no token <|fim_prefix|>, {wanted}; {remedy}"

    def partly(spec):
        token = spec["added_tokens"][0]
        spec["added_tokens"] += [{**token, "id": 301 + i, "content": f"<fim_{part}>"} for i, part in enumerate(("prefix", "suffix"))]

    path = altered(any_file, tmp_path, partly)
    assert told(Tokenizer(path).fim_tokens) == f"{path}: got no token <fim_middle>, {wanted}; {remedy}"

    def spelled(spec):
        partly(spec)
        spec["added_tokens"].append({**spec["added_tokens"][-1], "id": 303, "content": "<fim_middle>", "special": False})

    path = altered(any_file, tmp_path, spelled)
    problem = f"{path}: got <fim_middle> for text that spells it, {wanted}; mark it as special among its added_tokens"
    assert told(Tokenizer(path).fim_tokens) == problem


def words_of(opened: Tokenizer, text: str) -> list[str]:
    """The tokens of a text, joined into words."""
    begins = opened.special_tokens(whole_words=True).begins_word
    words: list[str] = []
    for number in opened.encode([text])[0]:
        token = opened._reference.id_to_token(int(number))
        words.extend([token] if begins[number] or not words else [f"{words.pop()}+{token}"])
    return words


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_a_byte_level_word_begins_after_a_blank_and_ends_before_punctuation(tmp_path, algorithm):
    path = tmp_path / "tokenizer.json"
    path.write_text(train_tokenizer(["xyz"], vocabulary=262, end_of_text=END, marks=tokenizer.MARKS, algorithm=algorithm))
    opened = Tokenizer(path)
    special = opened.special_tokens()
    assert special.begins_word[~special.is_text].all()
    spelled = [word.replace("+", "") for word in words_of(opened, "ab1 naïve\tI'm_ü.\n雪")]
    assert spelled == ["ab1", "ĠnaÃ¯ve", "ĉI", "'m", "_Ã¼", ".", "ĊéĽª"]


def test_a_word_of_word_pieces_begins_without_their_prefix(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(train_tokenizer(["abc cab bac"], vocabulary=20, end_of_text=END, marks=tokenizer.MARKS, algorithm="wordpiece"))
    opened = Tokenizer(path)
    special = opened.special_tokens()
    assert special.begins_word[~special.is_text].all()
    assert [word.replace("+##", "") for word in words_of(opened, "abccab a [MASK]")] == ["abccab", "a", "[UNK]", "[UNK]", "[UNK]"]


def with_marks(reference, path: Path) -> Tokenizer:
    from tokenizers import AddedToken

    reference.add_special_tokens([AddedToken(name, special=True) for name in (END, *tokenizer.MARKS)])
    reference.save(str(path))
    return Tokenizer(path)


def test_a_word_may_begin_with_its_blank_spelled_out(tmp_path):
    from tokenizers import Tokenizer as Reference
    from tokenizers import models, normalizers, pre_tokenizers

    def metaspace():
        return Reference(models.Unigram([("▁", -3.0), ("▁a", -2.0), ("b", -3.0), ("a", -3.0), (".", -3.0), ("?", -9.0)], unk_id=5))

    split = metaspace()
    split.pre_tokenizer = pre_tokenizers.Metaspace()
    normalized = metaspace()
    normalized.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    for reference in (split, normalized):
        assert words_of(with_marks(reference, tmp_path / "metaspace.json"), "ab ba.") == ["▁a+b", "▁+b+a+."]


def test_words_that_are_tokens_begin_and_those_that_tell_nothing_are_told(tmp_path):
    from tokenizers import Tokenizer as Reference
    from tokenizers import models, pre_tokenizers

    words = Reference(models.WordLevel({"ab": 0, "c": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert words_of(with_marks(words, tmp_path / "words.json"), "ab c ab") == ["ab", "c", "ab"]
    suffixed = Reference(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    opened = with_marks(suffixed, tmp_path / "suffixed.json")
    assert opened.special_tokens().begins_word is None
    problem = "suffixed.json: got tokens that do not tell where a word begins, wants WordPiece, a byte-level model or one that writes ▁"
    assert problem in told(lambda: opened.special_tokens(whole_words=True))
