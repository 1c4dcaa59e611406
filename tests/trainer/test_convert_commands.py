"""The commands export, import and generate, and their refusals in one line."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from saved_models import exported, random_run, stored_tensors
from typer.testing import CliRunner

from manta.data.errors import InputError
from manta.launch.cli import app
from manta.trainer.checkpoint.errors import SaveError


def command(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_commands_export_import_and_generate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_run(tmp_path, "mine", family="gpt2")
    result = command("export", "mine", "--output", "hf", "--dtype", "bfloat16", "--shard-size", "0.02MB")
    assert result.exit_code == 0, result.output
    result = command("import", "hf")
    assert (result.exit_code, result.output.strip()) == (0, "imported/hf")
    result = command("export", "imported/hf", "--shard-size", "0.02MB")
    assert result.exit_code == 0, result.output
    assert stored_tensors(Path(result.output.strip())) == stored_tensors(tmp_path / "hf")
    assert command("export", "mine").exit_code == 0
    assert command("import", "mine/export/hf").output.strip() == "imported/mine"
    texts = [command("generate", "imported/hf", "one", "--tokens", "8", "--seed", "2") for _ in range(2)]
    assert [text.exit_code for text in texts] == [0, 0]
    assert texts[0].output == texts[1].output
    assert texts[0].output.startswith("one")
    for wrong in (["--shard-size", "many"], ["--shard-size", "0GB"], ["--dtype", "int8"]):
        refused = command("export", "mine", *wrong)
        assert isinstance(refused.exception, InputError), wrong


@pytest.mark.parametrize("wrong", [["import", "{run}"], ["import", "nowhere"], ["export", "{run}", "--output", "taken"]])
def test_refusals_of_import_and_export_do_not_load_torch(wrong, tmp_path, monkeypatch):
    run_directory = random_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.tex").touch()
    script = """
import sys
from manta.data.errors import InputError
from manta.launch.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
except InputError as error:
    print(error)
sys.exit("torch" in sys.modules)
"""
    arguments = [word.format(run=run_directory.path) for word in wrong]
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout.count("\n")) == (0, 1), result.stderr
    assert "expected" in result.stdout


def test_a_directory_that_cannot_be_created_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = exported(random_run(tmp_path, "mine"))
    (tmp_path / "file").touch()
    for arguments in (["export", "mine", "--output", "file/below"], ["import", str(source), "--output", "file/below"]):
        refused = command(*arguments)
        assert isinstance(refused.exception, InputError), refused.output
        assert "--output: expected a writable directory, got " in str(refused.exception)
        assert "(Not a directory)" in str(refused.exception)


def test_an_export_to_its_default_place_follows_no_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_run(tmp_path, "mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine/export").symlink_to(tmp_path / "elsewhere")
    refused = command("export", "mine")
    assert isinstance(refused.exception, InputError), refused.output
    assert f"expected a directory in the run, got a link to {tmp_path}/elsewhere/hf. Use --output" in str(refused.exception)
    assert command("export", "mine", "--output", "mine/export/hf").exit_code == 0


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = exported(random_run(tmp_path, "mine"))
    for size, arguments in ((30_000, ["export", "mine"]), (3_000, ["export", "mine"]), (3_000, ["import", str(source)])):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            refused = command(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert isinstance(refused.exception, SaveError), refused.exception
        assert "\n" not in str(refused.exception)
    assert not list(tmp_path.rglob("*partial*"))


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    manta = Path(sys.executable).with_name("manta")
    result = subprocess.run([manta, "import", "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "nowhere/config.json" in result.stderr
    assert not list(tmp_path.iterdir())
