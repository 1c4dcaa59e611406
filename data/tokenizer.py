"""Text to token ids and back: a byte-level BPE.

`tokenizers` is the reference: what it says is right. tiktoken, given the same vocabulary, is some five times as fast and is used
once it has given the same ids on a sample of the very documents to be encoded (`choose_encoder`).
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from manta.data.errors import InputError

Encoder = Literal["tokenizers", "tiktoken"]
Tokens = NDArray[np.uint32]

# The split that `tokenizers` calls ByteLevel (GPT-2's), spelled so that only the one alternative that must backtrack does.
_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
MARKS = ("[CLS]", "[SEP]", "[MASK]", "[PAD]")  # what a masked objective needs, as a tokenizer of ours spells it
_ELSEWHERE = ("<s>", "</s>", "<mask>", "<pad>")  # and as others do
_LONG_BLANK = 250_000  # characters of white space in a row; near a million, tiktoken's regular expression overflows its stack


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpecialTokens:
    """The ids that are no text."""

    end_of_text: int
    cls: int
    sep: int
    mask: int
    pad: int
    is_text: NDArray[np.bool_]  # [vocabulary]: whether an id is that of a token which text is made of


def train(texts: Iterable[str], *, vocabulary: int, end_of_text: str, marks: tuple[str, ...] = ()) -> str:
    """The text of a tokenizer.json. The same texts give the same bytes, on any number of cores."""
    from tokenizers import Tokenizer as Reference
    from tokenizers import decoders, models, pre_tokenizers, trainers

    reference = Reference(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = list(dict.fromkeys((end_of_text, *marks)))
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(texts, trainer)
    return reference.to_str(pretty=True)


class Tokenizer:
    """A tokenizer.json, opened. `encoder` says which library encodes; decoding is always the reference's."""

    def __init__(
        self, file: Path, *, end_of_text: str = "<|endoftext|>", encoder: Encoder = "tokenizers", named: str = "tokenizer.end_of_text"
    ) -> None:
        """named: what said which token ends a text, for the message.

        Raises InputError where the file is missing or malformed, gives an id twice, or has no end-of-text token.
        """
        from tokenizers import Tokenizer as Reference

        content = read(file)
        self._file = file
        try:
            self._reference = Reference.from_str(content)
        except Exception as error:  # noqa: BLE001  `tokenizers` raises nothing narrower
            raise InputError(
                f"{file}: not a tokenizer.json ({' '.join(str(error).split())}); wants one that tokenizers.Tokenizer saved"
            ) from None
        self._spec: dict[str, Any] = json.loads(content)
        self._check_ids(file)
        end = self._reference.token_to_id(end_of_text)
        if end is None:
            specials = ", ".join(token["content"] for token in self._spec["added_tokens"] if token["special"]) or "none"
            raise InputError(f"{file}: no token {end_of_text!r}; its special tokens: {specials}; set {named}")
        self.end_of_text: int = end
        self.fingerprint = fingerprint(content)
        # One more than the largest id: what an embedding must hold. Ids may have holes.
        self.vocabulary = max(self._reference.get_vocab(with_added_tokens=True).values()) + 1
        self.encoder: Encoder = encoder
        # A document that spells a special token means its letters, not an end of text.
        self._reference.encode_special_tokens = True

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Token ids of each text; no special token is added, none is recognised."""
        if self.encoder == "tokenizers":
            return self._encode_slowly(texts)
        fast = self._fast
        return [
            fast.encode_to_numpy(text, allowed_special=set(), disallowed_special=()) if _is_plain(text) else self._encode_slowly([text])[0]
            for text in texts
        ]

    def special_tokens(self) -> SpecialTokens:
        """What a masked objective is made with. Raises InputError where one is missing, or where a document could spell it."""
        found = [self._mark(*names) for names in zip(MARKS, _ELSEWHERE, strict=True)]
        special = {self.end_of_text, *found, *(token["id"] for token in self._spec["added_tokens"] if token["special"])}
        is_text = np.zeros(self.vocabulary, dtype=np.bool_)
        is_text[[number for number in self._reference.get_vocab(with_added_tokens=True).values() if number not in special]] = True
        cls, sep, mask, pad = found
        return SpecialTokens(end_of_text=self.end_of_text, cls=cls, sep=sep, mask=mask, pad=pad, is_text=is_text)

    def _mark(self, *names: str) -> int:
        found = {name: number for name in names if (number := self._reference.token_to_id(name)) is not None}
        wanted = f"wants {' '.join(MARKS)} (or {' '.join(_ELSEWHERE)}) for data.objective masked"
        if not found:
            remedy = "set tokenizer.file to one that has them, or leave it out to train one"
            raise InputError(f"{self._file}: got no token {' or '.join(names)}, {wanted}; {remedy}")
        name, number = next(iter(found.items()))
        if number in self._encode_slowly([name])[0]:
            raise InputError(f"{self._file}: got {name} for text that spells it, {wanted}; mark it as special among its added_tokens")
        return number

    def decode(self, ids: Iterable[int]) -> str:
        return self._reference.decode([int(i) for i in ids], skip_special_tokens=False)

    def choose_encoder(self, sample: list[str]) -> str:
        """Take tiktoken where it is proven equal on the sample, else the reference; say which and why."""
        obstacle = self._obstacle()
        if obstacle is None:
            self.encoder = "tiktoken"
            fast, slow = self.encode(sample), self._encode_slowly(sample)
            differ = sum(not np.array_equal(a, b) for a, b in zip(fast, slow, strict=True))
            if not differ:
                return f"tiktoken: same ids as tokenizers on {len(sample)} documents of the corpus"
            obstacle = f"tiktoken gave other ids on {differ} of {len(sample)} documents"
        self.encoder = "tokenizers"
        return f"tokenizers: {obstacle}"

    def _encode_slowly(self, texts: list[str]) -> list[Tokens]:
        return [np.array(e.ids, dtype=np.uint32) for e in self._reference.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _fast(self) -> Any:
        import tiktoken

        specials = {token["content"]: token["id"] for token in self._spec["added_tokens"]}
        byte = {letter: value for value, letter in _byte_letters().items()}
        ranks = {
            bytes(byte[letter] for letter in token): rank for token, rank in self._spec["model"]["vocab"].items() if token not in specials
        }
        return tiktoken.Encoding("manta", pat_str=_SPLIT, mergeable_ranks=ranks, special_tokens=specials)

    def _obstacle(self) -> str | None:
        """What of this tokenizer tiktoken has no word for, if anything."""
        spec, model = self._spec, self._spec["model"]
        if model["type"] != "BPE":
            return f"its model is {model['type']}, not BPE"
        specials = {token["content"] for token in spec["added_tokens"]}
        plain: dict[str, int] = {token: rank for token, rank in model["vocab"].items() if token not in specials}
        letters = set(_byte_letters().values())
        merged = ["".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
        options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        obstacles = {
            "it normalizes text": spec["normalizer"] is not None,
            "it does not split text as GPT-2 does": not _GPT2_SPLIT.items() <= (spec["pre_tokenizer"] or {}).items(),
            "its BPE has options of its own": any(model.get(option) for option in options),
            "it adds tokens that are not special": not all(token["special"] for token in spec["added_tokens"]),
            "its vocabulary is not of bytes": not letters <= plain.keys() or not all(letters.issuperset(token) for token in plain),
            # tiktoken merges in the order of ids, `tokenizers` in the order of its merges
            "its ids do not follow its merges": merged != sorted((token for token in plain if len(token) > 1), key=plain.__getitem__),
        }
        return next((obstacle for obstacle, stands in obstacles.items() if stands), None)

    def _check_ids(self, file: Path) -> None:
        owners: dict[int, str] = {}
        vocabulary = self._spec["model"]["vocab"]
        named = list(vocabulary.items()) if isinstance(vocabulary, dict) else [(entry[0], i) for i, entry in enumerate(vocabulary)]
        for token, number in [*named, *((added["content"], added["id"]) for added in self._spec["added_tokens"])]:
            if owners.setdefault(number, token) != token:
                raise InputError(f"{file}: id {number} stands for {owners[number]!r} and for {token!r}; wants one token an id")


def read(file: Path) -> str:
    """The text of a tokenizer.json, byte for byte."""
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({type(error).__name__}); wants a tokenizer.json: set tokenizer.file") from None


def fingerprint(content: str) -> str:
    """The identity of a tokenizer: the hash of its file."""
    return xxhash.xxh3_128_hexdigest(content.encode())


def _is_plain(text: str) -> bool:
    return len(text) < _LONG_BLANK or all(len(blank) < _LONG_BLANK for blank in re.findall(r"\s+", text))


def _byte_letters() -> dict[int, str]:
    """Byte -> the printable letter that stands for it in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
