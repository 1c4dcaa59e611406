"""Weights for a vocabulary that has grown or changed its order: rows of embedding and head are matched by token, not by id."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from manta.trainer.checkpoint.manifest import Checkpoint, Chunk, StoredTensor
from manta.trainer.checkpoint.write_plan import TORCH_DTYPES

TOKEN_ROWS = re.compile(r"master/(embedding|head)\.(weight|bias)")
"""Keys of the tensors whose first dimension is the vocabulary."""


@dataclass(frozen=True, slots=True)
class IdRange:
    """Tokens with consecutive ids in both vocabularies."""

    stored: int  # first id in the checkpoint's vocabulary
    current: int  # first id in the run's
    count: int


def shared_ranges(stored_ids: Mapping[str, int], current_ids: Mapping[str, int]) -> list[IdRange]:
    """Return the tokens that both vocabularies have, as ranges of ids."""
    ranges: list[IdRange] = []
    for current, stored in sorted((current_ids[token], stored_ids[token]) for token in current_ids.keys() & stored_ids.keys()):
        last = ranges[-1] if ranges else None
        if last and (current, stored) == (last.current + last.count, last.stored + last.count):
            ranges[-1] = replace(last, count=last.count + 1)
        else:
            ranges.append(IdRange(stored, current, 1))
    return ranges


def match_rows(checkpoint: Checkpoint, ranges: list[IdRange], shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """Return the checkpoint in the run's vocabulary, with the rows of shared tokens alone: loading leaves the other rows unchanged."""
    tensors = {
        key: _matched(stored, ranges, shapes[key]) if TOKEN_ROWS.fullmatch(key) and key in shapes else stored
        for key, stored in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors, partial=frozenset(filter(TOKEN_ROWS.fullmatch, tensors)))


def _matched(stored: StoredTensor, ranges: list[IdRange], shape: tuple[int, ...]) -> StoredTensor:
    if stored.shape[1:] != shape[1:]:
        return stored  # of another model, which loading reports
    chunks: list[Chunk] = []
    for chunk in stored.chunks:
        (first, *columns), (rows, *sizes) = chunk.offsets, chunk.sizes
        row_bytes = math.prod(sizes) * TORCH_DTYPES[stored.dtype].itemsize
        for ids in ranges:
            start, stop = max(ids.stored, first), min(ids.stored + ids.count, first + rows)
            if start < stop:
                offsets = (ids.current + start - ids.stored, *columns)
                chunks.append(Chunk(chunk.file, chunk.start + (start - first) * row_bytes, offsets, (stop - start, *sizes)))
    return StoredTensor(stored.dtype, shape, tuple(chunks))
