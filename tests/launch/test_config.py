"""Bad input gets one line: file, key, got, wanted, remedy; exit 2; in under two seconds; nothing written."""

import time
from pathlib import Path

import pytest
import torch
import yaml

from manta.data.config_history import RENAMED
from manta.data.errors import InputError
from manta.launch import config
from manta.trainer.model.build import build_model

BAD = {
    "an unknown key": ("train:\n  step: 4\n", "train.step", "unknown key", "did you mean steps?"),
    "a wrong type": ("train:\n  global_batch: many\n", "train.global_batch", 'got "many", wants', "try train.global_batch="),
    "a yes for a number": ("train:\n  steps: yes\n", "train.steps", "got true, wants", "try train.steps="),
    "a key that stands twice": ("run:\n  seed: 1\n  seed: 2\n", "seed", "got it twice, first in line", "remove one"),
    "a batch that can not be dealt out": (
        "train:\n  global_batch: 10\n  micro_batch: 4\n",
        "train.micro_batch",
        "got 4, wants a divisor of global_batch 10",
        "use 1, 2, 5 or 10",
    ),
    "heads that can not be grouped": ("model:\n  kv_heads: 3\n", "model.kv_heads", "got 3, wants a divisor of heads 4", "use 1, 2 or 4"),
    "heads that do not divide the width": ("model:\n  heads: 3\n  kv_heads: 1\n", "model.heads", "got 3, wants", "use 1, 2, 4"),
    "a negative learning rate": (
        "optimizer:\n  learning_rate: -1e-3\n",
        "optimizer.learning_rate",
        "got -0.001, wants greater than 0",
        "try optimizer.learning_rate=",
    ),
    "a learning rate that is no number": (
        "optimizer:\n  learning_rate: .nan\n",
        "optimizer.learning_rate",
        "got NaN, wants",
        "try optimizer.learning_rate=",
    ),
    "a warmup longer than the run": (
        "schedule:\n  warmup_steps: 99\ntrain:\n  steps: 50\n",
        "schedule.warmup_steps",
        "got 99, wants at most train.steps 50",
        "shorten the warmup",
    ),
    "a ZeRO stage that is none": ("parallel:\n  zero: 4\n", "parallel.zero", "got 4, wants 0, 1, 2 or 3", "try parallel.zero="),
    "two precisions": ("precision: fp16-bf16\n", "precision", "got \"fp16-bf16\", wants 'fp32'", "leave it out"),
    "a tensor size that does not divide": (
        "parallel:\n  tensor: 3\n",
        "parallel.tensor",
        "got 3, wants a divisor of model.heads 4",
        "use 1 or 2",
    ),
    "heads that two ways of sharing use up": (
        "parallel:\n  tensor: 2\n  sequence: 2\n",
        "parallel.tensor x parallel.sequence",
        "got 4, wants a divisor of model.kv_heads 2",
        "use 1 or 2",
    ),
    "learned positions that are too few": (
        "model:\n  preset: gpt2-tiny\n  kv_heads: null\n  positions: 16\n",
        "model.positions",
        "got 16, wants at least data.sequence_length 32",
        "raise it",
    ),
    "experts that are not there": ("parallel:\n  expert: 2\n", "parallel.expert", "got 2, and the model has no experts", "leave it out"),
    "bf16 without ZeRO": ("parallel:\n  zero: 0\nprecision: bf16\n", "parallel.zero", "got 0, which goes wrong in bf16", "use 1, 2 or 3"),
    "blocks compiled under ZeRO-3": ("parallel:\n  zero: 3\ntrain:\n  compile: true\n", "train.compile", "got true", "use zero 1 or 2"),
    "fp8 under ZeRO-3": ("parallel:\n  zero: 3\nprecision: fp8\n", "parallel.zero", "got 3, and fp8 would keep whole", "use 1 or 2"),
    "a key of another family": ("model:\n  family: gpt2\n", "model.kv_heads", "got 2, and family gpt2 has none", "leave it out"),
    "an encoder on a causal objective": (
        "model:\n  preset: bert-tiny\n  kv_heads: null\n",
        "data.objective",
        "got 'causal', wants 'masked' for model.family bert",
        "set it",
    ),
    "a router that never learns": (
        "model:\n  experts: {experts: 4, width: 32, top_k: 1}\n",
        "model.experts.normalize",
        "got true, and with top_k 1 a router then never learns",
        "set it to false",
    ),
    "a speed that nothing has": (
        "model:\n  experts: {experts: 4, width: 32, bias_update_speed: 0.1}\n",
        "model.experts.bias_update_speed",
        "got 0.1, and balance loss has none",
        "leave it out",
    ),
    "a dropout of nearly all": (
        "model:\n  dropout: 0.9999\n",
        "model.dropout",
        "got 0.9999, wants less than or equal to 0.99",
        "leave it out",
    ),
    "an unknown preset": ("model:\n  preset: llama-tinny\n", "model.preset", "got 'llama-tinny', wants one of", "did you mean llama-tiny?"),
    "a share that is no number": (
        "data:\n  mixture: [{weights: {a: much}}]\n",
        "data.mixture.0.weights.a",
        'got "much", wants number',
        "try weights={",
    ),
    "a key that was renamed": (
        "train:\n  recompute: full\n",
        "train.recompute",
        "expected a known key, got train.recompute",
        "which is now train.activation_checkpointing. Rename it.",
    ),
    "a renamed key in a list": (
        "data:\n  sources: [{path: documents, filter: {unique: true}}]\n",
        "data.sources.0.filter.unique",
        "expected a known key, got data.sources.filter.unique",
        "which is now data.sources.filter.dedup. Rename it.",
    ),
    "a missing corpus": ("data:\n  sources: [nowhere/*.txt]\n", "nowhere/*.txt", "no such file", ""),
    "a batch beyond all reason": (
        "train:\n  global_batch: 99999999999999\n",
        "train.global_batch",
        "wants less than or equal to",
        "try train",
    ),
    "a ramp that begins late": (
        "train:\n  batch_ramp: [{from_tokens: 64, global_batch: 8}]\n",
        "train.batch_ramp",
        "expected a first stage with from_tokens 0, got 64",
        "add a stage before it",
    ),
    "a ramp out of order": (
        "train:\n  batch_ramp: [{global_batch: 4}, {from_tokens: 640, global_batch: 4}, {from_tokens: 640, global_batch: 8}]\n",
        "train.batch_ramp",
        "expected ascending from_tokens, got 640 after 640",
        "Sort the stages",
    ),
    "a ramp that micro batches do not divide": (
        "train:\n  batch_ramp: [{global_batch: 6}, {from_tokens: 640, global_batch: 8}]\n",
        "train.batch_ramp",
        "got global_batch 6, wants a multiple of micro_batch 4",
        "use micro_batch 1 or 2",
    ),
    "a ramp that leads elsewhere": (
        "train:\n  batch_ramp: [{global_batch: 4}, {from_tokens: 640, global_batch: 16}]\n",
        "train.batch_ramp",
        "got global_batch 16 in its last stage, wants train.global_batch 8",
        "add a stage, or change it",
    ),
    "an unknown key in a list": (
        "train:\n  batch_ramp: [{global_batch: 4, from_token: 0}, {from_tokens: 640, global_batch: 8}]\n",
        "train.batch_ramp.0.from_token",
        "unknown key",
        "did you mean from_tokens?",
    ),
    "a ramp of nothing": (
        "train:\n  batch_ramp: [{global_batch: 0}]\n",
        "train.batch_ramp.0.global_batch",
        "got 0, wants greater than or equal to 1",
        "global_batch=32",
    ),
    "a curriculum that leads elsewhere": (
        "data:\n  curriculum: [{sequence_length: 8}, {from_tokens: 640, sequence_length: 16}]\n",
        "data.curriculum",
        "got sequence_length 16 in its last stage, wants data.sequence_length 32",
        "add a stage, or change it",
    ),
    "short sequences that ranks can not share": (
        "data:\n  sequence_length: 6\n  curriculum: [{sequence_length: 3}, {from_tokens: 9, sequence_length: 6}]\nparallel:\n  sequence: 2",
        "parallel.sequence",
        "got 2, wants a divisor of data.curriculum's sequence_length 3",
        "use 1",
    ),
    "no list of sources": ("data:\n  sources: 4\n", "data.sources", "got 4, wants", "try data.sources="),
    "more ranks than none": (
        "cluster:\n  ranks_per_node: 0\n",
        "cluster.ranks_per_node",
        "got 0, wants greater than or equal to 1",
        "leave it out",
    ),
}


