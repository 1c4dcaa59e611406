"""A run that version 0.1.0 (commit e1e8d7d) made, stopped after the checkpoint of step 10 of 20. Later versions must resume it.

    workspace/       the directory it was started in: two sources, the corpus prepared from them, and the run (two ranks, fp32)
    expected.jsonl   what version 0.1.0 computes in steps 11 to 20 when it resumes the run; every float is exact
    identities.yaml  configs under the key names of version 0.1.0, and the digest of each that its checkpoints store

Never make it again with a newer version.
"""

import json
import os
import shutil
from pathlib import Path

import yaml

HERE = Path(__file__).parent
RECORDED = "/tmp/old-run"  # the workspace's path when the run was made: its manifest holds it
MODIFIED = 1_700_000_000 * 10**9  # modification time of both sources in ns: the corpus was named after it
EXPECTED = [json.loads(line) for line in (HERE / "expected.jsonl").read_text().splitlines()]
IDENTITIES = yaml.safe_load((HERE / "identities.yaml").read_text())


def copy_old_run(workspace: Path) -> Path:
    """Copy the workspace to a path that does not exist yet, so that its run resumes there, and return the run's directory."""
    shutil.copytree(HERE / "workspace", workspace)
    for name in ("run/manifest.json", "run/config.yaml", "run/events.jsonl"):
        file = workspace / name
        file.write_text(file.read_text().replace(RECORDED, str(workspace)))
    for source in (workspace / "text").iterdir():
        os.utime(source, ns=(MODIFIED, MODIFIED))
    return workspace / "run"
