"""A model of the user's own is trained as ours are. docs/models.md says how: what it shows is what runs here."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import MANTA
from parity import BOUNDS, MODELS, OPTIMIZERS, SIZES, Cell, plain_all, under, under_all
from parity_table import doubled, unreduced
from spmd import spmd

from manta.data.errors import InputError
from manta.launch import config
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.training import ParallelConfig
from manta.trainer.metrics import read_metrics
from manta.trainer.model.build import build, own
from manta.trainer.pretrained.load import load_pretrained
from manta.trainer.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/own_model"
DOCUMENT = (ROOT / "docs/models.md").read_text()
FAMILY = "parallel:Parallel"
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def desk(workspace) -> Path:
    """Where the document's commands are given: the example lies below, among files with the names of our rooms."""
    there = workspace.directory / "examples/own_model"
    shutil.copytree(EXAMPLE, there, ignore=shutil.ignore_patterns("runs", "corpora", "__pycache__"))
    for name in ("data.py", "cluster.py", "launch.py", "manta.py", "typing.py", "torch.py"):
        (there / name).write_text("raise SystemExit('the user\\'s own file was imported')\n")
    shutil.copytree(workspace.directory / "trainer", there / "trainer")
    return workspace.directory


@pytest.fixture(scope="module")
def trained(workspace, desk) -> RunDirectory:
    """The document's commands, on a smaller corpus and for fewer steps."""
    smaller = yaml.safe_load(workspace.config_file.read_text())
    smaller["data"]["directory"] = str(workspace.directory / "corpora")  # where it has been prepared
    (desk / "examples/own_model/documents").symlink_to(workspace.directory / "documents")
    overrides = [f"{section}={json.dumps(smaller[section])}" for section in ("data", "tokenizer", "train", "cluster", "checkpoint")]
    overrides += ["train.steps=8", "schedule.warmup_steps=2", "model.width=64", "model.mlp_width=128"]
    (commands,) = [block for block in BLOCKS if block.startswith("cd examples/own_model\n")]
    here = desk
    for line in commands.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "cd":
            here = here / arguments[0]
            continue
        assert program == "manta"
        given = [re.sub(r"train\.steps=\d+", "train.steps=12", argument) for argument in arguments]
        done = subprocess.run(
            [MANTA, *given, *(overrides if "train" in given else [])], cwd=here, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, (line, done.stderr)
        if "generate" in given:
            assert done.stdout.startswith(given[2])
            assert len(done.stdout) > len(given[2]) + 1
    return RunDirectory(desk / "examples/own_model/runs/parallel")


@pytest.mark.slow
def test_the_document_s_commands_train_a_model_of_one_s_own_and_go_on_from_elsewhere(trained, desk):
    lines = read_metrics(trained.metrics_file)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["world_size"] for line in lines] == [2] * 8 + [1] * 4
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.1
    assert trained.manifest()["code"] == str(desk / "examples/own_model")


