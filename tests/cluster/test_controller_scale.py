"""What the controller costs with many nodes, by benchmarks/scale.py, whose agents are simulated."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCALE = Path(__file__).parents[2] / "benchmarks/scale.py"


def measured(nodes: int) -> dict[str, float]:
    output = subprocess.run([sys.executable, "-P", SCALE, str(nodes), "8"], capture_output=True, text=True, check=True).stdout
    patterns = {
        "calls": r"([\d,]+) calls",
        "heartbeats": r"heartbeats +([\d.]+) s",
        "detected": r"detected +([\d.]+) s after",
        "rank": r"rank (\d+), killed by SIGKILL",
    }
    return {name: float(re.search(pattern, output)[1].replace(",", "")) for name, pattern in patterns.items()}


@pytest.mark.slow
def test_calls_per_node_are_constant_and_a_killed_rank_is_found_at_once():
    few, many = measured(20), measured(60)
    assert many["calls"] - few["calls"] == 8 * 40
    assert (few["rank"], many["rank"]) == (10 * 8 + 7, 30 * 8 + 7)
    assert max(few["detected"], many["detected"]) <= 0.1


@pytest.mark.slow
def test_ten_thousand_ranks_cost_less_than_a_core():
    result = measured(1250)
    assert result["heartbeats"] < 1.0
    assert result["detected"] <= 0.1
