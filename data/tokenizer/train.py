"""Tokenizers are trained: the same texts give the same bytes, on any number of cores."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from manta.data.errors import InputError
from manta.data.tokenizer import unigram
from manta.data.tokenizer.byte_level import byte_letters

Algorithm = Literal["bpe", "wordpiece", "unigram"]

UNKNOWN = "[UNK]"  # what WordPiece makes of a word that it has no letters for
_ALPHABET = 1000  # letters of a WordPiece vocabulary at most, as BERT's
_NEVER = -1e6  # the score of a special token among unigram pieces: whatever spells it is more probable
_SEEDS = 4  # pieces that a unigram vocabulary is chosen from, for each one of it


def train(
    texts: Iterable[str],
    *,
    vocabulary: int,
    end_of_text: str,
    marks: tuple[str, ...] = (),
    algorithm: Algorithm = "bpe",
    lowercase: bool = False,
) -> str:
    """The text of a tokenizer.json.

    vocabulary: its size, special tokens included; a small corpus may fill less of it. marks: special tokens besides end_of_text.
    lowercase: for WordPiece, whether letters lose case and accents. Raises InputError where a text could spell a special token.
    """
    special = list(dict.fromkeys((end_of_text, *marks)))
    if algorithm == "bpe":
        reference = _bpe(texts, vocabulary, special)
    elif algorithm == "unigram":
        reference = _unigram(list(texts), vocabulary, special)
    else:
        reference = _wordpiece(list(texts), vocabulary, list(dict.fromkeys((*special, UNKNOWN))), lowercase=lowercase)
    content = reference.to_str(pretty=True)
    reference.encode_special_tokens = True
    for name in special:
        if name == UNKNOWN or reference.token_to_id(name) in reference.encode(name, add_special_tokens=False).ids:
            raise InputError(f"tokenizer.end_of_text: got {name!r}, which text may spell; wants a token that is no word, as <|{name}|>")
    return content


def _bpe(texts: Iterable[str], vocabulary: int, special: list[str], longest: int | None = None) -> Any:
    from tokenizers import Tokenizer, models, trainers

    reference = _byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(byte_letters().values()),
        max_token_length=longest,
        show_progress=False,
    )
    reference.train_from_iterator(texts, trainer)
    return reference


def _unigram(texts: list[str], vocabulary: int, special: list[str]) -> Any:
    """Pieces are chosen among those of a larger BPE."""
    from tokenizers import Tokenizer, models

    seeds = _bpe(texts, _SEEDS * vocabulary, [], longest=unigram.LONGEST)
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in seeds.pre_tokenizer.pre_tokenize_str(text))
    letters = byte_letters()
    byte = {letter: value for value, letter in letters.items()}
    counts = {bytes(byte[letter] for letter in word): count for word, count in words.items()}
    candidates = (bytes(byte[letter] for letter in token) for token in seeds.get_vocab())
    pieces = unigram.fit(counts, candidates, size=vocabulary - len(special))
    spelled = [("".join(letters[value] for value in piece), score) for piece, score in pieces]
    reference = _byte_level(Tokenizer(models.Unigram([*((name, _NEVER) for name in special), *spelled])))
    reference.add_special_tokens(special)
    return reference


def _wordpiece(texts: list[str], vocabulary: int, special: list[str], *, lowercase: bool) -> Any:
    """The trainer numbers letters as a hash map has them, another way each time, and by numbers it decides between equally frequent pairs.

    So they get their numbers beforehand, as if they were special: all letters, then those that a first round finds within words.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def trained(size: int, numbered: list[str]) -> dict[str, int]:
        reference.model = models.WordPiece(unk_token=UNKNOWN)
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            special_tokens=numbered,
            initial_alphabet=letters,
            limit_alphabet=len(letters),
            show_progress=False,
        )
        reference.train_from_iterator(texts, trainer)
        return reference.get_vocab(with_added_tokens=False)

    reference = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    reference.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
    reference.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    frequent: Counter[str] = Counter()
    for text in texts:
        frequent.update(reference.normalizer.normalize_str(text))
    del frequent[" "]
    limit = min(_ALPHABET, (vocabulary - len(special)) // 2)  # each may stand twice, as a word's first letter and as a later one
    letters = sorted(sorted(frequent, key=lambda letter: (-frequent[letter], letter))[:limit])
    within = sorted(trained(0, []).keys() - set(letters))
    pieces = trained(vocabulary, [*special, *letters, *within])
    made = Tokenizer(models.WordPiece(pieces, unk_token=UNKNOWN))
    made.normalizer, made.pre_tokenizer, made.decoder = reference.normalizer, reference.pre_tokenizer, decoders.WordPiece()
    made.add_special_tokens(special)
    return made


def _byte_level(reference: Any) -> Any:
    from tokenizers import decoders, pre_tokenizers

    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    return reference
