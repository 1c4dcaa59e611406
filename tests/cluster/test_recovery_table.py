"""The table in docs/recovery.md: what benchmarks/recovery.py makes of what it has measured. Measuring takes an hour."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from math import inf
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks/recovery.py"
AROUND = {"first_step": 7.8, "code": 75, "gone": 1.4, "busy": 1.0}


@pytest.fixture(scope="module")
def recovery():
    spec = spec_from_file_location("recovery", FILE)
    sys.modules["recovery"] = module = module_from_spec(spec)  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["recovery"]


def made_up(recovery, seconds, theirs=30.0, busy=2.0):
    """Each fault thrice, of which one took twice as long."""
    return [
        recovery.Recovery(fault=name, system=system, noticed=0.1, resumed=times * taken, again=7, busy=busy)
        for name in recovery.FAULTS
        for system, taken in (("manta", seconds), ("Ray Train", inf), ("Ray Train, tuned", theirs))
        for times in (1, 1, 2)
    ]


def test_the_table_tells_median_slowest_and_how_many_times_longer_another_takes(recovery):
    text = recovery.table(made_up(recovery, 0.5), AROUND, "2 cores")
    row = next(line for line in text.splitlines() if line.startswith("| a rank is killed"))
    assert row == "| a rank is killed | 0.10 (0.10) | 0.50 (1.00) | 2 | 7 | not within 120 | 30.00 (60.00), 60 times |"
    assert len([line for line in text.splitlines() if line.startswith("| a")]) == len(recovery.FAULTS)
    assert "the median of 3 (Ray Train: of 3), in brackets the slowest" in text
    assert "NOT HELD" not in text
    assert "not quiet" not in text


def test_what_came_back_too_late_once_is_told(recovery):
    results = made_up(recovery, 1.1, busy=60.0)
    text = recovery.table(results, AROUND, "2 cores")
    late = [line.split("|")[1].strip() for line in text.splitlines() if "NOT HELD" in line]
    assert late == ["a rank is killed"]
    assert not recovery.holds(results, "rank-killed")
    assert recovery.holds(results, "agent-killed")
    assert "up to 60 %" in text


def test_only_the_table_is_written_anew(recovery):
    document = recovery.DOCUMENT.read_text()
    assert re.search(r"\A# Coming back\n", document)
    twice = recovery.replace_in(recovery.replace_in(document, "once\n"), "| a table |\n")
    before, after = document.split(recovery.BEGIN)[0], document.split(recovery.END)[1]
    assert twice == f"{before}{recovery.BEGIN}| a table |\n{recovery.END}{after}"
    with pytest.raises(AssertionError, match="no place"):
        recovery.replace_in("# Another\n", "| a table |\n")
