"""From windows of text to examples, as a config's objective wants them: which of `objectives` and `masking` is called with what."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from manta.data.config import DataConfig
from manta.data.objectives import causal, masked
from manta.data.objectives.causal import Examples
from manta.data.sampling.windows import Shape, Text
from manta.data.tokenizer.tokenizer import Tokenizer

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Read:
    """The windows of K samples, and where pairs are drawn, the windows that B is cut from."""

    text: Text
    following: Text | None = None
    pairs: masked.Pairs | None = None


class Objective:
    def __init__(self, data: DataConfig, tokenizer: Tokenizer) -> None:
        """Raises InputError where the tokenizer lacks what the objective needs."""
        self._data = data
        self._end_of_text = tokenizer.end_of_text
        self._special = tokenizer.special_tokens(whole_words=data.whole_words) if data.objective == "masked" else None
        self._marks = tokenizer.fim_tokens() if data.fill_in_the_middle else None
        self.shape = shape_of(data)

    @property
    def draws_pairs(self) -> bool:
        """Whether each sample wants a second window."""
        return self._special is not None and self._data.pairs == "next_sentence"

    def __call__(self, read: Read, samples: Numbers, *, seed: int | None, length: int | None = None) -> Examples:
        """The examples of samples [K]; with a shorter length than the config's, so many more rows. seed: None for validation."""
        if self._special is not None:
            return self._masked(read, samples, seed)
        parts = self._data.sequence_length // (length or self._data.sequence_length)
        if parts == 1:
            return self._causal(read.text, samples, causal.keyed(samples, seed))
        text = Text(tokens=causal.shorter(read.text.tokens, self._data.sequence_length // parts))
        cut, samples = np.tile(np.arange(parts), len(samples)), np.repeat(samples, parts)
        return replace(self._causal(text, samples, causal.keyed(samples, seed, cut)), cut=cut)

    def _causal(self, text: Text, samples: Numbers, keys: NDArray[np.uint64]) -> Examples:
        tokens_KW, documents_KW = text.tokens, text.documents
        if documents_KW is None and (self._data.separate_documents or self._marks):
            documents_KW = causal.number_documents(tokens_KW, self._end_of_text)
        if self._marks is not None:
            assert documents_KW is not None
            tokens_KW, documents_KW = causal.fill_in_the_middle(
                tokens_KW,
                documents_KW,
                keys,
                rate=self._data.fill_in_the_middle,
                suffix_first=self._data.suffix_first,
                marks=self._marks,
                end_of_text=self._end_of_text,
            )
        return causal.causal(tokens_KW, samples, self._kept_apart(text, documents_KW))

    def _masked(self, read: Read, samples: Numbers, seed: int | None) -> Examples:
        special, data, text = self._special, self._data, read.text
        assert special is not None
        documents_KW = text.documents
        if documents_KW is None and data.separate_documents:
            documents_KW = causal.number_documents(text.tokens, self._end_of_text)
        documents_KW = self._kept_apart(text, documents_KW)
        if read.following is not None and read.pairs is not None:
            second_KW = read.following.tokens
            both = None if documents_KW is None else (documents_KW, causal.number_documents(second_KW, self._end_of_text))
            framed = masked.next_sentence(text.tokens, second_KW, read.pairs, special, both)
        elif data.pairs == "sentence_order":
            framed = masked.sentence_order(text.tokens, causal.keyed(samples, seed), special, documents_KW)
        else:
            framed = masked.alone(text.tokens, causal.keyed(samples, seed), special, documents_KW)
        return masked.masked(framed, samples, share=data.mask_share, special=special, whole_words=data.whole_words)

    def _kept_apart(self, text: Text, documents_KW: Numbers | None) -> Numbers | None:
        """Documents as attention is told of them: where they may see each other, only padding is none of them."""
        if documents_KW is None or self._data.separate_documents:
            return documents_KW
        return None if text.documents is None else causal.as_one(documents_KW)


def shape_of(data: DataConfig) -> Shape:
    """How the objective takes its text."""
    if data.objective == "masked":
        width = data.sequence_length - masked.FRAME[data.pairs]
        return Shape(width=width, stride=width)
    return Shape(width=data.sequence_length + 1, stride=data.sequence_length)