@pytest.mark.slow
def test_a_rank_alone_finds_it_too(trained, desk):
    home = desk / "own by hand"
    shutil.copytree(trained.path, home)
    shutil.rmtree(home / "checkpoints/step-00000012")
    command = [MANTA.with_name("python"), "-P", "-m", "manta.trainer", str(home)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=desk, env=alone, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = ([line["train/loss"] for line in read_metrics(RunDirectory(place).metrics_file)] for place in (home, trained.path))
    assert ours == theirs  # of the last steps, done anew: bit by bit


@pytest.mark.slow
def test_its_cache_and_its_head_are_those_of_any_decoder(trained):
    model = load_pretrained(trained).model
    tokens = torch.randint(0, 200, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] += 1
    torch.testing.assert_close(model.logits(tokens)[:, :7], model.logits(changed)[:, :7])
    assert type(model).__name__ == "Parallel"


@pytest.mark.slow
def test_where_the_code_lay_is_gone_it_is_looked_for_here(trained, tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text(json.dumps(trained.manifest() | {"code": str(tmp_path / "gone")}))
    monkeypatch.chdir(EXAMPLE)
    assert RunDirectory(tmp_path).code == EXAMPLE


def test_a_class_that_is_not_there_is_told_before_anything_starts(workspace):
    model = {"family": "nowhere.at_all:Model", **SIZES}
    done = workspace.manta("train", str(workspace.config_file), "run.dir=own never", f"model={json.dumps(model)}")
    assert done.returncode == 2
    remedy = "install the package, or start manta from where the module lies"
    told = f"and there is no module nowhere, installed or in {workspace.directory}; {remedy}"
    assert done.stderr == f"manta: model.family: got 'nowhere.at_all:Model', {told}\n"
    assert not (workspace.directory / "own never").exists()


MODULES = {
    "model_empty": ("", "which is nothing in .*model_empty.py, wants a class that derives from manta"),
    "model_missing": ("import no_such_package\nMine = 1\n", "there is no module no_such_package, installed or in"),
    "model_broken": ("def (:\n", r"its import ends with SyntaxError: .*model_broken.py, line 1\); mend it"),
    "model_raising": ("\nraise ValueError('no\\nluck')\n", r"its import ends with ValueError: no luck \(.*model_raising.py:2\); mend it"),
    "model_instance": ("Mine = 1\n", "which is 1 in .*model_instance.py, wants a class that derives from manta.trainer.model.transformer"),
    "model_module": ("import torch\nclass Mine(torch.nn.Module): pass\n", "which is <class 'model_module.Mine'> in"),
    "model_unfinished": (
        "from manta.trainer.model.transformer import Transformer\nclass Mine(Transformer): pass\n",
        r"in .*model_unfinished.py, which lacks counts, forward; define them, as docs/models.md shows",
    ),
    "model_signature": (
        "from manta.trainer.model.decoder import Decoder\nclass Mine(Decoder):\n    embed = None\n",
        r"wants __init__\(config, \*, vocabulary, sequence_length\): got an unexpected keyword argument 'sequence_length'",
    ),
}


def test_an_installed_package_is_taken_before_a_file_of_the_same_name(tmp_path):
    (tmp_path / "yaml.py").write_text("raise AssertionError\n")
    with pytest.raises(InputError, match=r"which is nothing in .*site-packages/yaml/__init__\.py"):
        own("yaml:Mine", tmp_path)


@pytest.mark.parametrize("module", MODULES)
def test_a_class_that_is_no_model_is_told_in_a_line(module, tmp_path):
    text, told = MODULES[module]
    (tmp_path / f"{module}.py").write_text(text)
    with pytest.raises(InputError, match=told) as caught:
        own(f"{module}:Mine", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_class_without_terms_and_blocks_is_told_once_it_is_built(tmp_path):
    (tmp_path / "model_bare.py").write_text(
        "from manta.trainer.model.transformer import Transformer\n"
        "class Mine(Transformer):\n"
        "    def __init__(self, config, *, vocabulary, sequence_length): super().__init__()\n"
        "    forward = counts = None\n"
    )
    with pytest.raises(InputError, match=r"got 'model_bare:Mine', whose __init__ sets no terms and no blocks; docs/models\.md shows how"):
        build(mine().model_copy(update={"family": "model_bare:Mine"}), vocabulary=9, sequence_length=8, code=tmp_path)


@pytest.mark.parametrize("family", [":Mine", "mine:", ".mine:Mine", "mine:Outer.Mine"])
def test_a_name_that_python_would_not_take_is_told(family):
    with pytest.raises(InputError, match=r"wants package\.module:Class, as Python names them"):
        own(family)


def test_an_option_that_the_example_can_not_use_is_told():
    own(FAMILY, EXAMPLE)
    with pytest.raises(InputError, match=r"model\.options\.power: got 'two', wants a whole number"):
        build(mine(options={"power": "two"}), vocabulary=9, sequence_length=8, code=EXAMPLE)


def test_what_is_proven_for_our_layers_alone_is_refused(workspace):
    for share in ("tensor", "sequence"):
        with pytest.raises(InputError, match="a model of your own is proven under ZeRO alone; leave out tensor, sequence and expert"):
            config.load(workspace.config_file, [f"model={json.dumps({'family': FAMILY, **SIZES})}", f"parallel.{share}=2"])


def mine(**changes) -> ModelConfig:
    return ModelConfig(family=FAMILY, dropout=0.1, **SIZES, **changes)


def with_mine(function, *arguments):
    """In a process of its own: the table's models stay what they are."""
    own(FAMILY, EXAMPLE)
    MODELS["mine"] = mine()
    return function(*arguments)


CELLS = [
    *(Cell("mine", 2, "fp32", ParallelConfig(zero=zero), again) for zero, again in ((0, "none"), (2, "selective"), (3, "full"))),
    Cell("mine", 2, "fp32", ParallelConfig(zero=1, offload=True)),
    Cell("mine", 2, "bf16", ParallelConfig(zero=1)),
    Cell("mine", 2, "bf16-autocast", ParallelConfig(zero=2)),
    Cell("mine", 2, "fp16", ParallelConfig(zero=3)),
]


@pytest.fixture(scope="module")
def plainly():
    return spmd(with_mine, 1, plain_all, [("mine", precision) for precision in sorted({cell.precision for cell in CELLS})])[0]


@pytest.mark.slow
def test_under_zero_it_equals_one_plain_process(plainly):
    for traces in spmd(with_mine, 2, under_all, CELLS):
        for cell, trace in zip(CELLS, traces, strict=True):
            for optimizer in OPTIMIZERS:
                assert trace[optimizer].differs(plainly["mine", cell.precision, optimizer]).within(BOUNDS[cell.precision]), cell


@pytest.mark.slow
@pytest.mark.parametrize("fault", [doubled, unreduced])
def test_the_comparison_notices_a_fault_in_it(plainly, fault):
    trace = spmd(with_mine, 2, under, Cell("mine", 2, "fp32"), "sgd", fault)[0]
    assert not trace.differs(plainly["mine", "fp32", "sgd"]).within(BOUNDS["fp32"])


def test_the_document_shows_the_example_as_it_is():
    assert (EXAMPLE / "parallel.py").read_text() in BLOCKS
    assert f"model:\n{yaml_section('model')}" in DOCUMENT


def yaml_section(name: str) -> str:
    lines = (EXAMPLE / "run.yaml").read_text().split(f"\n{name}:\n")[1].splitlines(keepends=True)
    return "".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith(" "))])


def test_the_document_lists_each_preset_with_its_size():
    rows = re.findall(r"^\| `([\w.-]+)` \|.*\| ([\d,]+) \| [\d,]+ \| ([\d,]+) \|", DOCUMENT, re.MULTILINE)
    assert {name for name, *_ in rows} == {path.stem for path in (ROOT / "launch/presets").glob("*.yaml")}
    for name, *sizes in rows:
        vocabulary, told = (int(size.replace(",", "")) for size in sizes)
        model = ModelConfig.model_validate(config.preset(name, EXAMPLE))
        with torch.device("meta"):
            made = build(model, vocabulary=vocabulary, sequence_length=positions(name))
        assert sum(parameter.numel() for parameter in made.parameters()) == told, name


def positions(name: str) -> int:
    (row,) = re.findall(rf"^\| `{re.escape(name)}` \|.*\| [\d,]+ \| ([\d,]+) \| [\d,]+ \|", DOCUMENT, re.MULTILINE)
    return int(row.replace(",", ""))
