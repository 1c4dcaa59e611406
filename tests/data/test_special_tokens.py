"""Special tokens are found by the names of several models and never occur in a document; word starts are known."""

from pathlib import Path

import numpy as np
import pytest
from tokenizer_files import END, TEXTS, edited, error_of, train_file

from manta.data.tokenizer.tokenizer import FIM_TOKENS, MASKING_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return train_file(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "unigram"])
def any_file(request, tmp_path_factory) -> Path:
    """One file per algorithm, without the special tokens of masking or fill-in-the-middle."""
    return train_file(tmp_path_factory.mktemp(request.param) / "tokenizer.json", TEXTS[:4], 300, algorithm=request.param)


@pytest.fixture(scope="module")
def masking_file(tmp_path_factory) -> Path:
    return train_file(tmp_path_factory.mktemp("masking") / "tokenizer.json", special_tokens=MASKING_TOKENS)


def test_a_tokenizer_trained_for_masking_has_its_special_tokens(masking_file, tmp_path):
    tokenizer = Tokenizer(masking_file)
    special = tokenizer.special_tokens()
    assert tokenizer.vocabulary == 600
    assert (special.end_of_text, special.cls, special.sep, special.mask, special.pad) == (0, 1, 2, 3, 4)
    assert np.flatnonzero(~special.is_text).tolist() == [0, 1, 2, 3, 4]
    shared = train_file(tmp_path / "shared.json", end_of_text="[SEP]", special_tokens=MASKING_TOKENS)
    assert shared.read_text().count('"special": true') == 4


def test_names_of_masking_tokens_in_a_document_stay_text(masking_file):
    text = "".join(f"a{name} " for name in (*MASKING_TOKENS, END))
    fast = Tokenizer(masking_file)
    assert fast.choose_encoder([*TEXTS, text]).startswith("tiktoken: same ids as tokenizers")
    for tokenizer in (fast, Tokenizer(masking_file)):
        (ids,) = tokenizer.encode([text])
        assert tokenizer.special_tokens().is_text[ids].all()
        assert tokenizer.decode(ids) == text


def test_roberta_names_of_special_tokens_are_recognized(file, tmp_path):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Reference

    reference = Reference.from_file(str(file))
    reference.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<mask>", "<pad>", "<other>")])
    reference.save(str(tmp_path / "others.json"))
    special = Tokenizer(tmp_path / "others.json", end_of_text="</s>").special_tokens()
    assert (special.end_of_text, special.cls, special.sep, special.mask, special.pad) == (601, 600, 601, 602, 603)
    assert np.flatnonzero(~special.is_text).tolist() == [0, 600, 601, 602, 603, 604]


def test_a_tokenizer_without_masking_tokens_is_refused(any_file, masking_file, tmp_path):
    expected = "expected [CLS] [SEP] [MASK] [PAD] (or <s> </s> <mask> <pad>) for data.objective masked"
    remedy = "Set tokenizer.file to one that has them, or omit it to train one."
    assert error_of(Tokenizer(any_file).special_tokens) == f"{any_file}: {expected}, got no token [CLS] or <s>. {remedy}"
    for index, name in enumerate(MASKING_TOKENS):
        others = tuple(other for other in MASKING_TOKENS if other != name)
        train_file(tmp_path / "lacking.json", TEXTS[:2], 300, special_tokens=others)
        message = error_of(Tokenizer(tmp_path / "lacking.json").special_tokens)
        assert f"{expected}, got no token {name} or {('<s>', '</s>', '<mask>', '<pad>')[index]}. {remedy}" in message
    path = edited(masking_file, tmp_path, lambda spec: spec["added_tokens"][3].update(special=False))
    message = f"{path}: {expected}, got [MASK] for text as well. Mark it as special among its added_tokens."
    assert error_of(Tokenizer(path).special_tokens) == message


@pytest.mark.parametrize(
    "names",
    [
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001  DeepSeek's own bars
        ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ],
)
def test_fim_tokens_of_other_models_are_recognized(any_file, tmp_path, names):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Reference

    reference = Reference.from_file(str(any_file))
    size = reference.get_vocab_size()
    path = tmp_path / "fim.json"
    reference.add_special_tokens([AddedToken(name, special=True) for name in reversed(names)])
    reference.save(str(path))
    fim = Tokenizer(path).fim_tokens()
    assert (fim.prefix, fim.suffix, fim.middle) == (size + 2, size + 1, size)
    (ids,) = Tokenizer(path).encode([f"a {names[0]} b{names[1]}c{names[2]}"])
    assert max(ids) < size


def test_names_of_fim_tokens_in_a_document_stay_text(tmp_path):
    path = train_file(tmp_path / "fim.json", special_tokens=FIM_TOKENS)
    fast, reference = Tokenizer(path), Tokenizer(path)
    text = "".join(f"a{name} " for name in (*FIM_TOKENS, END))
    assert fast.choose_encoder([*TEXTS, text]).startswith("tiktoken: ")
    for tokenizer in (fast, reference):
        fim = tokenizer.fim_tokens()
        assert (tokenizer.end_of_text, fim.prefix, fim.suffix, fim.middle) == (0, 1, 2, 3)
        (ids,) = tokenizer.encode([text])
        assert min(ids) > 3
        assert tokenizer.decode(ids) == text


