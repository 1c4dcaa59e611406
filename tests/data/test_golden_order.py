"""Order, mixture and packing are frozen: a change would change every started run.

`python tests/data/test_golden_order.py` rewrites the golden file, which is only right together with a new VERSION of what has changed.
"""

import json
from pathlib import Path

import numpy as np

from manta.data.sampling import mixture, order, packing
from manta.data.sampling.mixture import Mixture
from manta.data.sampling.order import BlockOrder, Order, Permutation
from manta.data.sampling.packing import best_fit

GOLDEN = Path(__file__).with_name("golden_order.json")


def vectors():
    numbers = np.array([0, 1, 2, 3, 997, 998, 65_535, 65_536, 10**6, 10**12, 10**12 + 1])
    mixed = Mixture([(0, [0.7, 0.3, 0.0]), (1000, [0.1, 0.45, 0.45]), (10**9, [0, 1, 2])])
    blocks = BlockOrder(np.array([3, 0, 400, 17, 1, 88]), seed=11, shards_per_block=2)
    lengths = Permutation(300, 5)(np.arange(300)).astype(np.int64) + 1
    bins = best_fit(lengths, 65)
    apart = best_fit(lengths, 64, overlap=0)
    return {
        "versions": {"order": order.VERSION, "mixture": mixture.VERSION, "packing": packing.VERSION},
        "permutation": {str(n): Permutation(n, n + 1)(np.arange(min(n, 9))).tolist() for n in (1, 2, 10, 1_000_003, 2**61 + 1)},
        "order": [found.tolist() for found in Order(9389, seed=1234)(numbers)],
        "blocks": [found.tolist() for found in blocks(numbers)],
        "mixture": [found.tolist() for found in mixed(numbers)],
        "taken": [mixed.samples_before(int(number)).tolist() for number in numbers],
        "quotas": mixture.quotas([0.5, 0.3, 0.2, 1e-7]).tolist(),
        "packing": [getattr(bins, name)[:200].tolist() for name in ("edges", "starts", "lengths")],
        "packing apart": [getattr(apart, name)[:200].tolist() for name in ("edges", "starts", "lengths")],
        "bins": [len(bins), len(apart)],
    }


def test_order_mixture_and_packing_are_frozen():
    assert vectors() == json.loads(GOLDEN.read_text())


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(vectors(), indent=1) + "\n")
