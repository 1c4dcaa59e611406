"""What the controller costs where there are many nodes: by benchmarks/scale.py, whose agents are made up."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCALE = Path(__file__).parents[2] / "benchmarks/scale.py"


def measured(nodes: int) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-P", SCALE, str(nodes), "8"], capture_output=True, text=True, check=True)
    told = {
        "calls": r"([\d,]+) calls",
        "heartbeats": r"heartbeats +([\d.]+) s",
        "noticed": r"noticed +([\d.]+) s after",
        "rank": r"rank (\d+), killed by SIGKILL",
    }
    return {name: float(re.search(pattern, done.stdout)[1].replace(",", "")) for name, pattern in told.items()}


@pytest.mark.slow
def test_a_start_takes_as_many_calls_a_node_and_a_killed_rank_is_noticed_at_once():
    few, many = measured(20), measured(60)
    assert many["calls"] - few["calls"] == 8 * 40
    assert (few["rank"], many["rank"]) == (10 * 8 + 7, 30 * 8 + 7)
    assert max(few["noticed"], many["noticed"]) <= 0.1


@pytest.mark.slow
def test_ten_thousand_ranks_cost_less_than_a_core():
    told = measured(1250)
    assert told["heartbeats"] < 1.0
    assert told["noticed"] <= 0.1
