"""Windows of text to examples, as the config's objective requires."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from manta.data.config import DataConfig
from manta.data.hashing import Hashes
from manta.data.objectives import causal, masked
from manta.data.objectives.examples import Examples, merge_documents, number_documents, sample_keys
from manta.data.shards.windows import Windows, WindowShape
from manta.data.tokenizer.tokenizer import Tokenizer

Numbers = NDArray[np.int64]


class Objective:
    def __init__(self, data: DataConfig, tokenizer: Tokenizer) -> None:
        """Raises InputError if the tokenizer lacks tokens that the objective needs."""
        self._data = data
        self._end_of_text = tokenizer.end_of_text
        self._special = tokenizer.special_tokens(whole_words=data.whole_words) if data.objective == "masked" else None
        self._marks = tokenizer.fim_tokens() if data.fill_in_the_middle else None
        self.shape = window_shape(data)

    @property
    def needs_pairs(self) -> bool:
        """Whether each sample needs a second window."""
        return self._special is not None and self._data.pairs == "next_sentence"

    def __call__(self, windows: Windows, samples: Numbers, *, seed: int | None, sequence_length: int | None = None) -> Examples:
        """Return the examples of samples [K]: T / sequence_length for each if sequences are shorter. seed: None for validation."""
        if self._special is not None:
            return replace(self._masked(windows, samples, sample_keys(samples, seed)), sources=windows.sources)
        parts = self._data.sequence_length // (sequence_length or self._data.sequence_length)
        if parts == 1:
            return replace(self._causal(windows, samples, sample_keys(samples, seed)), sources=windows.sources)
        sources = None if windows.sources is None else np.repeat(windows.sources, parts)
        windows = Windows(tokens=causal.split_windows(windows.tokens, self._data.sequence_length // parts))
        part, samples = np.tile(np.arange(parts), len(samples)), np.repeat(samples, parts)
        return replace(self._causal(windows, samples, sample_keys(samples, seed, part)), part=part, sources=sources)

    def _causal(self, windows: Windows, samples: Numbers, keys: Hashes) -> Examples:
        data, tokens_KW, documents_KW = self._data, windows.tokens, self._documents(windows)
        if self._marks is not None and documents_KW is not None:
            rate, suffix_first, end_of_text = data.fill_in_the_middle, data.suffix_first, self._end_of_text
            tokens_KW, documents_KW = causal.fill_in_the_middle(
                tokens_KW, documents_KW, keys, rate=rate, suffix_first=suffix_first, marks=self._marks, end_of_text=end_of_text
            )
        return causal.causal_examples(tokens_KW, samples, self._visible_documents(windows, documents_KW))

    def _masked(self, windows: Windows, samples: Numbers, keys: Hashes) -> Examples:
        special, data, tokens_KW = self._special, self._data, windows.tokens
        assert special is not None
        documents_KW = self._visible_documents(windows, self._documents(windows))
        if windows.second is not None:
            both = None if documents_KW is None else (documents_KW, number_documents(windows.second, self._end_of_text))
            framed = masked.frame_next_sentence(windows, samples, keys, special, both)
        elif data.pairs == "sentence_order":
            framed = masked.frame_sentence_order(tokens_KW, samples, keys, special, documents_KW)
        else:
            framed = masked.frame_text(tokens_KW, samples, special, documents_KW)
        return masked.mask_tokens(framed, keys, share=data.mask_share, special=special, whole_words=data.whole_words)

    def _documents(self, windows: Windows) -> Numbers | None:
        """Return the document of each token, if the objective needs it."""
        if windows.documents is None and (self._data.separate_documents or self._marks):
            return number_documents(windows.tokens, self._end_of_text)
        return windows.documents

    def _visible_documents(self, windows: Windows, documents_KW: Numbers | None) -> Numbers | None:
        """Return the documents that limit attention. If documents may see each other, only padding is kept out."""
        if documents_KW is None or self._data.separate_documents:
            return documents_KW
        return None if windows.documents is None else merge_documents(documents_KW)


def window_shape(data: DataConfig) -> WindowShape:
    """Return the shape of the windows that the objective reads.

    A causal window has T + 1 tokens, T inputs and their T targets, and shares one token with the next window, so that every token is
    predicted once per epoch. Masked windows do not overlap and leave room for [CLS] and [SEP].
    """
    if data.objective == "masked":
        width = data.sequence_length - masked.FRAME[data.pairs]
        return WindowShape(width=width, stride=width)
    return WindowShape(width=data.sequence_length + 1, stride=data.sequence_length)
