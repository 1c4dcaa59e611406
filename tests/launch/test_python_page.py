"""Run the examples of docs/python.md: one program per page, in an empty directory."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/python.md"
BLOCK = re.compile(r'^```python(?: title="(?P<file>[\w.]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)


def test_every_example_runs(tmp_path):
    program = ""
    for block in BLOCK.finditer(PAGE.read_text()):
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["code"])
        else:
            program += block["code"] + "\n"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "8 0.001"
    assert lines[1:4] == ["(8, 64) (8, 64)"] * 3
    train_accuracy, eval_accuracy = map(float, lines[-2].strip("[]").split(", "))
    assert 0 < train_accuracy < 0.5
    assert 0 < eval_accuracy < 0.5
    assert all(0 < float(loss) < 7 for loss in lines[-1].strip("[]").split(", "))
