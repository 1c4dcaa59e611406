"""How many bytes of text each token stands for, with tokenizers of every kind, and the source of every sample."""

import numpy as np
import pytest
from sample_cases import WAYS, open_way, write_sources
from tokenizer_files import END, TEXTS, TRICKY, train_file
from tokenizers import Tokenizer as Reference
from tokenizers import decoders, models, normalizers, pre_tokenizers

from manta.data.tokenizer.tokenizer import Tokenizer

MORE = "naïve 雪 🙂 x"


def save(reference: Reference, path) -> Tokenizer:
    reference.add_special_tokens([END])
    reference.save(str(path))
    return Tokenizer(path)


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_the_tokens_of_a_text_have_its_bytes(tmp_path, algorithm):
    tokenizer = Tokenizer(train_file(tmp_path / "tokenizer.json", algorithm=algorithm))
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocabulary,)
    assert sizes[tokenizer.end_of_text] == 0
    for text in (*TEXTS[:5], *TRICKY):
        assert sizes[tokenizer.encode([text])[0]].sum() == len(text.encode())


def test_word_pieces_have_the_bytes_of_their_letters(tmp_path):
    tokenizer = Tokenizer(train_file(tmp_path / "tokenizer.json", TEXTS[:5], algorithm="wordpiece", special_tokens=("[MASK]",)))
    sizes = tokenizer.token_bytes()
    text = "import naming"
    assert sizes[tokenizer.encode([text])[0]].sum() == len("importnaming")
    unknown = tokenizer.encode(["☃"])[0]
    assert sizes[unknown].tolist() == [0]


def test_sentencepiece_tokens_have_a_byte_for_each_space_and_each_byte_token(tmp_path):
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"naivex▁", "ve"]
    reference = Reference(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    reference.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer = save(reference, tmp_path / "tokenizer.json")
    assert tokenizer.token_bytes()[0] == 0
    assert tokenizer.token_bytes()[tokenizer.encode([MORE])[0]].sum() == len(MORE.encode())


def test_added_tokens_and_ends_of_words_have_the_bytes_that_they_spell(tmp_path):
    reference = Reference(
        models.BPE({"a": 0, "b</w>": 1, "ab</w>": 2, "<unk>": 3}, [("a", "b</w>")], end_of_word_suffix="</w>", unk_token="<unk>")
    )
    reference.add_tokens(["né"])
    tokenizer = save(reference, tmp_path / "tokenizer.json")
    assert tokenizer.token_bytes().tolist() == [1, 1, 2, 0, 3, 0]


def test_a_byte_level_tokenizer_may_be_spelled_in_steps(tmp_path):
    letters = pre_tokenizers.ByteLevel.alphabet()
    reference = Reference(models.BPE({letter: index for index, letter in enumerate(sorted(letters))}, []))
    reference.normalizer, reference.decoder = normalizers.NFC(), decoders.ByteLevel()
    reference.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer = save(reference, tmp_path / "tokenizer.json")
    assert tokenizer.token_bytes()[tokenizer.encode([MORE])[0]].sum() == len(MORE.encode())


@pytest.mark.parametrize("way", [way for way in WAYS if "mask" not in way and "sentence" not in way and "fill" not in way])
def test_each_sample_has_the_source_that_has_its_text(tmp_path, way):
    samples = open_way(write_sources(tmp_path), **WAYS[way])
    assert samples.source_names == ("web", "code")
    (tokenizer_file,) = (tmp_path / "corpora").rglob("tokenizer.json")
    tokenizer = Tokenizer(tokenizer_file)
    files = {"web": (tmp_path / "web").glob("*.jsonl"), "code": [tmp_path / "code.jsonl"]}
    texts = {name: "".join(file.read_text() for file in found) for name, found in files.items()}
    for examples in (samples.train(np.arange(300)), samples.validation(np.arange(samples.validation_windows))):
        for tokens, source in zip(examples.tokens.tolist(), examples.sources.tolist(), strict=True):
            text = max(tokenizer.decode(tokens).split(END), key=len)
            assert [name for name in texts if text in texts[name]] == [samples.source_names[source]]
        assert set(examples.sources.tolist()) == {0, 1}


def test_short_sequences_have_the_source_of_their_sample(tmp_path):
    samples = open_way(write_sources(tmp_path))
    whole, parts = samples.train(np.arange(30)), samples.train(np.arange(30), sequence_length=4)
    assert set(whole.sources.tolist()) == {0, 1}
    assert parts.sources.tolist() == np.repeat(whole.sources, 4).tolist()


def test_multi_byte_letters_have_their_bytes(tmp_path):
    """The same text in another alphabet: the same ids, and twice the bytes for each letter."""
    sizes = {}
    for letters in ("abcde", "абвгд"):
        words = ["".join(letters[index] for index in word) for word in ((0, 1), (2, 3, 4), (4,))]
        reference = Reference(models.WordLevel({word: index for index, word in enumerate(words)} | {"[UNK]": 3}, unk_token="[UNK]"))
        reference.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = save(reference, tmp_path / "tokenizer.json")
        assert tokenizer.encode([" ".join(words)])[0].tolist() == [0, 1, 2]
        sizes[letters] = tokenizer.token_bytes()
    assert (sizes["абвгд"] == 2 * sizes["abcde"]).all()
    assert sizes["abcde"].tolist() == [2, 3, 1, 0, 0]
