"""The package list, the import layers, lightweight help, and the wheel."""

import re
import signal
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from manta.launch.cli import app

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "data", "launch", "trainer")


def test_pyproject_lists_every_subpackage():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {f"manta.{'.'.join(p.parent.relative_to(ROOT).parts)}" for package in PACKAGES for p in (ROOT / package).rglob("__init__.py")}
    assert listed == on_disk


def test_each_extra_is_the_remedy_of_a_message():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys() - {"dev", "docs"}
    code = "".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    assert extras == set(re.findall(r"pip install 'manta\[(\w+)\]'", code))


def test_packages_follow_the_import_layers():
    result = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_command_line_imports_no_heavy_library():
    heavy = "{'torch', 'ray', 'deepspeed', 'datasets'}"
    modules = ", ".join(f"manta.launch.{name}" for name in ("cli", "config", "report.compare"))
    script = f"import sys; import {modules}; sys.exit(' '.join({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == ""


def test_each_command_has_help_with_an_example():
    group = typer.main.get_command(app)
    names = [[name] for name in group.commands] + [
        [name, inner] for name in ("data", "checkpoint") for inner in group.commands[name].commands
    ]
    assert len(names) > 15
    for arguments in ([], *names):
        result = CliRunner().invoke(app, [*arguments, "--help"], prog_name="manta")
        assert result.exit_code == 0
        assert "Usage: manta" in result.stdout
        is_example = result.stdout.splitlines()[-1].strip().startswith("For example: manta")  # one line, so that it can be copied
        assert is_example or arguments in ([], ["data"], ["checkpoint"]), arguments
        assert "[[" not in result.stdout.splitlines()[0]


def test_a_shell_can_complete_commands():
    completion = {"_MANTA_COMPLETE": "complete_bash", "COMP_WORDS": "manta trai", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, prog_name="manta", env=completion)
    assert result.stdout.split() == ["train"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_trains_in_a_clean_environment(wheel, workspace, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"manta/launch/presets/llama-tiny.yaml", "manta/launch/report/report.js"} <= set(names)
    assert all(name.startswith(("manta/", "manta-")) for name in names)
    venv.create(tmp_path / "clean", with_pip=True)
    binaries = tmp_path / "clean" / "bin"
    subprocess.run([binaries / "python", "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    command = [binaries / "manta", "train", workspace.config_file, "run.dir=from the wheel", "train.steps=6"]
    result = subprocess.run(command, cwd=workspace.directory, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (workspace.directory / "from the wheel/checkpoints/step-00000006/manifest.json").exists()


INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from manta.launch.__main__ import main
main()
"""


def test_a_ctrl_c_during_the_imports_leaves_no_traceback():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"manta": "manta.launch.__main__:main"}
    ended = subprocess.run([sys.executable, "-P", "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
