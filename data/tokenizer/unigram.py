"""A unigram language model of word pieces (Kudo 2018, section 3.2), trained by expectation-maximization and pruning.

The trainer of `tokenizers` sums in hash map order, which differs each time; here the same words always produce the same pieces.

Legend: W words, B their concatenated bytes, G gaps (a word of n bytes has n + 1), E edges, P pieces. An edge is a piece between two gaps
of a word; a path of edges from its first gap to its last is one segmentation of the word.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray

BYTES = 256  # pieces of one byte are always kept, so that any word can be segmented
MAX_PIECE = 16  # bytes
_MAX_WORD = 32  # bytes: longer words are cut, so that the product of a path's probabilities does not underflow a double
_TRAINING_BYTES = 4_000_000  # of distinct words, the most frequent ones; each byte costs a few hundred bytes of memory
_KEPT = 0.75  # share of the pieces that remain after a round of pruning
_UPDATES = 2  # of the probabilities, before each round of pruning and after the last
_MIN_PROBABILITY = 1e-10  # of a piece: the product of 32 of them is still a double
_MIN_COUNT = 0.5  # a longer piece with a smaller expected count is removed; a single byte has at least this count

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Lattice:
    """All segmentations of words into pieces. The depth of a gap is the number of bytes of its word before it."""

    first: Ints  # [W], the gap before each word
    last: Ints  # [W], the gap after each word
    starts: Ints  # [E], gaps
    ends: Ints  # [E], gaps
    pieces: Ints  # [E]
    forward: tuple[tuple[Ints, Ints, Ints], ...]  # by depth: edges sorted by end, the index of each end's first edge, the ends
    backward: tuple[tuple[Ints, Ints, Ints], ...]  # by depth, the deepest first: the same by start

    @classmethod
    def of(cls, words: list[bytes], pieces: list[bytes], *, whole: bool = True) -> Self:
        """whole: whether a piece may be a whole word."""
        text_B = np.frombuffer(b"".join(words), dtype=np.uint8)
        lengths_W = np.array([len(word) for word in words], dtype=np.int64)
        last_W = np.cumsum(lengths_W + 1) - 1
        first_W = last_W - lengths_W
        gaps_B = np.arange(len(text_B)) + np.repeat(np.arange(len(words)), lengths_W)  # the gap before each byte
        occurrences = list(_occurrences(text_B, np.repeat(last_W, lengths_W) - gaps_B, pieces))
        starts_E = gaps_B[np.concatenate([at for at, _, _ in occurrences])]
        pieces_E = np.concatenate([piece for _, piece, _ in occurrences])
        ends_E = starts_E + np.concatenate([np.full(len(at), length) for at, _, length in occurrences])
        depth_G = np.arange(len(text_B) + len(words)) - np.repeat(first_W, lengths_W + 1)
        if not whole:
            part = (depth_G[starts_E] > 0) | (np.repeat(last_W, lengths_W + 1)[starts_E] != ends_E)
            starts_E, ends_E, pieces_E = starts_E[part], ends_E[part], pieces_E[part]
        return cls(
            first=first_W,
            last=last_W,
            starts=starts_E,
            ends=ends_E,
            pieces=pieces_E,
            forward=tuple(_by_depth(depth_G, ends_E)),
            backward=tuple(_by_depth(depth_G, starts_E))[::-1],
        )

    def expected(self, probabilities_P: Floats, counts_W: Ints) -> Floats:
        """Return the expected count of each piece over all segmentations of the words, weighted by their probability: [P]."""
        # A factor of 32 per byte avoids underflow; it cancels out, since all paths of a word have the same number of bytes.
        weights_E = np.ldexp(probabilities_P[self.pieces], 5 * (self.ends - self.starts))
        alpha_G = np.zeros(self.last[-1] + 1)
        beta_G = np.zeros_like(alpha_G)
        alpha_G[self.first] = beta_G[self.last] = 1
        for edges, bounds, gaps in self.forward:
            alpha_G[gaps] = np.add.reduceat(alpha_G[self.starts[edges]] * weights_E[edges], bounds)
        for edges, bounds, gaps in self.backward:
            beta_G[gaps] = np.add.reduceat(beta_G[self.ends[edges]] * weights_E[edges], bounds)
        share_G = np.repeat(counts_W / alpha_G[self.last], self.last - self.first + 1)
        paths_E = alpha_G[self.starts] * weights_E * beta_G[self.ends] * share_G[self.starts]
        return np.bincount(self.pieces, paths_E, minlength=len(probabilities_P)).astype(np.float64)

    def best(self, scores_P: Floats) -> Floats:
        """Return the log probability of the most probable segmentation of each word: [W]."""
        best_G = np.zeros(self.last[-1] + 1)
        for edges, bounds, gaps in self.forward:
            best_G[gaps] = np.maximum.reduceat(best_G[self.starts[edges]] + scores_P[self.pieces[edges]], bounds)
        return best_G[self.last]


def fit(words: Mapping[bytes, int], seeds: Iterable[bytes], *, size: int) -> list[tuple[bytes, float]]:
    """Return at most `size` pieces, or only the single bytes, with their log probabilities, the most probable first.

    words: the count of each in the text. seeds: candidate pieces, many more than `size`.
    """
    parts, counts_W = _training_words(words or {bytes([byte]): 1 for byte in range(BYTES)})
    pieces = [bytes([byte]) for byte in range(BYTES)]
    pieces += sorted({seed for seed in seeds if 1 < len(seed) <= MAX_PIECE})
    count_P = np.ones(len(pieces))
    while True:
        lattice = _Lattice.of(parts, pieces)
        for _ in range(_UPDATES):
            count_P = lattice.expected(_probabilities(count_P), counts_W)
        scores_P = np.log(_probabilities(count_P))
        if len(pieces) <= max(size, BYTES):
            scores = ((piece, round(float(score), 6)) for piece, score in zip(pieces, scores_P, strict=True))
            return sorted(scores, key=lambda entry: (-entry[1], entry[0]))
        kept = _prune(pieces, count_P, scores_P, to=max(size, BYTES, int(_KEPT * len(pieces))))
        pieces, count_P = [pieces[index] for index in kept], count_P[kept]


def _probabilities(count_P: Floats) -> Floats:
    count_P = count_P.copy()
    count_P[:BYTES] = np.maximum(count_P[:BYTES], _MIN_COUNT)
    return np.maximum(count_P / count_P.sum(), _MIN_PROBABILITY)


def _prune(pieces: list[bytes], count_P: Floats, scores_P: Floats, *, to: int) -> Ints:
    """Return the indexes of the pieces to keep: the text would lose the most probability without them."""
    losses_P = np.full(len(pieces), np.inf)
    others = _Lattice.of(pieces[BYTES:], pieces, whole=False)
    losses_P[BYTES:] = count_P[BYTES:] * (scores_P[BYTES:] - others.best(scores_P))
    losses_P[BYTES:][count_P[BYTES:] < _MIN_COUNT] = -np.inf
    kept = np.argsort(-losses_P, kind="stable")[:to]
    return np.sort(kept[losses_P[kept] > -np.inf])


def _training_words(words: Mapping[bytes, int]) -> tuple[list[bytes], Ints]:
    """Return parts of words and their counts [W]: the most frequent ones if there are too many; a hash breaks ties."""
    counts: Counter[bytes] = Counter()
    for word, count in words.items():
        for start in range(0, len(word), _MAX_WORD):
            counts[word[start : start + _MAX_WORD]] += count
    parts = sorted(counts, key=lambda part: (-counts[part], xxhash.xxh3_64_intdigest(part), part))
    fit = int(np.searchsorted(np.cumsum([len(part) for part in parts]), _TRAINING_BYTES, side="right"))
    return parts[:fit], np.array([counts[part] for part in parts[:fit]], dtype=np.int64)


def _occurrences(text_B: NDArray[np.uint8], left_B: Ints, pieces: list[bytes]) -> Iterator[tuple[Ints, Ints, int]]:
    """Yield, for each length, the positions of pieces in the text, the pieces, and the length. left_B: bytes to the end of the word."""
    keys, children, piece_of = _trie(pieces)
    at, node = np.arange(len(text_B)), np.zeros(len(text_B), dtype=np.int64)
    for length in range(1, MAX_PIECE + 1):
        fits = left_B[at] >= length
        at, key = at[fits], node[fits] * 256 + text_B[at[fits] + length - 1]
        index = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        match = keys[index] == key
        at, node = at[match], children[index[match]]
        ends = piece_of[node] >= 0
        yield at[ends], piece_of[node[ends]], length


def _trie(pieces: list[bytes]) -> tuple[Ints, Ints, Ints]:
    """Return the keys node * 256 + byte, sorted; the child that each leads to; for each node the piece that ends there, or -1."""
    steps: dict[int, int] = {}
    piece_of = {0: -1}
    for index, piece in enumerate(pieces):
        node = 0
        for byte in piece:
            node = steps.setdefault(node * 256 + byte, len(steps) + 1)
        piece_of[node] = index
    keys = np.array(sorted(steps), dtype=np.int64)
    ends = np.array([piece_of.get(node, -1) for node in range(len(steps) + 1)], dtype=np.int64)
    return keys, np.array([steps[key] for key in keys.tolist()], dtype=np.int64), ends


def _by_depth(depth_G: Ints, gaps_E: Ints) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Yield, for each depth of these gaps of the edges: the edges sorted by gap, the index of each gap's first edge, the gaps."""
    order = np.lexsort((gaps_E, depth_G[gaps_E]))
    depths = depth_G[gaps_E[order]]
    for edges in np.split(order, np.flatnonzero(np.diff(depths)) + 1):
        gaps, bounds = np.unique(gaps_E[edges], return_index=True)
        yield edges, bounds, gaps
