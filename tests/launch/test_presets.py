"""`manta init` and `manta presets`: what a new user types first."""

import json
from pathlib import Path

import pytest
from fuzz import assert_refused_or_done, manta

from manta.launch import config
from manta.launch.presets.starter import write_starter
from manta.trainer.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_starter_config_of_each_preset_is_valid(folder):
    for name in sorted(path.stem for path in config.PRESETS.glob("*.yaml")):
        write_starter(folder / f"{name}.yaml", name, ["a b/*.txt", "s3://bucket/x"])
        loaded = config.load(folder / f"{name}.yaml")
        assert (loaded.model.preset, loaded.run.dir) == (name, Path("runs", name))
        assert [source.path for source in loaded.data.sources] == ["a b/*.txt", "s3://bucket/x"]
        assert loaded.data.objective == ("masked" if name.startswith("bert") else "causal")


def test_init_writes_a_commented_config_and_overwrites_nothing(folder):
    outcome = manta("init")
    assert (outcome.code, outcome.stdout) == (0, "run.yaml\n")
    assert outcome.stderr == "run.yaml: written; train it with: manta train run.yaml\n"
    written = Path("run.yaml").read_text()
    assert written.count("#") >= 10
    assert config.load(Path("run.yaml")).data.sources[0].path == "stdlib:"
    (folder / "my model.yaml").write_text("{layers: 2, width: 64, heads: 2}")
    assert manta("init", "own.yaml", "--preset", "./my model.yaml").code == 0
    assert config.load(Path("own.yaml")).model.layers == 2
    Path("link.yaml").symlink_to("nowhere")
    for arguments, message in (
        (["run.yaml"], "run.yaml: expected a new file, got one that exists."),
        (["link.yaml"], "link.yaml: expected a new file, got one that exists."),
        (["nowhere/run.yaml"], "nowhere/run.yaml: expected a file that can be written, got an error: No such file or directory."),
        (["new.yaml", "--preset", "gpt2-124"], 'got "gpt2-124". Did you mean gpt2-124m?'),
        (["new.yaml", "--data", "s3://me:hunter2@bucket"], "--data: data.sources.0.path: expected a URL without a password"),
    ):
        outcome = manta("init", *arguments)
        assert_refused_or_done(outcome, 2)
        assert message in outcome.stderr
    assert Path("run.yaml").read_text() == written
    assert not Path("new.yaml").exists()
    assert not Path("nowhere").exists()


def test_presets_are_listed_with_parameters_and_memory(folder, capsys):
    from manta.launch.presets import sizes  # imports torch

    outcome = manta("presets", "--json", seconds=60)
    assert outcome.code == 0
    rows = {row["name"]: row for row in json.loads(outcome.stdout)}
    assert rows.keys() == {path.stem for path in config.PRESETS.glob("*.yaml")}
    row = rows["gpt2-124m"]
    assert row["parameters"] == pytest.approx(124.4e6, rel=0.01)
    assert (row["weights_bytes"], row["gradients_bytes"]) == (2 * row["parameters"], 2 * row["parameters"])
    assert row["optimizer_bytes"] == 12 * row["parameters"], "an fp32 copy of the weights, and two moments"
    cells = ([cell.strip(" `") for cell in line.split("|")] for line in (ROOT / "docs/models.md").read_text().splitlines())
    documented = {row[1]: (row[6], row[8]) for row in cells if len(row) > 9 and row[1] in rows}
    assert documented == {name: (f"{row['vocabulary']:,}", f"{row['parameters']:,}") for name, row in rows.items()}
    sizes.show(list(rows.values()))
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[1:]] == list(rows)
    assert "124.5 M" in table
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_the_starter_config_trains_as_it_is(workspace):
    assert workspace.manta("init", "first.yaml", "--data", "documents/*.txt").returncode == 0
    done = workspace.manta("train", "first.yaml", "train.steps=3", "schedule.warmup_steps=1")
    assert done.returncode == 0, done.stderr
    assert RunDirectory(workspace.directory / "runs/llama-tiny").saved_step() == 3
