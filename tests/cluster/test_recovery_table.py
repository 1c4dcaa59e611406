"""The table in docs/drill.md, as benchmarks/recovery.py writes it from its measurements. Measuring takes an hour."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from math import inf
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks/recovery.py"
START_AND_STOP = {"first_step": 7.8, "code": 75, "stopped": 1.4, "busy": 1.0}


@pytest.fixture(scope="module")
def recovery():
    spec = spec_from_file_location("recovery", FILE)
    sys.modules["recovery"] = module = module_from_spec(spec)  # a dataclass looks its module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["recovery"]


def measurements(recovery, seconds, ray_train=30.0, busy=2.0):
    """Each fault three times, one of which took twice as long."""
    return [
        recovery.Recovery(fault=name, system=system, detected=0.1, resumed=times * taken, recomputed=7, busy=busy)
        for name in recovery.FAULTS
        for system, taken in (("manta", seconds), ("Ray Train", inf), ("Ray Train, tuned", ray_train))
        for times in (1, 1, 2)
    ]


def test_the_table_has_median_slowest_and_ratio_to_ray_train(recovery):
    text = recovery.table(measurements(recovery, 0.5), START_AND_STOP, "2 cores")
    row = next(line for line in text.splitlines() if line.startswith("| a rank is killed"))
    assert row == "| a rank is killed | 0.10 (0.10) | 0.50 (1.00) | 2 | 7 | not within 120 | 30.00 (60.00), 60x slower |"
    assert len([line for line in text.splitlines() if line.startswith("| a")]) == len(recovery.FAULTS)
    assert "the median of 3 runs (for Ray Train, of 3), with the slowest in parentheses" in text
    assert "MISSED" not in text
    assert "not quiet" not in text


def test_a_missed_bound_is_marked(recovery):
    results = measurements(recovery, 1.1, busy=60.0)
    text = recovery.table(results, START_AND_STOP, "2 cores")
    missed = [line.split("|")[1].strip() for line in text.splitlines() if "MISSED" in line]
    assert missed == ["a rank is killed"]
    assert not recovery.meets_bound(results, "rank-killed")
    assert recovery.meets_bound(results, "agent-killed")
    assert "up to 60 %" in text


def test_only_the_table_is_replaced(recovery):
    document = recovery.DOCUMENT.read_text()
    assert re.search(r"\A# Fault injection\n", document)
    twice = recovery.replace_in(recovery.replace_in(document, "once\n"), "| a table |\n")
    before, after = document.split(recovery.START)[0], document.split(recovery.END)[1]
    assert twice == f"{before}{recovery.START}| a table |\n{recovery.END}{after}"
    with pytest.raises(AssertionError, match="no markers"):
        recovery.replace_in("# Another\n", "| a table |\n")
