"""Run the examples of docs/python.md, as one program in an empty directory, and the model classes of docs/own_model.md with its config."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MANTA

from manta.trainer.metrics import read_metrics

DOCS = Path(__file__).parents[2] / "docs"
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def blocks(page: str, opening: str) -> list[str]:
    return re.findall(rf"^{re.escape(opening)}\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def run(directory: Path, *command: str | Path) -> str:
    done = subprocess.run(command, cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The directory in which the program of docs/python.md ran, and what it printed."""
    directory = tmp_path_factory.mktemp("examples")
    return directory, run(directory, sys.executable, "-P", "-c", "\n".join(blocks("python.md", "```python")))


def test_every_example_runs(page):
    lines = page[1].splitlines()
    assert lines[0] == "8 0.001"
    assert lines[1:4] == ["(8, 64) (8, 64)"] * 3


TWO_AHEAD = pytest.param("TwoAhead", ["next", "after_next"], marks=pytest.mark.slow)


@pytest.mark.parametrize(("model", "terms"), [("WithAccuracy", ["accuracy"]), TWO_AHEAD])
def test_a_model_with_other_terms_trains_and_logs_them(page, model, terms):
    directory, _ = page
    (code,) = blocks("own_model.md", '```python title="my_models.py"')
    (directory / "my_models.py").write_text(code)
    run(directory, MANTA, "train", "run.yaml", f"model.family=my_models:{model}", f"run.dir=runs/{model}")
    last = read_metrics(directory / f"runs/{model}/metrics.jsonl")[-1]
    highest = 0.5 if model == "WithAccuracy" else 7
    assert all(0 < last[f"{split}/{term}"] < highest for split in ("train", "eval") for term in terms)
