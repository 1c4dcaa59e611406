"""Text to token ids and back, by a tokenizer.json.

`tokenizers` is the reference: what it says is right. tiktoken, given the same vocabulary, is some ten times as fast and is used
once it has given the same ids on a sample of the very documents to be encoded (`choose_encoder`).
"""

import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from manta.data.errors import InputError
from manta.data.tokenizer import byte_level

Encoder = Literal["tokenizers", "tiktoken"]
Tokens = NDArray[np.uint32]

MARKS = ("[CLS]", "[SEP]", "[MASK]", "[PAD]")  # what a masked objective needs, as a tokenizer of ours spells it
_ELSEWHERE = ("<s>", "</s>", "<mask>", "<pad>")  # and as others do
FIM_MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")  # what fill-in-the-middle needs, as a tokenizer of ours spells it
_FIM_ELSEWHERE = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek  # noqa: RUF001  the bars are its own
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)
_REMEDY = "set tokenizer.file to one that has them, or leave it out to train one"
_LARGEST = 2**24  # ids of a tokenizer; what is beyond is a mistake, and would be an embedding of many gigabytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpecialTokens:
    """The ids that are no text."""

    end_of_text: int
    cls: int
    sep: int
    mask: int
    pad: int
    is_text: NDArray[np.bool_]  # [vocabulary]: whether an id is that of a token which text is made of
    begins_word: NDArray[np.bool_] | None = None  # [vocabulary]: whether a token is the first of a word; None where tokens do not tell


