"""Examples as readable text: documents, special tokens by name, and what a masked objective predicts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from manta.data.objectives.examples import IGNORED, PADDING, Examples, document_starts, number_documents
from manta.data.tokenizer.tokenizer import Tokenizer, read_tokenizer

Tokens = NDArray[np.int64]
Kind = Literal["text", "special", "hidden", "replaced", "kept"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedPiece:
    """Consecutive text tokens, or a single token of another kind."""

    kind: Kind
    """The targets of a masked objective are hidden by [MASK], replaced by another token, or kept."""
    text: str
    """As the model sees it."""
    wanted: str | None = None
    """The target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedDocument:
    """A document, or the part of it in a sequence."""

    tokens: int
    text: str
    pieces: list[RenderedPiece]


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedSequence:
    documents: list[RenderedDocument]
    padding: int
    """Padding tokens at the end."""


class Renderer:
    """Renders examples with a tokenizer and its special tokens."""

    def __init__(self, file: Path, *, end_of_text: str, masked: bool) -> None:
        """file: tokenizer.json. masked: whether targets are masked tokens instead of next tokens."""
        self._tokenizer = Tokenizer(file, end_of_text=end_of_text)
        added = json.loads(read_tokenizer(file)).get("added_tokens", [])
        self._special = {self._tokenizer.end_of_text, *(token["id"] for token in added if token["special"])}
        self._mask = None
        if masked:
            marks = self._tokenizer.special_tokens()
            self._special |= {marks.cls, marks.sep, marks.mask, marks.pad}
            self._mask = marks.mask

    def __call__(self, examples: Examples, separated: Examples) -> Iterator[RenderedSequence]:
        """Yield each example. separated: the same examples with separated documents, which shows where they end."""
        assert separated.documents is not None, "documents are separated"
        for row in range(len(examples.tokens)):
            tokens, targets, documents = examples.tokens[row], examples.targets[row], separated.documents[row]
            if self._mask is None:  # also show the target of the last token
                last = targets[-1:][targets[-1:] != IGNORED]
                after = documents[-1:] + (separated.targets[row, -1] == IGNORED)
                tokens, documents = np.append(tokens, last), np.append(documents, after[: len(last)])
                targets = np.full_like(tokens, IGNORED)
            elif examples.segments is not None:  # documents on both sides of a pair's [SEP] count as one: show them as two
                original = np.where(targets == IGNORED, tokens, targets)
                documents = number_documents(original[None], self._tokenizer.end_of_text)[0] + examples.segments[row]
            yield self._sequence(tokens, targets, documents)

    def _sequence(self, tokens: Tokens, targets: Tokens, documents: Tokens) -> RenderedSequence:
        real = documents != PADDING
        starts = np.flatnonzero(document_starts(documents[None, real])).tolist()
        shown, wanted = tokens[real].tolist(), targets[real].tolist()
        ends = [*starts[1:], len(shown)]
        rendered = [self._document(shown[start:end], wanted[start:end]) for start, end in zip(starts, ends, strict=True)]
        return RenderedSequence(documents=rendered, padding=int((~real).sum()))

    def _document(self, shown: list[int], targets: list[int]) -> RenderedDocument:
        pieces = list(self._pieces(shown, targets))
        return RenderedDocument(tokens=len(shown), text="".join(piece.text for piece in pieces), pieces=pieces)

    def _pieces(self, shown: list[int], targets: list[int]) -> Iterator[RenderedPiece]:
        original = [token if target == IGNORED else target for token, target in zip(shown, targets, strict=True)]
        kinds: list[Kind] = [self._kind(*pair) for pair in zip(shown, targets, strict=True)]
        start = 0
        for kind, group in groupby(kinds):
            end = start + len(list(group))
            if kind == "text":
                yield RenderedPiece(kind="text", text=self._decode(original, start, end))
            else:
                yield from (self._single(kind, shown[at], original, at) for at in range(start, end))
            start = end

    def _single(self, kind: Kind, shown: int, original: list[int], at: int) -> RenderedPiece:
        if kind == "special":
            return RenderedPiece(kind="special", text=self._tokenizer.decode([shown]))
        target = self._decode(original, at, at + 1)
        return RenderedPiece(kind=kind, text=target if kind == "kept" else self._tokenizer.decode([shown]), wanted=target)

    def _kind(self, shown: int, target: int) -> Kind:
        if target != IGNORED:
            return "hidden" if shown == self._mask else "kept" if shown == target else "replaced"
        return "special" if shown in self._special else "text"

    def _decode(self, ids: list[int], start: int, end: int) -> str:
        """Decode ids[start:end] after the preceding token, because some tokenizers put a space between the two."""
        before = ids[start - 1 : start] if start and ids[start - 1] not in self._special else []
        prefix = self._tokenizer.decode(before)
        both = self._tokenizer.decode(ids[start - len(before) : end])
        return both[len(prefix) :] if before and both.startswith(prefix) else self._tokenizer.decode(ids[start:end])