def write(workspace, name: str, text: str):
    """The small config, with `text` laid over it as it stands: so that duplicates stay duplicates."""
    whole = yaml.safe_load(workspace.config_file.read_text())
    for section, values in (yaml.safe_load(text) or {}).items():
        if isinstance(values, dict):
            whole[section] = {k: v for k, v in whole.get(section, {}).items() if k not in values}
        else:
            whole.pop(section, None)
    file = workspace.directory / f"{name}.yaml"
    sections = {line.rstrip(":") for line in text.splitlines() if not line.startswith(" ")}
    rest = {name: value for name, value in whole.items() if name not in sections}
    merged = "".join(
        line
        + "\n"
        + "".join(f"  {k}: {yaml.safe_dump(v, default_flow_style=True).splitlines()[0]}\n" for k, v in whole[line.rstrip(":")].items())
        if line.rstrip(":") in whole and not line.startswith(" ")
        else line + "\n"
        for line in text.splitlines()
    )
    file.write_text(merged + yaml.safe_dump(rest))
    return file


@pytest.mark.parametrize("name", BAD)
def test_a_bad_config_is_told_in_one_line(workspace, name):
    text, key, got, remedy = BAD[name]
    file = write(workspace, name, text)
    start = time.perf_counter()
    done = workspace.manta("train", file.name, "run.dir=never")
    took = time.perf_counter() - start
    assert done.returncode == 2, done.stderr
    told = done.stderr.strip()
    assert "\n" not in told, told
    if name != "a missing corpus":
        assert file.name in told
    for part in (key, got, remedy):
        assert part in told
    assert not (workspace.directory / "never").exists()
    assert took < 2.0