@dataclass(frozen=True, slots=True, kw_only=True)
class FimTokens:
    """The ids of the marks around the parts of a document whose middle is to be filled in."""

    prefix: int
    suffix: int
    middle: int


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
        _check_ids(file, json.loads(content))
        # A file may say to cut or fill up texts; ours are whole documents.
        self._reference.no_truncation()
        self._reference.no_padding()
        end = self._reference.token_to_id(end_of_text)
        if end is None:
            specials = ", ".join(token["content"] for token in self._spec["added_tokens"] if token["special"]) or "none"
            raise InputError(f"{file}: no token {end_of_text!r}; its special tokens: {specials}; set {named}")
        self.end_of_text: int = end
        self._end_of_text = end_of_text
        self.fingerprint = fingerprint(content)
        # One more than the largest id: what an embedding must hold. Ids may have holes.
        self.vocabulary = max(self._reference.get_vocab(with_added_tokens=True).values()) + 1
        self.encoder: Encoder = encoder
        # A document that spells a special token means its letters, not an end of text.
        self._reference.encode_special_tokens = True

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Token ids of each text; no special token is added, none is recognised. Raises InputError where a text has none."""
        if self.encoder == "tokenizers":
            return self._encode_slowly(texts)
        return [self._encode_fast(text) for text in texts]

    def special_tokens(self, *, whole_words: bool = False) -> SpecialTokens:
        """What a masked objective is made with.

        Raises InputError where one is missing, where a document could spell it, or where nothing tells which tokens begin `whole_words`.
        """
        wanted = f"wants {' '.join(MARKS)} (or {' '.join(_ELSEWHERE)}) for data.objective masked"
        found = [self._mark(names, wanted) for names in zip(MARKS, _ELSEWHERE, strict=True)]
        special = {self.end_of_text, *found, *(token["id"] for token in self._spec["added_tokens"] if token["special"])}
        is_text = np.zeros(self.vocabulary, dtype=np.bool_)
        is_text[[number for number in self._reference.get_vocab(with_added_tokens=True).values() if number not in special]] = True
        begins_word = self._begins_word()
        if begins_word is not None:
            begins_word |= ~is_text
        elif whole_words:
            wants = "wants WordPiece, a byte-level model or one that writes ▁ before words for data.whole_words"
            raise InputError(f"{self._file}: got tokens that do not tell where a word begins, {wants}; set it to false")
        cls, sep, mask, pad = found
        return SpecialTokens(end_of_text=self.end_of_text, cls=cls, sep=sep, mask=mask, pad=pad, is_text=is_text, begins_word=begins_word)

    def fim_tokens(self) -> FimTokens:
        """What fill-in-the-middle is made with. Raises InputError where one is missing, or where a document could spell it."""
        spellings = (FIM_MARKS, *_FIM_ELSEWHERE)
        has = {name for names in spellings for name in names if self._reference.token_to_id(name) is not None}
        names = max(spellings, key=lambda names: len(has.intersection(names)))
        others = ", or ".join(" ".join(names) for names in _FIM_ELSEWHERE)
        wanted = f"wants {' '.join(FIM_MARKS)} (or {others}) for data.fill_in_the_middle"
        prefix, suffix, middle = (self._mark((name,), wanted) for name in names)
        return FimTokens(prefix=prefix, suffix=suffix, middle=middle)

    def decode(self, ids: Iterable[int]) -> str:
        return self._reference.decode([int(i) for i in ids], skip_special_tokens=False)

    def choose_encoder(self, sample: list[str]) -> str:
        """Take tiktoken where it is proven equal on the sample, else the reference; say which and why."""
        obstacle = byte_level.obstacle(self._spec) or self._mismatch(sample)
        self.encoder = "tokenizers" if obstacle else "tiktoken"
        if obstacle:
            return f"tokenizers: {obstacle}"
        return f"tiktoken: same ids as tokenizers on {_extent(sample)} of the corpus"

    def _mismatch(self, sample: list[str]) -> str | None:
        try:
            fast = [self._encode_fast(text) for text in sample]
        except ValueError as error:
            return f"tiktoken can not compile its pattern ({' '.join(str(error).split())})"
        differ = sum(not np.array_equal(a, b) for a, b in zip(fast, self._encode_slowly(sample), strict=True))
        return f"tiktoken gave other ids on {differ} of {_extent(sample)}" if differ else None

    def _encode_fast(self, text: str) -> Tokens:
        fast, spelled = self._fast
        if self._composes and not unicodedata.is_normalized("NFC", text):
            return self._encode_slowly([text])[0]
        try:
            return fast.encode_to_numpy(text, allowed_special=spelled, disallowed_special=())
        except ValueError:  # its regular expression overflows its stack near a million blanks in a row
            return self._encode_slowly([text])[0]

    def _encode_slowly(self, texts: list[str]) -> list[Tokens]:
        try:
            found = self._reference.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:
            if type(error) is not Exception:  # `tokenizers` raises nothing narrower
                raise
            problem = f"cannot encode a document ({' '.join(str(error).split())})"
            raise InputError(f"{self._file}: {problem}; wants a token for any text: name an unknown token that it has") from None
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]

    @cached_property
    def _fast(self) -> tuple[Any, frozenset[str]]:
        return byte_level.encoding(self._spec, self._end_of_text)

    @cached_property
    def _composes(self) -> bool:
        """Whether letters and their accents become one letter. A text that is written so needs nothing done."""
        return self._spec["normalizer"] is not None

    @cached_property
    def _spec(self) -> dict[str, Any]:
        """The file, with all that it may leave out."""
        return json.loads(self._reference.to_str())

    def _mark(self, names: tuple[str, ...], wanted: str) -> int:
        found = {name: number for name in names if (number := self._reference.token_to_id(name)) is not None}
        if not found:
            raise InputError(f"{self._file}: got no token {' or '.join(names)}, {wanted}; {_REMEDY}")
        name, number = next(iter(found.items()))
        if number in self._encode_slowly([name])[0]:
            raise InputError(f"{self._file}: got {name} for text that spells it, {wanted}; mark it as special among its added_tokens")
        return number

    def _begins_word(self) -> NDArray[np.bool_] | None:
        """[vocabulary]: whether a word begins with the token, as far as its spelling tells; None where it does not."""
        model, numbers = self._spec["model"], self._reference.get_vocab(with_added_tokens=True)
        split = self._spec["pre_tokenizer"] or {}
        steps = {step["type"] for step in split.get("pretokenizers", [split]) if step}
        if prefix := model.get("continuing_subword_prefix"):
            continues = {number for token, number in numbers.items() if token.startswith(prefix)}
        elif "ByteLevel" in steps:
            within = byte_level.letters_within_words()
            continues = {number for token, number in numbers.items() if token[:1] in within}
        elif "Metaspace" in steps or any(token.startswith("▁") for token in numbers):
            continues = {number for token, number in numbers.items() if not token.startswith("▁")}
        elif model["type"] == "WordLevel":
            continues = set()
        else:
            return None
        begins = np.ones(self.vocabulary, dtype=np.bool_)
        begins[list(continues)] = False
        return begins


def read(file: Path) -> str:
    """The text of a tokenizer.json, byte for byte."""
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({type(error).__name__}); wants a tokenizer.json: set tokenizer.file") from None


def ids(file: Path) -> dict[str, int]:
    """Every token's number, special ones among them."""
    from tokenizers import Tokenizer as Reference

    return Reference.from_str(read(file)).get_vocab(with_added_tokens=True)


def fingerprint(content: str) -> str:
    """The identity of a tokenizer: the hash of its file."""
    return xxhash.xxh3_128_hexdigest(content.encode())


def _check_ids(file: Path, spec: dict[str, Any]) -> None:
    owners: dict[int, str] = {}
    vocabulary = spec["model"]["vocab"]
    named = list(vocabulary.items()) if isinstance(vocabulary, dict) else [(entry[0], i) for i, entry in enumerate(vocabulary)]
    for token, number in [*named, *((added["content"], added["id"]) for added in spec.get("added_tokens", []))]:
        if number >= _LARGEST:
            raise InputError(f"{file}: id {number} stands for {token!r}; wants ids below {_LARGEST}")
        if owners.setdefault(number, token) != token:
            raise InputError(f"{file}: id {number} stands for {owners[number]!r} and for {token!r}; wants one token an id")


def _extent(sample: list[str]) -> str:
    return f"{len(sample)} documents, {sum(len(text.encode()) for text in sample)} bytes,"
