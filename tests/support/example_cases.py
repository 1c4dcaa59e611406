"""Helpers for tests of examples: documents in windows, rows of examples, digests and statistics."""

import numpy as np
import xxhash
from hypothesis import strategies as st

from manta.data.objectives.examples import Examples
from manta.data.tokenizer.tokenizer import SpecialTokens

END = 0
FIELDS = [name for name in Examples.__slots__ if name not in {"part", "sources"}]  # digests are older than these fields
ONLY = np.zeros(1, dtype=np.int64)
DOCUMENTS = st.lists(st.lists(st.integers(10, 99), max_size=12).map(lambda text: [*text, END]), min_size=1, max_size=6)

V, CLS, SEP, MASK, PAD = 50, 1, 2, 3, 4
BEGINS_WORD = np.arange(V) % 3 == 0
SPECIAL = SpecialTokens(end_of_text=END, cls=CLS, sep=SEP, mask=MASK, pad=PAD, is_text=np.arange(V) > PAD, begins_word=BEGINS_WORD)


def rows(examples: Examples) -> list[dict[str, list[int] | int | None]]:
    """Return each example's fields as lists."""
    arrays = {name: getattr(examples, name) for name in FIELDS}
    return [{name: None if value is None else value[k].tolist() for name, value in arrays.items()} for k in range(len(examples.samples))]


def digest(examples: Examples) -> str:
    """Return a hash of all fields, with their types and shapes."""
    found = xxhash.xxh3_64()
    for name in FIELDS:
        value = getattr(examples, name)
        found.update((name if value is None else f"{name}{value.dtype}{value.shape}").encode())
        found.update(b"" if value is None else np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def near(outcomes: np.ndarray, share: float) -> bool:
    """Whether the share of true outcomes is within five standard deviations of the expected one."""
    return abs(outcomes.mean() - share) < 5 * np.sqrt(share * (1 - share) / outcomes.size)


def bins(*documents_by_row: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return whole documents side by side, padded: tokens [K, W], documents [K, W]."""
    tokens_KW, documents_KW = np.full((len(documents_by_row), width), END), np.full((len(documents_by_row), width), -1)
    for text, numbers, documents in zip(tokens_KW, documents_KW, documents_by_row, strict=True):
        tokens = [token for document in documents for token in document]
        text[: len(tokens)] = tokens
        numbers[: len(tokens)] = [number for number, document in enumerate(documents) for _ in document]
    return tokens_KW, documents_KW
