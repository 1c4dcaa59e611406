"""The house stands as it is described: packages, layers, the wheel."""

import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("cluster", "data", "launch", "trainer")


def test_every_sub_package_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {f"manta.{'.'.join(p.parent.relative_to(ROOT).parts)}" for room in ROOMS for p in (ROOT / room).rglob("__init__.py")}
    assert listed == on_disk


def test_the_rooms_import_downwards_only():
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_help_and_version_need_no_heavy_import():
    heavy = "{'torch', 'ray', 'deepspeed', 'datasets'}"
    script = f"import sys; import manta.launch.cli, manta.launch.config; sys.exit(' '.join({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    for command in ([], ["train"], ["resume"], ["prepare"], ["status"], ["attach"], ["stop"], ["logs"], ["generate"], ["export"]):
        told = subprocess.run([sys.executable, "-P", "-m", "manta.launch", *command, "--help"], capture_output=True, text=True, check=False)
        assert told.returncode == 0
        assert "Usage: manta" in told.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_trains_in_a_clean_environment(wheel, workspace, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert "manta/launch/presets/llama-tiny.yaml" in names
    assert all(name.startswith(("manta/", "manta-")) for name in names)
    venv.create(tmp_path / "clean", with_pip=True)
    binaries = tmp_path / "clean" / "bin"
    subprocess.run([binaries / "python", "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    command = [binaries / "manta", "train", workspace.config_file, "run.dir=from the wheel", "train.steps=6"]
    done = subprocess.run(command, cwd=workspace.directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (workspace.directory / "from the wheel/checkpoints/step-00000006/manifest.json").exists()