def test_a_tokenizer_without_fim_tokens_is_refused(any_file, tmp_path):
    others = "<fim_prefix> <fim_suffix> <fim_middle>, or <｜fim▁begin｜> <｜fim▁hole｜> <｜fim▁end｜>, or ▁<PRE> ▁<SUF> ▁<MID>"  # noqa: RUF001
    expected = f"expected <|fim_prefix|> <|fim_suffix|> <|fim_middle|> (or {others}) for data.fill_in_the_middle"
    remedy = "Set tokenizer.file to one that has them, or omit it to train one."
    assert error_of(Tokenizer(any_file).fim_tokens) == f"{any_file}: {expected}, got no token <|fim_prefix|>. {remedy}"

    def partly(spec):
        token = spec["added_tokens"][0]
        spec["added_tokens"] += [{**token, "id": 301 + i, "content": f"<fim_{part}>"} for i, part in enumerate(("prefix", "suffix"))]

    path = edited(any_file, tmp_path, partly)
    assert error_of(Tokenizer(path).fim_tokens) == f"{path}: {expected}, got no token <fim_middle>. {remedy}"

    def as_text(spec):
        partly(spec)
        spec["added_tokens"].append({**spec["added_tokens"][-1], "id": 303, "content": "<fim_middle>", "special": False})

    path = edited(any_file, tmp_path, as_text)
    message = f"{path}: {expected}, got <fim_middle> for text as well. Mark it as special among its added_tokens."
    assert error_of(Tokenizer(path).fim_tokens) == message


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the tokens of a text, joined into words by +."""
    begins_word = tokenizer.special_tokens(whole_words=True).begins_word
    words: list[str] = []
    for number in tokenizer.encode([text])[0]:
        token = tokenizer._reference.id_to_token(int(number))
        words.extend([token] if begins_word[number] or not words else [f"{words.pop()}+{token}"])
    return words


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_a_byte_level_word_starts_at_a_space_and_ends_at_punctuation(tmp_path, algorithm):
    path = train_file(tmp_path / "tokenizer.json", ["xyz"], 262, special_tokens=MASKING_TOKENS, algorithm=algorithm)
    tokenizer = Tokenizer(path)
    special = tokenizer.special_tokens()
    assert special.begins_word[~special.is_text].all()
    words = [word.replace("+", "") for word in words_of(tokenizer, "ab1 naïve\tI'm_ü.\n雪")]
    assert words == ["ab1", "ĠnaÃ¯ve", "ĉI", "'m", "_Ã¼", ".", "ĊéĽª"]


def test_a_wordpiece_word_starts_without_the_prefix(tmp_path):
    path = train_file(tmp_path / "tokenizer.json", ["abc cab bac"], 20, special_tokens=MASKING_TOKENS, algorithm="wordpiece")
    tokenizer = Tokenizer(path)
    special = tokenizer.special_tokens()
    assert special.begins_word[~special.is_text].all()
    assert [word.replace("+##", "") for word in words_of(tokenizer, "abccab a [MASK]")] == ["abccab", "a", "[UNK]", "[UNK]", "[UNK]"]


def with_masking_tokens(reference, path: Path) -> Tokenizer:
    from tokenizers import AddedToken

    reference.add_special_tokens([AddedToken(name, special=True) for name in (END, *MASKING_TOKENS)])
    reference.save(str(path))
    return Tokenizer(path)


def test_a_metaspace_word_starts_with_its_space(tmp_path):
    from tokenizers import Tokenizer as Reference
    from tokenizers import models, normalizers, pre_tokenizers

    def metaspace():
        return Reference(models.Unigram([("▁", -3.0), ("▁a", -2.0), ("b", -3.0), ("a", -3.0), (".", -3.0), ("?", -9.0)], unk_id=5))

    split = metaspace()
    split.pre_tokenizer = pre_tokenizers.Metaspace()
    normalized = metaspace()
    normalized.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    for reference in (split, normalized):
        assert words_of(with_masking_tokens(reference, tmp_path / "metaspace.json"), "ab ba.") == ["▁a+b", "▁+b+a+."]


def test_whole_words_need_tokens_that_show_word_starts(tmp_path):
    from tokenizers import Tokenizer as Reference
    from tokenizers import models, pre_tokenizers

    words = Reference(models.WordLevel({"ab": 0, "c": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert words_of(with_masking_tokens(words, tmp_path / "words.json"), "ab c ab") == ["ab", "c", "ab"]
    suffixed = Reference(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    tokenizer = with_masking_tokens(suffixed, tmp_path / "suffixed.json")
    assert tokenizer.special_tokens().begins_word is None
    problem = "suffixed.json: expected WordPiece, a byte-level model or one that writes ▁ before words, got tokens without word boundaries"
    assert problem in error_of(lambda: tokenizer.special_tokens(whole_words=True))
