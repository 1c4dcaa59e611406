"""Examples as people read them: documents, the text of each, special tokens by name, and what a masked objective hides."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from manta.data.objectives.examples import IGNORED, PADDING, Examples, number_documents
from manta.data.tokenizer import tokenizer
from manta.data.tokenizer.tokenizer import Tokenizer

Tokens = NDArray[np.int64]
Kind = Literal["text", "special", "hidden", "replaced", "kept"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some tokens that are alike: text, or a token that is more than that."""

    kind: Kind
    """hidden, replaced and kept are those that a masked objective asks for: behind [MASK], behind another token, or as they are."""
    text: str
    """As it is shown to the model."""
    wanted: str | None = None
    """What is to be predicted there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A document, or what a sequence holds of it."""

    tokens: int
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelled:
    """A sequence."""

    passages: tuple[Passage, ...]
    padding: int
    """Tokens at its end that stand for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """What a sequence holds, token by token: with all inputs of a causal one the last token that it predicts."""

    shown: Tokens
    wanted: Tokens  # what a masked objective predicts in its place, else IGNORED
    documents: Tokens  # which of its documents it is of, PADDING for none


class Speller:
    """Knows a tokenizer, and which of its ids are no text."""

    def __init__(self, file: Path, *, end_of_text: str, masked: bool) -> None:
        """masked: whether targets are of hidden tokens, not of next ones."""
        self._tokenizer = Tokenizer(file, end_of_text=end_of_text)
        added = json.loads(tokenizer.read_tokenizer(file)).get("added_tokens", [])
        self._special = {self._tokenizer.end_of_text, *(token["id"] for token in added if token["special"])}
        self._mask = None
        if masked:
            marks = self._tokenizer.special_tokens()
            self._special |= {marks.cls, marks.sep, marks.mask, marks.pad}
            self._mask = marks.mask

    def __call__(self, row: Row) -> Spelled:
        real = row.documents != PADDING
        shown, wanted, documents = row.shown[real], row.wanted[real], row.documents[real]
        starts = np.flatnonzero(np.append(True, documents[1:] != documents[:-1])[: len(shown)]).tolist()
        return Spelled(
            passages=tuple(
                Passage(tokens=end - begin, pieces=tuple(self._pieces(shown[begin:end].tolist(), wanted[begin:end].tolist())))
                for begin, end in zip(starts, [*starts[1:], len(shown)], strict=True)
            ),
            padding=int((~real).sum()),
        )

    def rows(self, examples: Examples, apart: Examples) -> Iterator[Row]:
        """apart: the same with documents kept apart, which says where these end."""
        assert apart.documents is not None, "kept apart"
        for at, (tokens, targets, documents) in enumerate(zip(examples.tokens, examples.targets, apart.documents, strict=True)):
            if self._mask is None:
                last = targets[-1:][targets[-1:] != IGNORED]
                after = documents[-1:] + (apart.targets[at, -1] == IGNORED)
                shown, documents_too = np.append(tokens, last), np.append(documents, after[: len(last)])
                yield Row(shown=shown, wanted=np.full_like(shown, IGNORED), documents=documents_too)
            elif examples.segments is not None:  # of a pair, what is around the [SEP] counts as one document: here it is two
                original = np.where(targets == IGNORED, tokens, targets)
                own = number_documents(original[None], self._tokenizer.end_of_text)[0]
                yield Row(shown=tokens, wanted=targets, documents=own + examples.segments[at])
            else:
                yield Row(shown=tokens, wanted=targets, documents=documents)

    def _pieces(self, shown: list[int], wanted: list[int]) -> Iterator[Piece]:
        """Text is decoded behind the token before it, for some tokenizers write a blank between the two."""
        original = [ours if theirs == IGNORED else theirs for ours, theirs in zip(shown, wanted, strict=True)]
        kinds: list[Kind] = [self._kind(*pair) for pair in zip(shown, wanted, strict=True)]
        place = 0
        for kind, alike in groupby(kinds):
            end = place + len(list(alike))
            if kind == "text":
                yield Piece(kind="text", text=self._behind(original, place, end))
            else:
                yield from (self._marked(kind, shown[at], original, at) for at in range(place, end))
            place = end

    def _marked(self, kind: Kind, shown: int, original: list[int], at: int) -> Piece:
        if kind == "special":
            return Piece(kind="special", text=self._tokenizer.decode([shown]))
        wanted = self._behind(original, at, at + 1)
        return Piece(kind=kind, text=wanted if kind == "kept" else self._tokenizer.decode([shown]), wanted=wanted)

    def _kind(self, shown: int, wanted: int) -> Kind:
        if wanted != IGNORED:
            return "hidden" if shown == self._mask else "kept" if shown == wanted else "replaced"
        return "special" if shown in self._special else "text"

    def _behind(self, ids: list[int], begin: int, end: int) -> str:
        before = ids[begin - 1 : begin] if begin and ids[begin - 1] not in self._special else []
        alone = self._tokenizer.decode(before)
        both = self._tokenizer.decode(ids[begin - len(before) : end])
        return both[len(alone) :] if before and both.startswith(alone) else self._tokenizer.decode(ids[begin:end])
