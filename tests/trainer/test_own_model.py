"""A user's model class trains like the built-in models. docs/own_model.md shows how, and its example is what these tests run."""

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
from parity import BOUNDS, MODELS, OPTIMIZERS, SIZES, Cell, run_cell, run_cells, run_plain_cells
from parity_table import double_gradient, skip_reduction
from spmd import spmd

from manta.data.errors import InputError
from manta.launch import config
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.sections import ParallelConfig
from manta.trainer.dataloader.batch import Batch
from manta.trainer.engine.deepspeed import Engine
from manta.trainer.metrics import read_metrics
from manta.trainer.model.build import build_model, load_class
from manta.trainer.model.gpt2 import GPT2
from manta.trainer.model.transformer import count_targets
from manta.trainer.pretrained.load import load_pretrained
from manta.trainer.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/own_model"
DOCUMENT = (ROOT / "docs/own_model.md").read_text()
PRESETS = (ROOT / "docs/models.md").read_text()
FAMILY = "parallel:Parallel"
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def checkout(workspace) -> Path:
    """The directory in which the document's commands run. The example is in it, among files named like our packages."""
    example = workspace.directory / "examples/own_model"
    shutil.copytree(EXAMPLE, example, ignore=shutil.ignore_patterns("runs", "corpora", "__pycache__"))
    for name in ("data.py", "cluster.py", "launch.py", "manta.py", "typing.py", "torch.py"):
        (example / name).write_text("raise SystemExit('the user\\'s own file was imported')\n")
    shutil.copytree(workspace.directory / "trainer", example / "trainer")
    return workspace.directory


@pytest.fixture(scope="module")
def trained(workspace, checkout) -> RunDirectory:
    """Run the document's commands on a smaller corpus and for fewer steps."""
    smaller = yaml.safe_load(workspace.config_file.read_text())
    smaller["data"]["directory"] = str(workspace.directory / "corpora")  # already prepared
    (checkout / "examples/own_model/documents").symlink_to(workspace.directory / "documents")
    overrides = [f"{section}={json.dumps(smaller[section])}" for section in ("data", "tokenizer", "train", "cluster", "checkpoint")]
    overrides += ["train.steps=8", "schedule.warmup_steps=2", "model.width=64", "model.mlp_width=128"]
    (commands,) = [block for block in BLOCKS if block.startswith("cd examples/own_model\n")]
    directory = checkout
    for line in commands.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "cd":
            directory = directory / arguments[0]
            continue
        assert program == "manta"
        arguments = [re.sub(r"train\.steps=\d+", "train.steps=12", argument) for argument in arguments]
        command = [MANTA, *arguments, *(overrides if "train" in arguments else [])]
        result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, (line, result.stderr)
        if "generate" in arguments:
            assert result.stdout.startswith(arguments[2])
            assert len(result.stdout) > len(arguments[2]) + 1
    return RunDirectory(checkout / "examples/own_model/runs/parallel")


@pytest.mark.slow
def test_the_documents_commands_train_the_example_and_resume_elsewhere(trained, checkout):
    lines = read_metrics(trained.metrics_file)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["world_size"] for line in lines] == [2] * 8 + [1] * 4
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.1
    assert trained.manifest().code == str(checkout / "examples/own_model")


