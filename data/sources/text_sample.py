"""A sample of the text of many splits, which a tokenizer is trained on."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from manta.data.sampling.order import Permutation
from manta.data.source_config import FilterConfig
from manta.data.sources.filters import Filter
from manta.data.sources.input_split import BadRow, InputSplit


def sample_text(splits: Sequence[tuple[InputSplit, FilterConfig]], size: int) -> Iterator[str]:
    """Yield about `size` bytes of text, spread over all splits in shuffled order."""
    order = Permutation(len(splits), key=0)(np.arange(len(splits)))
    for remaining, index in zip(range(len(splits), 0, -1), order, strict=True):
        share = math.ceil(size / remaining)
        split, document_filter = splits[int(index)][0], Filter(splits[int(index)][1])
        for document in split.documents():
            if share <= 0:
                break
            if isinstance(document, BadRow) or not isinstance(document.content, str) or document_filter.rejection(document.content):
                continue
            part = document.content[:share]
            yield part
            used = len(part.encode())
            share, size = share - used, size - used
        if size <= 0:
            return
