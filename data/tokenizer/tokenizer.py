"""Encode text to token ids and back with a tokenizer.json.

The library `tokenizers` is the reference. tiktoken, with the same vocabulary, is about ten times as fast; it is used only after it has
produced the same ids on a sample of the documents to be encoded (`choose_encoder`).
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic_core import from_json

from manta.data.errors import InputError, cut, one_line
from manta.data.storage.regular_file import read_regular
from manta.data.tokenizer import byte_level

Encoder = Literal["tokenizers", "tiktoken"]
Tokens = NDArray[np.uint32]

MASKING_TOKENS = ("[CLS]", "[SEP]", "[MASK]", "[PAD]")  # for a masked objective, in a tokenizer trained here
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")  # for fill-in-the-middle

_ROBERTA_TOKENS = ("<s>", "</s>", "<mask>", "<pad>")
_OTHER_FIM_TOKENS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek  # noqa: RUF001  its own bars
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)
_MAX_BYTES = 2**27  # of a tokenizer.json; those of 256,000 tokens have 35 MB
_MAX_VOCABULARY = 2**24  # a larger id is a mistake: its embedding would take many gigabytes


class SpecialTokens(NamedTuple):
    """The special tokens of a masked objective. Arrays are indexed by token id."""

    end_of_text: int
    cls: int
    sep: int
    mask: int
    pad: int
    is_text: NDArray[np.bool_]  # [vocabulary]: whether text is made of this token
    begins_word: NDArray[np.bool_] | None = None  # [vocabulary]; None if the tokens do not show where words start


class FimTokens(NamedTuple):
    """The tokens that mark the parts of a document for fill-in-the-middle."""

    prefix: int
    suffix: int
    middle: int


class Tokenizer:
    """A loaded tokenizer.json. `encoder` is the library that encodes; the reference always decodes."""

    def __init__(
        self, file: Path, *, end_of_text: str = "<|endoftext|>", encoder: Encoder = "tokenizers", key: str = "tokenizer.end_of_text"
    ) -> None:
        """key: what set `end_of_text`, for errors.

        Raises InputError if the file is missing or malformed, uses an id twice, or has no end-of-text token.
        """
        self.file = file
        content = read_tokenizer(file)
        self._reference = _open(file, content)
        # A file may ask to truncate or pad texts; documents are encoded in full.
        self._reference.no_truncation()
        self._reference.no_padding()
        end = self._reference.token_to_id(end_of_text)
        if end is None:
            special = ", ".join(token["content"] for token in self._spec["added_tokens"] if token["special"]) or "none"
            problem = f"expected a token {cut(repr(end_of_text))}, got only the special tokens {cut(special)}"
            raise InputError(f"{file}: {problem}. Set {key}.")
        self.end_of_text: int = end
        self.end_of_text_name = end_of_text
        self.fingerprint = fingerprint(content)
        # One more than the largest id, the size of an embedding; ids may have gaps.
        self.vocabulary = max(self._reference.get_vocab(with_added_tokens=True).values()) + 1
        self.encoder: Encoder = encoder
        # The name of a special token in a document is text.
        self._reference.encode_special_tokens = True

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Return the ids of each text, without special tokens: text that contains their names stays text."""
        return self._encode_reference(texts) if self.encoder == "tokenizers" else [self._encode_fast(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self._reference.decode([int(i) for i in ids], skip_special_tokens=False)

    def choose_encoder(self, sample: list[str]) -> str:
        """Use tiktoken if it equals the reference on the sample, else the reference. Return the choice and its reason."""
        obstacle = byte_level.tiktoken_obstacle(self._spec) or self._mismatch(sample)
        self.encoder = "tokenizers" if obstacle else "tiktoken"
        return f"tokenizers: {obstacle}" if obstacle else f"tiktoken: same ids as tokenizers on {_extent(sample)} of the corpus"

    def special_tokens(self, *, whole_words: bool = False) -> SpecialTokens:
        """Return the tokens that a masked objective needs.

        Raises InputError if one is missing, if a document could contain it, or if `whole_words` is set and word starts are unknown.
        """
        expected = f"{' '.join(MASKING_TOKENS)} (or {' '.join(_ROBERTA_TOKENS)}) for data.objective masked"
        cls, sep, mask, pad = (self._special_id(names, expected) for names in zip(MASKING_TOKENS, _ROBERTA_TOKENS, strict=True))
        special = {self.end_of_text, cls, sep, mask, pad, *(token["id"] for token in self._spec["added_tokens"] if token["special"])}
        is_text = np.zeros(self.vocabulary, dtype=np.bool_)
        vocabulary = self._reference.get_vocab(with_added_tokens=True)
        is_text[[token for token in vocabulary.values() if token not in special]] = True
        begins_word = self._word_starts(vocabulary)
        if begins_word is not None:
            begins_word |= ~is_text
        elif whole_words:
            problem = "expected WordPiece, a byte-level model or one that writes ▁ before words, got tokens without word boundaries"
            raise InputError(f"{self.file}: {problem}. Set data.whole_words to false.")
        return SpecialTokens(end_of_text=self.end_of_text, cls=cls, sep=sep, mask=mask, pad=pad, is_text=is_text, begins_word=begins_word)

    def token_bytes(self) -> NDArray[np.int64]:
        """Return how many bytes of text each token stands for [vocabulary]; 0 for special tokens and for ids without a token.

        They sum to the size of a text as its tokens spell it: after normalization, without spaces that a tokenizer drops (WordPiece), and
        with those that it adds.
        """
        model = self._spec["model"]
        added = {token["content"]: token["special"] for token in self._spec["added_tokens"]}
        prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
        unknown = model.get("unk_token") if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]  # Unigram has an id
        sizes = np.zeros(self.vocabulary, dtype=np.int64)
        for name, token in self._reference.get_vocab(with_added_tokens=True).items():
            if added.get(name, name == unknown) or token == self.end_of_text:
                continue
            if name in added:
                sizes[token] = len(name.encode())
            elif "ByteLevel" in self._steps:
                sizes[token] = len(name)  # a letter stands for a byte
            elif model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", name):
                sizes[token] = 1
            else:
                spelled = name.removesuffix(suffix)
                sizes[token] = len((spelled if spelled == prefix else spelled.removeprefix(prefix)).replace("▁", " ").encode())
        return sizes

    def fim_tokens(self) -> FimTokens:
        """Return the tokens that fill-in-the-middle needs. Raises InputError if one is missing, or if a document could contain it."""
        spellings = (FIM_TOKENS, *_OTHER_FIM_TOKENS)
        names = max(spellings, key=lambda names: sum(self._reference.token_to_id(name) is not None for name in names))
        others = ", or ".join(" ".join(names) for names in _OTHER_FIM_TOKENS)
        expected = f"{' '.join(FIM_TOKENS)} (or {others}) for data.fill_in_the_middle"
        prefix, suffix, middle = (self._special_id((name,), expected) for name in names)
        return FimTokens(prefix=prefix, suffix=suffix, middle=middle)

    def _mismatch(self, sample: list[str]) -> str | None:
        try:
            fast = [self._encode_fast(text) for text in sample]
        except ValueError as error:
            return f"tiktoken cannot compile its pattern ({one_line(error)})"
        differ = sum(not np.array_equal(a, b) for a, b in zip(fast, self._encode_reference(sample), strict=True))
        return f"tiktoken gave other ids on {differ} of {_extent(sample)}" if differ else None

    def _encode_fast(self, text: str) -> Tokens:
        encoding, added_tokens = self._tiktoken
        if self._spec["normalizer"] is not None and not unicodedata.is_normalized("NFC", text):
            return self._encode_reference([text])[0]
        try:
            return encoding.encode_to_numpy(text, allowed_special=added_tokens, disallowed_special=())
        except ValueError:  # its regular expression overflows its stack near a million spaces in a row
            return self._encode_reference([text])[0]

    def _encode_reference(self, texts: list[str]) -> list[Tokens]:
        try:
            encodings = self._reference.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            if not _is_of_tokenizers(error):
                raise
            problem = f"expected a token for any text, got a document it cannot encode ({one_line(error)})"
            raise InputError(f"{self.file}: {problem}. Set its unknown token to one that it has.") from None
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    @cached_property
    def _tiktoken(self) -> tuple[Any, frozenset[str]]:
        return byte_level.tiktoken_encoding(self._spec, self.end_of_text_name)

    @cached_property
    def _spec(self) -> dict[str, Any]:
        """The content of the file, with all optional fields."""
        return json.loads(self._reference.to_str())

    @cached_property
    def _steps(self) -> frozenset[str]:
        """The types of the pre-tokenizers."""
        pre_tokenizer = self._spec["pre_tokenizer"] or {}
        return frozenset(step["type"] for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if step)

    def _special_id(self, names: tuple[str, ...], expected: str) -> int:
        """Return the id of the first of these tokens that exists."""
        found = {name: token for name in names if (token := self._reference.token_to_id(name)) is not None}
        if not found:
            remedy = "Set tokenizer.file to one that has them, or omit it to train one."
            raise InputError(f"{self.file}: expected {expected}, got no token {' or '.join(names)}. {remedy}")
        name, token = next(iter(found.items()))
        if token in self._encode_reference([name])[0]:
            raise InputError(f"{self.file}: expected {expected}, got {name} for text as well. Mark it as special among its added_tokens.")
        return token

    def _word_starts(self, vocabulary: dict[str, int]) -> NDArray[np.bool_] | None:
        """Return whether each token of the vocabulary starts a word; None if its spelling does not show it."""
        model = self._spec["model"]
        if prefix := model.get("continuing_subword_prefix"):
            continuations = [token for name, token in vocabulary.items() if name.startswith(prefix)]
        elif "ByteLevel" in self._steps:
            inner = byte_level.letters_within_words()
            continuations = [token for name, token in vocabulary.items() if name[:1] in inner]
        elif "Metaspace" in self._steps or any(name.startswith("▁") for name in vocabulary):
            continuations = [token for name, token in vocabulary.items() if not name.startswith("▁")]
        elif model["type"] == "WordLevel":
            continuations = []
        else:
            return None
        starts = np.ones(self.vocabulary, dtype=np.bool_)
        starts[continuations] = False
        return starts


def read_tokenizer(file: Path) -> str:
    """Return the text of a tokenizer.json, unchanged. Raises InputError if it is no regular file, or too large."""
    try:
        return read_regular(file, _MAX_BYTES).decode()
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else one_line(error)
        raise InputError(f"{file}: expected a readable tokenizer.json, got an error: {problem}. Set tokenizer.file.") from None


def read_vocabulary(file: Path) -> dict[str, int]:
    """Return the id of every token, special tokens included. Raises InputError if the file is missing or malformed."""
    return _open(file, read_tokenizer(file)).get_vocab(with_added_tokens=True)


def fingerprint(content: str) -> str:
    """Return the identity of a tokenizer: the hash of its file."""
    return xxhash.xxh3_128_hexdigest(content.encode())


def _open(file: Path, content: str) -> Any:
    from tokenizers import Tokenizer as Reference

    try:
        reference, spec = Reference.from_str(content), from_json(content)
    except BaseException as error:
        if not isinstance(error, ValueError) and not _is_of_tokenizers(error):
            raise
        problem = f"expected a tokenizer.json as tokenizers.Tokenizer saves it, got an invalid one ({one_line(error)})"
        raise InputError(f"{file}: {problem}. Set tokenizer.file to another.") from None
    _check_ids(file, spec)
    return reference


def _is_of_tokenizers(error: BaseException) -> bool:
    """`tokenizers` raises nothing narrower than Exception, and panics with what is no Exception."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _check_ids(file: Path, spec: dict[str, Any]) -> None:
    vocabulary = spec["model"]["vocab"]
    tokens = list(vocabulary.items()) if isinstance(vocabulary, dict) else [(entry[0], i) for i, entry in enumerate(vocabulary)]
    tokens += [(added["content"], added["id"]) for added in spec.get("added_tokens", [])]
    names: dict[int, str] = {}
    for name, token in tokens:
        if token >= _MAX_VOCABULARY:
            problem = f"expected ids below {_MAX_VOCABULARY}, got {token} for {cut(repr(name))}"
            raise InputError(f"{file}: {problem}. Set tokenizer.file to another.")
        if names.setdefault(token, name) != name:
            problem = f"expected one token per id, got {cut(repr(names[token]))} and {cut(repr(name))} for {token}"
            raise InputError(f"{file}: {problem}. Set tokenizer.file to another.")


def _extent(sample: list[str]) -> str:
    return f"{len(sample)} documents, {sum(len(text.encode()) for text in sample)} bytes,"
