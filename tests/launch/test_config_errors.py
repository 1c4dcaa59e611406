"""An invalid config ends with exit code 2 within two seconds, one line per problem, and writes nothing."""

import re
import resource
from pathlib import Path

import pytest
import yaml

from manta.data.config_history import RENAMED
from manta.data.errors import InputError
from manta.launch import config

INVALID = {
    "unknown key": (
        "train:\n  step: 4\n",
        ': train.step: expected a key of train, got "step". Did you mean steps?',
    ),
    "wrong type": (
        "train:\n  global_batch: many\n",
        ': train.global_batch: expected an integer (...), got "many". Set train.global_batch=256, for example.',
    ),
    "yes instead of a number": (
        "train:\n  steps: yes\n",
        ": train.steps: expected an integer (...), got true. Set train.steps=1000, for example.",
    ),
    "repeated key": (
        "run:\n  seed: 1\n  seed: 2\n",
        ":4: seed: expected it once, got it also in line 3. Remove one.",
    ),
    "batch that micro batches do not divide": (
        "train:\n  global_batch: 10\n  micro_batch: 4\n",
        ": train.micro_batch: expected a divisor of global_batch (10), got 4. Use 1, 2, 5 or 10.",
    ),
    "kv_heads that do not divide heads": (
        "model:\n  kv_heads: 3\n",
        ": model.kv_heads: expected a divisor of heads (4), got 3. Use 1, 2 or 4.",
    ),
    "heads that do not divide the width": (
        "model:\n  heads: 3\n  kv_heads: 1\n",
        ": model.heads: expected a divisor of width (64), got 3. Use 1, 2, 4, 8, 16, 32 or 64, or set head_width.",
    ),
    "negative learning rate": (
        "optimizer:\n  learning_rate: -1e-3\n",
        (
            ": optimizer.learning_rate: expected a number greater than 0 (...), got -0.001."
            " Omit it, or set optimizer.learning_rate=0.0003, the default."
        ),
    ),
    "learning rate that is NaN": (
        "optimizer:\n  learning_rate: .nan\n",
        ": optimizer.learning_rate: expected a finite number (...), got NaN. Omit it, or set optimizer.learning_rate=0.0003, the default.",
    ),
    "warmup longer than the run": (
        "schedule:\n  warmup_steps: 99\ntrain:\n  steps: 50\n",
        ": schedule.warmup_steps: expected at most train.steps (50), got 99. Shorten the warmup or train longer.",
    ),
    "warmup longer than schedule.steps": (
        "schedule:\n  warmup_steps: 40\n  steps: 30\ntrain:\n  steps: 50\n",
        ": schedule.warmup_steps: expected at most schedule.steps (30), got 40. Shorten the warmup or raise schedule.steps.",
    ),
    "unknown ZeRO stage": (
        "parallel:\n  zero: 4\n",
        ": parallel.zero: expected 0, 1, 2 or 3 (...), got 4. Omit it, or set parallel.zero=1, the default.",
    ),
    "two precisions": (
        "precision: fp16-bf16\n",
        (
            ': precision: expected fp32, bf16, bf16-autocast, fp16 or fp8 (...), got "fp16-bf16".'
            ' Omit it, or set precision="bf16", the default.'
        ),
    ),
    "tensor size that does not divide heads": (
        "parallel:\n  tensor: 3\n",
        ": parallel.tensor: expected a divisor of model.heads (4), got 3. Use 1 or 2.",
    ),
    "too few heads for tensor and sequence": (
        "parallel:\n  tensor: 2\n  sequence: 2\n",
        ": parallel.tensor x parallel.sequence: expected a divisor of model.kv_heads (2), got 4. Use 1 or 2.",
    ),
    "too few learned positions": (
        "model:\n  preset: gpt2-tiny\n  kv_heads: null\n  positions: 16\n",
        ": model.positions: expected at least data.sequence_length (32), got 16. Raise it or shorten the sequences.",
    ),
    "expert parallelism without experts": (
        "parallel:\n  expert: 2\n",
        ": parallel.expert: expected 1 for a model without experts, got 2. Set model.experts, or omit it.",
    ),
    "bf16 without ZeRO": (
        "parallel:\n  zero: 0\nprecision: bf16\n",
        (
            ": parallel.zero: expected 1, 2 or 3 in bf16, because DeepSpeed without ZeRO does not keep fp32 masters as it should, got 0."
            " Use 1, 2 or 3."
        ),
    ),
    "compiled blocks under ZeRO-3": (
        "parallel:\n  zero: 3\ntrain:\n  compile: true\n",
        ": train.compile: expected false under ZeRO-3, whose hooks break the graph at every layer, got true. Omit it, or use zero 1 or 2.",
    ),
    "fp8 under ZeRO-3": (
        "parallel:\n  zero: 3\nprecision: fp8\n",
        ": parallel.zero: expected 1 or 2 in fp8, which keeps the weights that ZeRO-3 gathers, got 3. Use 1 or 2.",
    ),
    "key of another model family": (
        "model:\n  family: gpt2\n",
        ": model.kv_heads: expected no value for family gpt2, got 2. Remove it.",
    ),
    "encoder with a causal objective": (
        "model:\n  preset: bert-tiny\n  kv_heads: null\n",
        ': data.objective: expected masked for model.family bert, got "causal". Set data.objective=masked.',
    ),
    "router that learns nothing": (
        "model:\n  experts: {experts: 4, width: 32, top_k: 1}\n",
        ": model.experts.normalize: expected false with top_k 1, because the router would learn nothing, got true. Set it to false.",
    ),
    "bias speed without a bias": (
        "model:\n  experts: {experts: 4, width: 32, bias_update_speed: 0.1}\n",
        ": model.experts.bias_update_speed: expected no value with balance loss, got 0.1. Remove it.",
    ),
    "dropout close to 1": (
        "model:\n  dropout: 0.9999\n",
        ": model.dropout: expected a number of at most 0.99 (...), got 0.9999. Omit it, or set model.dropout=0.0, the default.",
    ),
    "unknown preset": (
        "model:\n  preset: llama-tinny\n",
        (
            ": model.preset: expected the path of a YAML file, or one of bert-base, bert-large, bert-tiny, gpt2-1.5b, gpt2-124m, gpt2-350m,"
            ' gpt2-774m, gpt2-tiny, llama-1b, llama-8b, llama-tiny, moe-8x, moe-tiny, got "llama-tinny". Did you mean llama-tiny?'
        ),
    ),
    "preset that is an empty section": (
        "model:\n  preset: {}\n",
        (
            ": model.preset: expected the path of a YAML file, or one of bert-base, bert-large, bert-tiny, gpt2-1.5b, gpt2-124m, gpt2-350m,"
            " gpt2-774m, gpt2-tiny, llama-1b, llama-8b, llama-tiny, moe-8x, moe-tiny, got {}. Use one of them."
        ),
    ),
    "name of several lines": (
        'data:\n  mixture: [{weights: {"a\\nb": much}}]\n',
        ': data.mixture.0.weights.a\\nb: expected a number (...), got "much". Set weights={web: 0.7, code: 0.3}, for example.',
    ),
    "mixture weight that is no number": (
        "data:\n  mixture: [{weights: {a: much}}]\n",
        ': data.mixture.0.weights.a: expected a number (...), got "much". Set weights={web: 0.7, code: 0.3}, for example.',
    ),
    "renamed key": (
        "train:\n  recompute: full\n",
        ': train.recompute: expected the key\'s new name, got "recompute". Rename it to train.activation_checkpointing.',
    ),
    "renamed key in a list": (
        "data:\n  sources: [{path: documents, filter: {unique: true}}]\n",
        ': data.sources.0.filter.unique: expected the key\'s new name, got "unique". Rename it to data.sources.filter.dedup.',
    ),
    "huge batch": (
        "train:\n  global_batch: 99999999999999\n",
        ": train.global_batch: expected a number of at most 1048576 (...), got 99999999999999. Set train.global_batch=256, for example.",
    ),
    "ramp that does not start at 0": (
        "train:\n  batch_ramp: [{from_tokens: 64, global_batch: 8}]\n",
        ": train.batch_ramp: expected a first stage with from_tokens 0, got 64. Lower it, or add a stage before it.",
    ),
    "ramp out of order": (
        "train:\n  batch_ramp: [{global_batch: 4}, {from_tokens: 640, global_batch: 4}, {from_tokens: 640, global_batch: 8}]\n",
        ": train.batch_ramp: expected ascending from_tokens, got 640 after 640. Sort the stages.",
    ),
    "ramp that micro batches do not divide": (
        "train:\n  batch_ramp: [{global_batch: 6}, {from_tokens: 640, global_batch: 8}]\n",
        ": train.batch_ramp: expected global batches that are multiples of micro_batch (4), got 6. Change it, or use micro_batch 1 or 2.",
    ),
    "ramp with another final batch": (
        "train:\n  batch_ramp: [{global_batch: 4}, {from_tokens: 640, global_batch: 16}]\n",
        ": train.batch_ramp: expected train.global_batch (8) in the last stage, got 16. Change it, or add a stage.",
    ),
    "unknown key in a list": (
        "train:\n  batch_ramp: [{global_batch: 4, from_token: 0}, {from_tokens: 640, global_batch: 8}]\n",
        ': train.batch_ramp.0.from_token: expected a key of train.batch_ramp.0, got "from_token". Did you mean from_tokens?',
    ),
    "batch of 0": (
        "train:\n  batch_ramp: [{global_batch: 0}]\n",
        ": train.batch_ramp.0.global_batch: expected a number of at least 1 (...), got 0. Set global_batch=32, for example.",
    ),
    "curriculum with another final length": (
        "data:\n  curriculum: [{sequence_length: 8}, {from_tokens: 640, sequence_length: 16}]\n",
        ": data.curriculum: expected data.sequence_length (32) in the last stage, got 16. Change it, or add a stage.",
    ),
    "curriculum that ranks cannot share": (
        "data:\n  sequence_length: 6\n  curriculum: [{sequence_length: 3}, {from_tokens: 9, sequence_length: 6}]\nparallel:\n  sequence: 2",
        ": parallel.sequence: expected a divisor of data.curriculum's sequence_length (3), got 2. Use 1.",
    ),
    "nothing instead of sources": (
        "data:\n  sources: null\n",
        ": data.sources: expected a list (...), got null. Set data.sources=[my-text/*.txt], for example.",
    ),
    "texts of a model that generates none": (
        "model:\n  preset: bert-tiny\n  layers: 2\ndata:\n  objective: masked\ntrack:\n  texts: 2\n",
        ': model.family: expected llama or gpt2 with track.texts, got "bert". Omit track.texts.',
    ),
    "0 ranks per node": (
        "cluster:\n  ranks_per_node: 0\n",
        ": cluster.ranks_per_node: expected a number of at least 1 (...), got 0. Omit it.",
    ),
}
"""A part of a config, and the message after the file's name. (...) stands for the key's description."""


