"""Configs that are damaged, hostile, or such that YAML 1.1 misreads them: one line with file and line, or the value that was meant."""

import os
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest

from manta.data.errors import InputError
from manta.launch import config
from manta.trainer.config import yaml_file
from manta.trainer.config.yaml_file import MAX_BYTES

SMALL = """\
run: {dir: run}
data: {sources: [text], sequence_length: 32}
model: {preset: llama-tiny}
train: {steps: 4, global_batch: 4, micro_batch: 2}
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(*overrides: str, more: str | bytes = "") -> config.RunConfig:
        Path("run.yaml").write_bytes(SMALL.encode() + (more if isinstance(more, bytes) else more.encode()))
        return config.load(Path("run.yaml"), overrides)

    return load


LETTERS = "abcdefghij"
MANY = "at most 100,000 values in 50 levels, with aliases replaced by what they stand for"
REFUSED = {
    "lists of lists of aliases": (
        "a: &a [x, x]\n" + "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise(LETTERS)),
        rf"^run.yaml:\d+: expected {MANY}, got more. Shorten it.$",
    ),
    "merges of merges of aliases": (
        "a: &a {x: 1}\n" + "".join(f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in pairwise(LETTERS)),
        rf"^run.yaml:\d+: expected {MANY}, got more. Shorten it.$",
    ),
    "a list that contains itself": ("a: &a [*a]\n", rf"^run.yaml:5: expected {MANY}, got more. Shorten it.$"),
    "60 levels": (f"a: {'[' * 60}{']' * 60}\n", rf"^run.yaml:5: expected {MANY}"),
    "30,000 levels": (f"a: {'[' * 30_000}\n", rf"^run.yaml:5: expected {MANY}"),
    "too many bytes": ("#" * MAX_BYTES, rf"^run.yaml: expected a config, got an error: larger than {MAX_BYTES:,} bytes\."),
    "an integer of 5,000 digits": (f"a: {'9' * 5000}\n", r"^run.yaml:5: expected a value of type int, got '9{90,}…9{90,}'\. Change it\.$"),
    "a million digits that are no number": (
        f"a: {'9' * 1_000_000}x\n",
        r"^run.yaml: a: expected a key of the config, got \"a\"\. Use one of",
    ),
    "a large hexadecimal integer": (
        f"a: 0x{'f' * 5000}\n",
        r"^run.yaml:5: expected a value of type int, got '0xf{90,}…f{90,}'\.",
    ),
    "half of a surrogate pair": ('a: "\\ud800"\n', r"^run.yaml:5: expected text of Unicode characters, got '\\ud800'\. Change it\.$"),
    "another encoding": ("a: é\n".encode("latin-1"), r"^run.yaml: expected UTF-8, got another encoding at byte \d+\. Save it as UTF-8\.$"),
    "a NUL": (b"a: x\0\n", r"^run.yaml:5: expected YAML, got the unprintable character '\\x00'\. Remove it\.$"),
    "a Python object": (
        "a: !!python/object/apply:os.system [ls]\n",
        r"^run.yaml:5: expected YAML, got an error: could not determine",
    ),
    "no boolean": ("a: !!bool maybe\n", r"^run.yaml:5: expected a value of type bool, got 'maybe'\. Change it\.$"),
    "no timestamp": ("a: !!timestamp soon\n", r"^run.yaml:5: expected a value of type timestamp, got 'soon'\. Change it\.$"),
    "an impossible date": ("a: !!timestamp 2024-31-12\n", r"^run.yaml:5: expected a value of type timestamp, got '2024-31-12'\."),
    "an empty integer": ("a: !!int ''\n", r"^run.yaml:5: expected a value of type int, got ''\. Change it\.$"),
    "no section": ("a: !!map x\n", r"^run.yaml:5: expected a section, got another value\. Write name: value\.$"),
    "no base64": ("a: !!binary ö\n", r"^run.yaml:5: expected YAML, got an error: failed to convert base64 data into ascii"),
    "no text": ("a: !!str [1]\n", r"^run.yaml:5: expected YAML, got an error: expected a scalar node, but found sequence"),
    "an unknown anchor": ("a: *x\n", r"^run.yaml:5: expected YAML, got an error: found undefined alias 'x'\. Correct it\.$"),
    "a long key": (f"{'k' * 1000}: 1\n", r"^run.yaml: k{90,}…k{90,}: expected a key of the config, got \"k{90,}…k{90,}\"\. Use one of"),
    "a long repeated key": (
        f"{'k' * 1000}: 1\n" * 2,
        r"^run.yaml:6: k{90,}…k{90,}: expected it once, got it also in line 5\.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_no_config_can_be_is_one_line(load, name):
    more, message = REFUSED[name]
    start = time.process_time()
    with pytest.raises(InputError, match=message) as refused:
        load(more=more)
    assert time.process_time() - start < 8
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "override", [f"train.steps={'x' * 100_000}", "x" * 100_000, f"train.{'x' * 100_000}=1", f"run.dir={'x ' * 50_000}"]
)
def test_a_long_argument_is_not_repeated(load, override):
    with pytest.raises(InputError) as refused:
        load(override)
    assert str(refused.value).count("x") < 450


def test_a_file_of_many_values_is_refused_before_it_is_read_to_its_end(load, monkeypatch):
    monkeypatch.setattr(yaml_file, "MAX_VALUES", 1000)
    with pytest.raises(InputError, match=r"^run.yaml:5: expected at most 1,000 values in 50 levels"):
        load(more=f"a: [{'0,' * 1000}]\n[")


def test_many_problems_are_not_all_printed(load):
    start = time.process_time()
    with pytest.raises(InputError) as refused:
        load(more="".join(f"key{number}: 1\n" for number in range(2000)))
    assert time.process_time() - start < 2
    lines = str(refused.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "run.yaml: and 1980 other problems."


@pytest.mark.parametrize("kind", ["named pipe", "device", "directory", "dangling link", "file below a file"])
def test_a_config_that_is_no_file_is_one_line(tmp_path, kind):
    path = tmp_path / "run.yaml"
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    else:
        path.write_text(SMALL)
        path /= "run.yaml"
    expected = {"dangling link": "a link to a file that does not exist", "file below a file": "an error: Not a directory"}
    with pytest.raises(InputError) as refused:
        config.load(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: expected a config, got {expected.get(kind, 'an error: not a regular file')}. ")
    assert "\n" not in message


NAMES = ["no", "on", "y", "12e3", "0x10", "1_000", "0o7", "010", "null", "~x", "2024-01-01", "2024-31-12", "1:30", ".inf", "=", "é"]


def test_a_source_is_called_what_the_file_says(load):
    sources, weights = (", ".join(f"{name}: {value}" for name in NAMES) for value in ("text", 1))
    loaded = load(f"data.sources={{{sources}}}", f"data.mixture={{{weights}}}")
    assert [source.name for source in loaded.data.sources] == NAMES
    assert list(loaded.data.mixture[0].weights) == NAMES
    named = [name for name in NAMES if name != "null"]  # an option that is null is unset
    loaded = load(f"data.sources=[{', '.join(f'{{path: text, name: {name}}}' for name in named)}]")
    assert [source.name for source in loaded.data.sources] == named
    Path("again.yaml").write_text(loaded.to_yaml(), encoding="utf-8")
    assert config.load(Path("again.yaml")) == loaded


def test_text_stays_what_was_written_where_text_is_wanted(load):
    for written in ("2024", "no", "1e3", "0x10", "2024-01-01", "12:30:00"):
        assert str(load(f"run.dir={written}").run.dir) == written
        assert load(f"data.sources={written}").data.sources[0].path == written
        assert [source.path for source in load(f"data.sources=[{written}, text]").data.sources] == [written, "text"]
        assert load(f"data.sources={{a: {written}}}").data.sources[0].path == written
    assert load("cluster.slurm.time=90").cluster.slurm.time == "90"
    assert load("cluster.kubernetes.node_selector={zone: 1, spot: yes}").cluster.kubernetes.node_selector == {"zone": "1", "spot": "yes"}
    assert load("cluster.nodes=2").cluster.nodes == 2
    assert load("model.options={depth: 2, on: yes, rate: 1e-3, day: 2024-01-01}", "model.family=a:B").model.options == {
        "depth": 2,
        "on": True,
        "rate": 0.001,
        "day": "2024-01-01",
    }


def test_a_number_that_is_whole_is_an_integer_where_one_is_wanted(load):
    loaded = load(
        *("train.steps=4.0", "run.seed=1e3", "parallel.zero=1.0", "cluster.nodes=2.0", "data.workers=1e0", "data.skip=[[0, 1e1]]"),
        *("data.cache.bytes=1e12", "train.batch_ramp=[{global_batch: 2.0}, {from_tokens: 1e3, global_batch: 4e0}]"),
    )
    assert (loaded.train.steps, loaded.run.seed, loaded.parallel.zero, loaded.cluster.nodes, loaded.data.workers) == (4, 1000, 1, 2, 1)
    assert loaded.data.skip == ((0, 10),)
    assert loaded.data.cache.bytes == 10**12
    assert [stage.global_batch for stage in loaded.train.batch_ramp] == [2, 4]
    assert type(loaded.train.steps) is int
    assert load(more="optimizer: {learning_rate: 1}\nschedule: {warmup_steps: 2e0}\n").schedule.warmup_steps == 2
    for value in ("4.5", "1e400", "9007199254740993.0", "1e23", ".nan", "'4'"):
        with pytest.raises(InputError, match=r"run.seed: expected an integer \(.*\), got "):
            load(f"run.seed={value}")


def test_no_number_is_octal_or_sexagesimal(load):
    assert load("train.steps=0x10").train.steps == 16
    assert load("train.steps=1_000").train.steps == 1000
    for number in ("010", "-010", "+1:30"):
        with pytest.raises(InputError, match=rf"train.steps: expected a value of type int, got '{re.escape(number)}'"):
            load(f"train.steps={number}")


def test_a_merged_section_is_read_like_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("merge.yaml").write_text(SMALL.replace("train: {steps: 4,", "train: {<<: {steps: 8.0, micro_batch: 1},"))
    train = config.load(Path("merge.yaml")).train
    assert (train.steps, train.micro_batch) == (8, 2)