@pytest.mark.slow
def test_a_rank_without_a_launcher_finds_the_class(trained, checkout):
    copy = checkout / "own without a launcher"
    shutil.copytree(trained.path, copy)
    shutil.rmtree(copy / "checkpoints/step-00000012")
    command = [MANTA.with_name("python"), "-P", "-m", "manta.trainer", str(copy)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    losses, expected = ([line["train/loss"] for line in read_metrics(RunDirectory(path).metrics_file)] for path in (copy, trained.path))
    assert losses == expected  # the last steps again, bitwise


@pytest.mark.slow
def test_its_cache_and_head_work_like_any_decoders(trained):
    model = load_pretrained(trained).model
    tokens = torch.randint(0, 200, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] += 1
    torch.testing.assert_close(model.logits(tokens)[:, :7], model.logits(changed)[:, :7])
    assert type(model).__name__ == "Parallel"


@pytest.mark.slow
def test_a_missing_code_directory_falls_back_to_the_current_one(trained, tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text(trained.manifest().model_copy(update={"code": str(tmp_path / "gone")}).model_dump_json())
    monkeypatch.chdir(EXAMPLE)
    assert RunDirectory(tmp_path).code == EXAMPLE


def test_a_missing_class_is_refused_before_anything_starts(workspace):
    model = {"family": "nowhere.at_all:Model", **SIZES}
    result = workspace.manta("train", str(workspace.config_file), "run.dir=own never", f"model={json.dumps(model)}")
    assert result.returncode == 2
    problem = f"there is no module nowhere, installed or in {workspace.directory}"
    remedy = "Install the package, or start manta from the module's directory."
    assert result.stderr == f"manta: model.family: expected a model class, got 'nowhere.at_all:Model': {problem}. {remedy}\n"
    assert not (workspace.directory / "own never").exists()


MODULES = {
    "model_empty": ("", r"it is missing in .*model_empty.py\. Derive a class from manta"),
    "model_missing": ("import no_such_package\nMine = 1\n", "there is no module no_such_package, installed or in"),
    "model_broken": ("def (:\n", r"its import raises SyntaxError: .*model_broken.py, line 1\)\. Fix the module\."),
    "model_raising": (
        "\nraise ValueError('no\\nluck')\n",
        r"its import raises ValueError: no luck \(.*model_raising.py:2\)\. Fix the module\.",
    ),
    "model_instance": ("Mine = 1\n", r"it is 1 in .*model_instance.py\. Derive a class from manta.trainer.model.transformer"),
    "model_module": ("import torch\nclass Mine(torch.nn.Module): pass\n", "it is <class 'model_module.Mine'> in"),
    "model_unfinished": (
        "from manta.trainer.model.transformer import Transformer\nclass Mine(Transformer): pass\n",
        r"the class in .*model_unfinished.py does not define counts, forward\. docs/own_model\.md shows an example",
    ),
    "model_signature": (
        "from manta.trainer.model.decoder import Decoder\nclass Mine(Decoder):\n    embed = None\n",
        r"cannot be built with \(config, vocabulary=.*\): got an unexpected keyword argument 'sequence_length'",
    ),
}


def test_an_installed_package_takes_precedence_over_a_file(tmp_path):
    (tmp_path / "yaml.py").write_text("raise AssertionError\n")
    with pytest.raises(InputError, match=r"it is missing in .*site-packages/yaml/__init__\.py"):
        load_class("yaml:Mine", tmp_path)


@pytest.mark.parametrize("module", MODULES)
def test_an_unusable_class_is_refused_in_one_line(module, tmp_path):
    text, message = MODULES[module]
    (tmp_path / f"{module}.py").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_class(f"{module}:Mine", tmp_path)
    assert "\n" not in str(error.value)


def test_a_class_without_terms_and_blocks_is_refused_when_built(tmp_path):
    (tmp_path / "model_bare.py").write_text(
        "from manta.trainer.model.transformer import Transformer\n"
        "class Mine(Transformer):\n"
        "    def __init__(self, config, *, vocabulary, sequence_length): super().__init__()\n"
        "    forward = counts = None\n"
    )
    with pytest.raises(InputError, match=r"got 'model_bare:Mine': its __init__ sets no terms and no blocks\. docs/own_model\.md shows"):
        build_model(mine().model_copy(update={"family": "model_bare:Mine"}), vocabulary=9, sequence_length=8, code=tmp_path)


@pytest.mark.parametrize("family", [":Mine", "mine:", ".mine:Mine", "mine:Outer.Mine"])
def test_an_invalid_class_path_is_refused(family):
    with pytest.raises(InputError, match=r"expected package\.module:Class, got .*\. Use valid Python names"):
        load_class(family)


def test_an_invalid_option_of_the_example_is_refused():
    load_class(FAMILY, EXAMPLE)
    with pytest.raises(InputError, match=r"model\.options\.power: expected a whole number, got 'two'"):
        build_model(mine(options={"power": "two"}), vocabulary=9, sequence_length=8, code=EXAMPLE)


def test_parallelism_that_needs_our_layers_is_refused(workspace):
    for share in ("tensor", "sequence"):
        reason = rf"parallel\.{share}: expected 1 for your own model, which is proven only under ZeRO, got 2\. Omit it\."
        with pytest.raises(InputError, match=reason):
            config.load(workspace.config_file, [f"model={json.dumps({'family': FAMILY, **SIZES})}", f"parallel.{share}=2"])


def mine(**changes) -> ModelConfig:
    return ModelConfig(family=FAMILY, dropout=0.1, **SIZES, **changes)


def with_mine(function, *arguments):
    """In a forked process, so that MODELS does not change for other tests."""
    load_class(FAMILY, EXAMPLE)
    MODELS["mine"] = mine()
    return function(*arguments)


CELLS = [
    *(
        Cell("mine", 2, "fp32", ParallelConfig(zero=zero), checkpointing)
        for zero, checkpointing in ((0, "none"), (2, "selective"), (3, "full"))
    ),
    Cell("mine", 2, "fp32", ParallelConfig(zero=1, offload=True)),
    Cell("mine", 2, "bf16", ParallelConfig(zero=1)),
    Cell("mine", 2, "bf16-autocast", ParallelConfig(zero=2)),
    Cell("mine", 2, "fp16", ParallelConfig(zero=3)),
]


@pytest.fixture(scope="module")
def plain_traces():
    return spmd(with_mine, 1, run_plain_cells, [("mine", precision) for precision in sorted({cell.precision for cell in CELLS})])[0]


@pytest.mark.slow
def test_the_example_has_parity_under_zero(plain_traces):
    for traces in spmd(with_mine, 2, run_cells, CELLS):
        for cell, trace in zip(CELLS, traces, strict=True):
            for optimizer in OPTIMIZERS:
                assert trace[optimizer].difference(plain_traces["mine", cell.precision, optimizer]).within(BOUNDS[cell.precision]), cell


@pytest.mark.slow
@pytest.mark.parametrize("fault", [double_gradient, skip_reduction])
def test_the_parity_comparison_detects_a_fault_in_it(plain_traces, fault):
    trace = spmd(with_mine, 2, run_cell, Cell("mine", 2, "fp32"), "sgd", fault)[0]
    assert not trace.difference(plain_traces["mine", "fp32", "sgd"]).within(BOUNDS["fp32"])


class Measured(GPT2):
    """Has a metric with a gradient, as written by a user who forgets torch.no_grad()."""

    metrics = frozenset({"size"})

    def forward(self, batch: Batch, divisors_K: torch.Tensor) -> torch.Tensor:
        x_BTD, _ = self.hidden(batch)
        loss, _ = self.head(x_BTD.flatten(0, 1), batch.targets.flatten())
        return torch.stack([loss, self.embedding.weight.float().square().sum()]) / divisors_K

    def counts(self, batch: Batch) -> torch.Tensor:
        return count_targets(batch.targets).repeat(2)


def measure(engine: Engine) -> None:
    engine.module.__class__, engine.module.terms = Measured, ("loss", "size")


@pytest.mark.parametrize("zero", [0, 1])
def test_a_metric_with_a_gradient_is_not_trained_on(zero):
    cell = Cell("gpt2", 1, "fp32", ParallelConfig(zero=zero))
    without, measured = (spmd(run_cell, 1, cell, "adamw", fault)[0] for fault in (None, measure))
    assert measured.norms == without.norms
    assert all((measured.movements[name] == movement).all() for name, movement in without.movements.items())


def test_the_document_shows_the_examples_files():
    assert (EXAMPLE / "parallel.py").read_text() in BLOCKS
    assert f"model:\n{yaml_section('model')}" in DOCUMENT


def yaml_section(name: str) -> str:
    lines = (EXAMPLE / "run.yaml").read_text().split(f"\n{name}:\n")[1].splitlines(keepends=True)
    return "".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith(" "))])


def test_the_document_lists_each_preset_with_its_parameters():
    rows = re.findall(r"^\| `([\w.-]+)` \|.*\| ([\d,]+) \| (?:[\d,]+|-) \| ([\d,]+) \|", PRESETS, re.MULTILINE)
    assert {name for name, *_ in rows} == {path.stem for path in (ROOT / "launch/presets").glob("*.yaml")}
    for name, *sizes in rows:
        vocabulary, expected = (int(size.replace(",", "")) for size in sizes)
        model = ModelConfig.model_validate(config.preset(name, EXAMPLE))
        with torch.device("meta"):
            built = build_model(model, vocabulary=vocabulary, sequence_length=positions(name))
        assert sum(parameter.numel() for parameter in built.parameters()) == expected, name


def positions(name: str) -> int:
    """Return the learned positions in a preset's row; with rotary positions, which have none, any length will do."""
    (row,) = re.findall(rf"^\| `{re.escape(name)}` \|.*\| [\d,]+ \| ([\d,]+|-) \| [\d,]+ \|", PRESETS, re.MULTILINE)
    return 1024 if row == "-" else int(row.replace(",", ""))