def write(workspace, name: str, text: str) -> Path:
    """Write the small config with `text` in place of the same keys. The text is copied verbatim, so that repeated keys stay."""
    tree = yaml.safe_load(workspace.config_file.read_text())
    for section, values in (yaml.safe_load(text) or {}).items():
        if isinstance(values, dict):
            tree[section] = {k: v for k, v in tree.get(section, {}).items() if k not in values}
        else:
            tree.pop(section, None)
    lines = []
    for line in text.splitlines():
        lines.append(line)
        if not line.startswith(" ") and line.rstrip(":") in tree:
            section = tree.pop(line.rstrip(":"))
            lines += [f"  {key}: {yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for key, value in section.items()]
    file = workspace.directory / f"{name}.yaml"
    file.write_text("\n".join(lines) + "\n" + yaml.safe_dump(tree))
    return file


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_config_is_reported_in_one_line(workspace, name):
    text, message = INVALID[name]
    file = write(workspace, name, text)
    start = processor_time()
    result = workspace.manta("train", file.name, "run.dir=never")
    took = processor_time() - start
    assert result.returncode == 2
    assert re.fullmatch(re.escape(f"manta: {file.name}{message}\n").replace(r"\(\.\.\.\)", r"\(.+\)"), result.stderr), result.stderr
    assert not (workspace.directory / "never").exists()
    assert took < 2.0


def processor_time() -> float:
    """Return the seconds that finished child processes have computed: unlike the clock's, they do not depend on what else is running."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_a_missing_corpus_is_reported_before_a_run_starts(workspace):
    file = write(workspace, "missing corpus", "data:\n  sources: [nowhere/*.txt]\n")
    start = processor_time()
    result = workspace.manta("train", file.name, "run.dir=never")
    assert processor_time() - start < 2.0
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "nowhere/*.txt" in result.stderr
    assert "no such file" in result.stderr
    assert not (workspace.directory / "never").exists()


def test_a_list_as_a_key_and_an_invalid_path_are_reported(workspace, tmp_path):
    file = tmp_path / "odd.yaml"
    file.write_text("? [a, b]\n: 1\n")
    with pytest.raises(InputError, match=r"odd.yaml:1: expected a name as the key, got a list or section. Write name: value."):
        config.load(file)
    with pytest.raises(InputError, match=r"run.dir: expected a path, got .*. Remove the control characters."):
        config.load(workspace.config_file, [r'run.dir="a\0b"'])


def test_a_missing_file_is_reported_with_the_most_similar_name(workspace):
    result = workspace.manta("train", "run fil.yaml")
    expected = "manta: run fil.yaml: expected a config, got an error: No such file or directory. Did you mean run file.yaml?\n"
    assert (result.returncode, result.stderr) == (2, expected)


def test_a_directory_that_is_not_writable_is_reported(workspace):
    result = workspace.manta("train", workspace.config_file.name, "run.dir=/proc/manta")
    assert result.returncode == 2
    assert "run.dir: " in result.stderr
    assert "/proc/manta" in result.stderr


def test_gpus_that_cuda_would_not_show_are_reported(workspace):
    refused = workspace.manta("train", workspace.config_file.name, "run.dir=never", "--dry-run", CUDA_VISIBLE_DEVICES="0,0")
    remedy = "Correct it, or unset it to use all GPUs."
    assert (refused.returncode, refused.stderr) == (2, f"manta: CUDA_VISIBLE_DEVICES: expected each GPU once, got 0,0. {remedy}\n")


def test_more_ranks_than_gpus_are_reported(workspace):
    arguments = ("train", workspace.config_file.name, "run.dir=never", "cluster.ranks_per_node=4")
    result = workspace.manta(*arguments, CUDA_VISIBLE_DEVICES="0,1")
    expected = "manta: cluster.ranks_per_node: expected at most one per GPU (2), got 4. Lower or omit it.\n"
    assert (result.returncode, result.stderr) == (2, expected)


def test_all_problems_are_reported_at_once_with_the_place_of_each(workspace):
    result = workspace.manta("train", workspace.config_file.name, "train.stepz=1", "optimizer.beta1=2")
    assert result.returncode == 2
    assert sorted(line.split(": ")[1:3] for line in result.stderr.splitlines()) == [
        ["command line", "optimizer.beta1"],
        ["command line", "train.stepz"],
    ]


def test_a_value_of_none_of_several_types_is_reported_once(workspace):
    with pytest.raises(InputError) as refused:
        config.load(workspace.config_file, ["cluster.nodes=[1]"])
    expected = "expected an integer (nodes to run on), got [1]. Omit it, or set cluster.nodes=1, the default."
    assert str(refused.value) == f"command line: cluster.nodes: {expected}"


def test_an_empty_list_of_sources_is_reported_with_an_example(workspace):
    with pytest.raises(InputError, match=r"data.sources: expected at least one \(.*\), got \[\]. Set data.sources=\["):
        config.load(workspace.config_file, ["data.sources=[]"])


def test_two_keys_that_disagree_are_reported_at_the_one_set_last(workspace):
    with pytest.raises(InputError, match=r"^command line: train.micro_batch: expected a divisor of global_batch \(9\), got 4\. Use "):
        config.load(workspace.config_file, ["train.global_batch=9"])


def test_a_missing_section_is_reported_with_its_required_keys(workspace, tmp_path):
    file = tmp_path / "no-run.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(workspace.config_file.read_text()).items() if k != "run"}))
    with pytest.raises(InputError, match=r"run: expected a value, got nothing. Set run.dir=runs/mine, for example."):
        config.load(file)


def test_keys_of_a_section_on_the_command_line_are_reported_there(workspace, tmp_path):
    file = tmp_path / "mixture.yaml"
    tree = yaml.safe_load(workspace.config_file.read_text())
    file.write_text(yaml.safe_dump(tree | {"model": {**tree["model"], "experts": {"experts": 4, "width": 8, "top_kk": 2}}}))
    width = "model.experts.width: expected {} (inner width of each expert (SwiGLU)), got {}."
    unknown = 'model.experts.top_kk: expected a key of model.experts, got "top_kk". Did you mean top_k?'
    for override, message in (
        ("model.experts={experts: 4}", width.format("a value", "nothing")),
        ("model.experts={experts: 4, width: many}", width.format("an integer", '"many"')),
        ("model.experts={experts: 4, width: 8, top_kk: 2}", unknown),
        ("model.experts={experts: 4, width: 8, top_k: 9}", "model.experts.top_k: expected at most experts (4), got 9."),
        ("model={width: 32}", "model.layers: expected a value (number of blocks), got nothing."),
    ):
        with pytest.raises(InputError) as refused:
            config.load(file, [override])
        assert str(refused.value).startswith(f"command line: {message}")
    with pytest.raises(InputError) as refused:
        config.load(file, ["model.experts.shared=1"])
    assert str(refused.value).startswith(f"{file}: {unknown}")


def test_an_override_must_name_a_key(workspace):
    with pytest.raises(InputError, match=r"expected section.key=value, got 'steps'. Write train.steps=100, for example."):
        config.load(workspace.config_file, ["steps"])


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
    assert str(refused.value) == f'command line: {key}: expected the key\'s new name, got "{name}". Rename it to {new}.'


def test_a_renamed_key_in_a_preset_file_is_refused_with_its_new_name(workspace, tmp_path):
    file = tmp_path / "model.yaml"
    file.write_text("{layers: 2, width: 64, heads: 4, experts: {experts: 4, width: 8, router_z: 0.1}}")
    with pytest.raises(InputError) as refused:
        config.load(workspace.config_file, [f"model={{preset: {file}}}"])
    message = 'model.experts.router_z: expected the key\'s new name, got "router_z". Rename it to model.experts.router_z_loss.'
    assert str(refused.value) == f"{file}: {message}"
