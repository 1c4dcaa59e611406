"""A unigram model of the pieces that words are made of (Kudo 2018, section 3.2): expectation-maximisation and pruning.

The trainer that `tokenizers` has sums in the order of a hash map, another one each time; here the same words give the same pieces.

Legend: W words, B their bytes end to end, G gaps (a word of n bytes has n + 1), E edges, P pieces. An edge is a piece that spells what
stands between two gaps of a word; a path of edges from its first gap to its last is one way to cut the word.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray

BYTES = 256  # pieces of one byte, always kept: they spell any word
LONGEST = 16  # bytes of a piece
_PART = 32  # bytes: longer words are cut, so that the product of a path's probabilities stays a double
_LEARNT_FROM = 4_000_000  # bytes of distinct words, the most frequent ones; each costs a few hundred bytes of memory
_KEPT = 0.75  # share of the pieces that a round of pruning leaves
_UPDATES = 2  # of the probabilities, before each round of pruning and after the last
_LEAST = 1e-10  # the probability of a piece: 32 of them in a row are still a double
_SEEN_LEAST = 0.5  # a longer piece that is expected less often goes; a single byte counts as seen so often

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Lattice:
    """Every way to cut words into pieces. Depth is the bytes of a word that stand before a gap."""

    first: Ints  # [W], the gap before each word
    last: Ints  # [W], and the one after it
    starts: Ints  # [E], gaps
    ends: Ints  # [E], gaps
    pieces: Ints  # [E]
    forward: tuple[tuple[Ints, Ints, Ints], ...]  # by depth: edges sorted by their end, where each end's edges begin, the ends
    backward: tuple[tuple[Ints, Ints, Ints], ...]  # by depth, the deepest first: the same by their start

    @classmethod
    def of(cls, words: list[bytes], pieces: list[bytes], *, whole: bool = True) -> Self:
        """whole: whether a word may be one piece."""
        text_B = np.frombuffer(b"".join(words), dtype=np.uint8)
        lengths_W = np.array([len(word) for word in words], dtype=np.int64)
        last_W = np.cumsum(lengths_W + 1) - 1
        first_W = last_W - lengths_W
        gaps_B = np.arange(len(text_B)) + np.repeat(np.arange(len(words)), lengths_W)  # the one before each byte
        found = list(_occurrences(text_B, np.repeat(last_W, lengths_W) - gaps_B, pieces))
        starts_E = gaps_B[np.concatenate([at for at, _, _ in found])]
        pieces_E = np.concatenate([piece for _, piece, _ in found])
        ends_E = starts_E + np.concatenate([np.full(len(at), length) for at, _, length in found])
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
        """How often each piece is expected among all ways to cut the words, by how probable they are: [P]."""
        # Times 32 for each byte of a piece: of a whole word's it cancels out, and no product underflows.
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
        """The logarithm of the probability of each word's most probable cut: [W]."""
        best_G = np.zeros(self.last[-1] + 1)
        for edges, bounds, gaps in self.forward:
            best_G[gaps] = np.maximum.reduceat(best_G[self.starts[edges]] + scores_P[self.pieces[edges]], bounds)
        return best_G[self.last]


def fit(words: Mapping[bytes, int], seeds: Iterable[bytes], *, size: int) -> list[tuple[bytes, float]]:
    """At most `size` pieces, or the single bytes alone, and the logarithms of their probabilities, the most probable first.

    words: how often each stands in the text. seeds: pieces to choose from, among them many more than `size` good ones.
    """
    parts, counts_W = _learnt_from(words or {bytes([byte]): 1 for byte in range(BYTES)})
    pieces = [bytes([byte]) for byte in range(BYTES)]
    pieces += sorted({seed for seed in seeds if 1 < len(seed) <= LONGEST})
    seen_P = np.ones(len(pieces))
    while True:
        lattice = _Lattice.of(parts, pieces)
        for _ in range(_UPDATES):
            seen_P = lattice.expected(_probabilities(seen_P), counts_W)
        scores_P = np.log(_probabilities(seen_P))
        if len(pieces) <= max(size, BYTES):
            found = ((piece, round(float(score), 6)) for piece, score in zip(pieces, scores_P, strict=True))
            return sorted(found, key=lambda each: (-each[1], each[0]))
        left = _pruned(pieces, seen_P, scores_P, to=max(size, BYTES, int(_KEPT * len(pieces))))
        pieces, seen_P = [pieces[index] for index in left], seen_P[left]


def _probabilities(seen_P: Floats) -> Floats:
    counted_P = seen_P.copy()
    counted_P[:BYTES] = np.maximum(counted_P[:BYTES], _SEEN_LEAST)
    return np.maximum(counted_P / counted_P.sum(), _LEAST)


def _pruned(pieces: list[bytes], seen_P: Floats, scores_P: Floats, *, to: int) -> Ints:
    """The pieces that stay: those without which the text would lose the most probability."""
    losses_P = np.full(len(pieces), np.inf)
    others = _Lattice.of(pieces[BYTES:], pieces, whole=False)
    losses_P[BYTES:] = seen_P[BYTES:] * (scores_P[BYTES:] - others.best(scores_P))
    losses_P[BYTES:][seen_P[BYTES:] < _SEEN_LEAST] = -np.inf
    kept = np.argsort(-losses_P, kind="stable")[:to]
    return np.sort(kept[losses_P[kept] > -np.inf])


def _learnt_from(words: Mapping[bytes, int]) -> tuple[list[bytes], Ints]:
    """Parts of words and their counts [W]. Of a text with too many, the most frequent; a hash decides between equally frequent ones."""
    counts: Counter[bytes] = Counter()
    for word, count in words.items():
        for start in range(0, len(word), _PART):
            counts[word[start : start + _PART]] += count
    parts = sorted(counts, key=lambda part: (-counts[part], xxhash.xxh3_64_intdigest(part), part))
    fit = int(np.searchsorted(np.cumsum([len(part) for part in parts]), _LEARNT_FROM, side="right"))
    return parts[:fit], np.array([counts[part] for part in parts[:fit]], dtype=np.int64)


def _occurrences(text_B: NDArray[np.uint8], left_B: Ints, pieces: list[bytes]) -> Iterator[tuple[Ints, Ints, int]]:
    """For each length: where in the text pieces of it stand, and which. left_B: bytes from each place to the end of its word."""
    keys, children, piece_of = _trie(pieces)
    at, node = np.arange(len(text_B)), np.zeros(len(text_B), dtype=np.int64)
    for length in range(1, LONGEST + 1):
        room = left_B[at] >= length
        at, wanted = at[room], node[room] * 256 + text_B[at[room] + length - 1]
        found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        here = keys[found] == wanted
        at, node = at[here], children[found[here]]
        ends = piece_of[node] >= 0
        yield at[ends], piece_of[node[ends]], length


def _trie(pieces: list[bytes]) -> tuple[Ints, Ints, Ints]:
    """Keys node * 256 + byte, sorted; the node to which each leads; by node, the piece that ends there, or -1."""
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
    """For each depth that edges have at one of their ends: the edges, sorted by it; where each gap's edges begin; the gaps."""
    order = np.lexsort((gaps_E, depth_G[gaps_E]))
    depths = depth_G[gaps_E[order]]
    for edges in np.split(order, np.flatnonzero(np.diff(depths)) + 1):
        gaps, bounds = np.unique(gaps_E[edges], return_index=True)
        yield edges, bounds, gaps