def test_a_list_for_a_key_and_a_path_that_is_none_are_told(workspace, tmp_path):
    file = tmp_path / "odd.yaml"
    file.write_text("? [a, b]\n: 1\n")
    with pytest.raises(InputError, match=r"odd.yaml:1: got a list or section for a key, wants a name"):
        config.load(file)
    with pytest.raises(InputError, match=r"run.dir: got .*wants a path; leave out the NUL"):
        config.load(workspace.config_file, [r'run.dir="a\0b"'])


def test_a_missing_file_is_told_with_the_nearest(workspace):
    done = workspace.manta("train", "run fil.yaml")
    assert done.returncode == 2
    assert "did you mean run file.yaml?" in done.stderr


def test_a_directory_that_can_not_be_written_is_told(workspace):
    done = workspace.manta("train", workspace.config_file.name, "run.dir=/proc/manta")
    assert done.returncode == 2
    assert "run.dir: got /proc/manta" in done.stderr


def test_more_gpus_than_there_are_is_told(workspace):
    done = workspace.manta("train", workspace.config_file.name, "run.dir=never", "cluster.ranks_per_node=4", CUDA_VISIBLE_DEVICES="0,1")
    assert done.returncode == 2
    assert "cluster.ranks_per_node: got 4, wants at most one a GPU, of which there are 2" in done.stderr


def test_every_mistake_is_told_at_once_and_where_it_was_made(workspace):
    done = workspace.manta("train", workspace.config_file.name, "train.stepz=1", "optimizer.beta1=2")
    assert done.returncode == 2
    assert sorted(line.split(": ")[1:3] for line in done.stderr.splitlines()) == [
        ["command line", "optimizer.beta1"],
        ["command line", "train.stepz"],
    ]


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_key_is_refused_with_its_new_name(workspace, old, new):
    section, _, name = old.rpartition(".")
    overrides = [f"{old}=1"]
    if section == "data.sources.filter":
        overrides = [f"data.sources=[{{path: documents, filter: {{{name}: 1}}}}]"]
    elif section == "model.experts":
        overrides = [f"model.experts={{experts: 4, width: 8, {name}: 1}}"]
    with pytest.raises(InputError) as refused:
        config.load(workspace.config_file, overrides)
    key = old.replace("sources.", "sources.0.")
    assert str(refused.value) == f"command line: {key}: expected a known key, got {old}, which is now {new}. Rename it."


def test_a_renamed_key_in_a_preset_file_is_refused_with_its_new_name(workspace, tmp_path):
    file = tmp_path / "model.yaml"
    file.write_text("{layers: 2, width: 64, heads: 4, experts: {experts: 4, width: 8, router_z: 0.1}}")
    with pytest.raises(InputError) as refused:
        config.load(workspace.config_file, [f"model={{preset: {file}}}"])
    told = "model.experts.router_z: expected a known key, got model.experts.router_z, which is now model.experts.router_z_loss. Rename it."
    assert str(refused.value) == f"{file}: {told}"


def test_numbers_are_read_as_people_write_them(workspace):
    loaded = config.load(workspace.config_file, ["optimizer.learning_rate=1e-4", "optimizer.epsilon=1E-9", "train.steps=1_000"])
    assert loaded.optimizer.learning_rate == 1e-4
    assert loaded.optimizer.epsilon == 1e-9
    assert loaded.train.steps == 1000


def test_a_config_comes_back_from_its_own_yaml(workspace, tmp_path):
    loaded = config.load(workspace.config_file)
    again = tmp_path / "config.yaml"
    again.write_text(loaded.to_yaml())
    assert config.load(again) == loaded


def test_what_is_written_in_a_config_outweighs_its_preset(workspace):
    loaded = config.load(workspace.config_file, ["model.preset=gpt2-124m", "model.width=96"])
    assert (loaded.model.layers, loaded.model.width, loaded.model.heads) == (2, 96, 12)


