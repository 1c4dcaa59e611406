"""Train tokenizers. The same texts always produce the same bytes, on any number of cores."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from manta.data.errors import InputError
from manta.data.tokenizer import unigram
from manta.data.tokenizer.byte_level import byte_letters

Algorithm = Literal["bpe", "wordpiece", "unigram"]

UNKNOWN = "[UNK]"  # WordPiece's token for a word with letters outside of its vocabulary
_ALPHABET = 1000  # largest alphabet of a WordPiece vocabulary, as BERT's
_NEVER = -1e6  # the score of a special token in a unigram model: any other spelling of it is more probable
_LONGEST_WORD = 4096  # bytes; characters for WordPiece. Trainers take the square of a word's length, so longer words are cut
_SEEDS = 4  # candidate pieces for each piece of a unigram vocabulary


def train(
    texts: Iterable[str],
    *,
    vocabulary: int,
    end_of_text: str,
    special_tokens: tuple[str, ...] = (),
    algorithm: Algorithm = "bpe",
    lowercase: bool = False,
) -> str:
    """Train a tokenizer and return the text of its tokenizer.json.

    vocabulary: its size, special tokens included; a small corpus may fill less of it. special_tokens: those besides end_of_text.
    lowercase: let WordPiece remove case and accents. A longer run of letters, digits, punctuation or spaces than _LONGEST_WORD counts as
    several words. Raises InputError if a text could contain a special token.
    """
    special = list(dict.fromkeys((end_of_text, *special_tokens)))
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
            raise InputError(f"tokenizer.end_of_text: expected a token that is not a word, got {name!r}. Use one such as <|{name}|>.")
    return content


def _bpe(texts: Iterable[str], vocabulary: int, special: list[str], max_length: int | None = None) -> Any:
    from tokenizers import Tokenizer, models, trainers

    reference = _byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(byte_letters().values()),
        max_token_length=max_length,
        show_progress=False,
    )
    words, reference.pre_tokenizer = reference.pre_tokenizer, _cut_long_words(reference.pre_tokenizer)
    reference.train_from_iterator(texts, trainer)
    reference.pre_tokenizer = words
    return reference


def _unigram(texts: list[str], vocabulary: int, special: list[str]) -> Any:
    """Choose pieces among those of a larger BPE."""
    from tokenizers import Tokenizer, models

    seeds = _bpe(texts, _SEEDS * vocabulary, [], max_length=unigram.MAX_PIECE)
    words: Counter[str] = Counter()
    for text in texts:
        words.update(piece for piece, _ in seeds.pre_tokenizer.pre_tokenize_str(text))
    letters = byte_letters()
    byte = {letter: value for value, letter in letters.items()}
    counts = {bytes(byte[letter] for letter in word): count for word, count in words.items()}
    candidates = (bytes(byte[letter] for letter in token) for token in seeds.get_vocab())
    pieces = unigram.fit(counts, candidates, size=vocabulary - len(special))
    scores = [("".join(letters[value] for value in piece), score) for piece, score in pieces]
    reference = _byte_level(Tokenizer(models.Unigram([*((name, _NEVER) for name in special), *scores])))
    reference.add_special_tokens(special)
    return reference


def _wordpiece(texts: list[str], vocabulary: int, special: list[str], *, lowercase: bool) -> Any:
    """Train WordPiece in two rounds, to be deterministic.

    The trainer assigns ids to letters in hash map order, which differs each time, and ids break ties between equally frequent pairs.
    So letters, and those that a first round finds within words, get fixed ids as if they were special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def fit(size: int, fixed: list[str]) -> dict[str, int]:
        reference.model = models.WordPiece(unk_token=UNKNOWN)
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=fixed, initial_alphabet=letters, limit_alphabet=len(letters), show_progress=False
        )
        reference.train_from_iterator(texts, trainer)
        return reference.get_vocab(with_added_tokens=False)

    reference = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    reference.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
    reference.pre_tokenizer = _cut_long_words(pre_tokenizers.BertPreTokenizer())
    frequency: Counter[str] = Counter()
    for text in texts:
        frequency.update(reference.normalizer.normalize_str(text))
    del frequency[" "]
    limit = min(_ALPHABET, (vocabulary - len(special)) // 2)  # each may occur twice: first in a word, and later in one
    letters = sorted(sorted(frequency, key=lambda letter: (-frequency[letter], letter))[:limit])
    within_words = sorted(fit(0, []).keys() - set(letters))
    pieces = fit(vocabulary, [*special, *letters, *within_words])
    result = Tokenizer(models.WordPiece(pieces, unk_token=UNKNOWN))
    result.normalizer, result.pre_tokenizer, result.decoder = reference.normalizer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    result.add_special_tokens(special)
    return result


def _byte_level(reference: Any) -> Any:
    from tokenizers import decoders, pre_tokenizers

    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    return reference


def _cut_long_words(words: Any) -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(length=_LONGEST_WORD)])