PRESETS = {
    "gpt2-tiny": 0.83e6,
    "gpt2-124m": 124.4e6,
    "gpt2-350m": 354.8e6,
    "gpt2-774m": 774.0e6,
    "gpt2-1.5b": 1557.6e6,
    "llama-tiny": 0.804e6,
    "llama-1b": 1038.7e6,
    "llama-8b": 7241.7e6,
    "moe-tiny": 2.57e6,
    "moe-8x": 3123.9e6,
    "bert-tiny": 0.86e6,
    "bert-base": 109.5e6,
    "bert-large": 335.2e6,
}  # parameters: of gpt2 with its own vocabulary of 50257 and 1024 positions, bert with 30522 and 512; of tiny ones and llama without one


def test_each_preset_is_tried():
    assert {path.stem for path in (Path(config.__file__).parent / "presets").glob("*.yaml")} == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_a_model_of_the_size_that_it_says(workspace, name):
    tree = yaml.safe_load(workspace.config_file.read_text()) | {"model": config.preset(name, workspace.config_file)}
    tree["data"]["objective"] = "masked" if name.startswith("bert") else "causal"
    model = config.validate(tree, workspace.config_file, {}).model
    own = {"gpt2": (50257, 1024), "bert": (30522, 512)}
    vocabulary, length = (128, 128) if "tiny" in name else own.get(model.family, (50257 if "moe" in name else 32000, 1024))
    with torch.device("meta"):
        made = build_model(model, vocabulary=vocabulary, sequence_length=length)
    parameters = sum(parameter.numel() for parameter in made.parameters())
    assert parameters == pytest.approx(PRESETS[name], rel=0.01)


def test_sources_are_read_as_people_write_them(workspace):
    for written in ("stdlib:", "[stdlib:]", "['stdlib:']"):
        assert config.load(workspace.config_file, [f"data.sources={written}"]).data.sources[0].path == "stdlib:"
    with pytest.raises(InputError, match=r"data.sources: got \[\], wants at least one .*; try data.sources=\["):
        config.load(workspace.config_file, ["data.sources=[]"])


def test_two_keys_that_disagree_are_laid_to_the_one_set_last(workspace):
    with pytest.raises(InputError, match=r"^command line: train.micro_batch: got 4, wants a divisor of global_batch 9"):
        config.load(workspace.config_file, ["train.global_batch=9"])


def test_a_missing_section_is_told_with_what_it_needs(workspace, tmp_path):
    file = tmp_path / "no-run.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(workspace.config_file.read_text()).items() if k != "run"}))
    with pytest.raises(InputError, match=r"run: got nothing, wants .*; try run.dir=runs/mine"):
        config.load(file)


def test_the_reference_is_that_of_the_code():
    written = Path(__file__).parents[2] / "docs" / "config.md"
    told = "run: .venv/bin/python -c 'from manta.launch.config import reference; print(reference())' > docs/config.md"
    assert written.read_text().rstrip() == config.reference().rstrip(), told


def test_the_reference_has_the_keys_of_sections_in_sections():
    told = config.reference()
    for key in (
        "model.experts",
        "model.experts.experts",
        "model.experts.top_k",
        "model.experts.router_z_loss",
        "model.experts.bias_update_speed",
    ):
        assert f"| `{key}` |" in told
    assert "Undefined" not in told


def test_a_section_on_the_command_line_is_where_its_keys_were_set(workspace, tmp_path):
    file = tmp_path / "mixture.yaml"
    tree = yaml.safe_load(workspace.config_file.read_text())
    file.write_text(yaml.safe_dump(tree | {"model": {**tree["model"], "experts": {"experts": 4, "width": 8, "top_kk": 2}}}))
    for override, told in (
        ("model.experts={experts: 4}", "model.experts.width: got nothing"),
        ("model.experts={experts: 4, width: many}", 'model.experts.width: got "many"'),
        ("model.experts={experts: 4, width: 8, top_kk: 2}", "model.experts.top_kk: got an unknown key"),
        ("model.experts={experts: 4, width: 8, top_k: 9}", "model.experts.top_k: got 9, wants at most experts 4"),
        ("model={width: 32}", "model.layers: got nothing"),
    ):
        with pytest.raises(InputError) as refused:
            config.load(file, [override])
        assert str(refused.value).startswith(f"command line: {told}")
    with pytest.raises(InputError) as refused:
        config.load(file, ["model.experts.shared=1"])
    assert str(refused.value).startswith(f"{file}: model.experts.top_kk: got an unknown key")


def test_an_override_must_name_a_key(workspace):
    with pytest.raises(InputError, match=r"got 'steps', wants section.key=value"):
        config.load(workspace.config_file, ["steps"])


def test_a_text_that_looks_like_a_number_is_still_a_text_when_a_config_was_written(workspace, tmp_path):
    loaded = config.load(workspace.config_file, ["run.dir='1e3'", "data.sources=[{path: text, name: '1E-4'}]"])
    (tmp_path / "again.yaml").write_text(loaded.to_yaml())
    assert config.load(tmp_path / "again.yaml") == loaded
