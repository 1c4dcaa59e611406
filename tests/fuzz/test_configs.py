"""Mutated configs and overrides: each is refused in a line per problem, or it is what a run reads back, and the run can be planned."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fuzz import assert_refused_or_done, call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from manta.launch import config
from manta.launch.config_errors import section_of
from manta.launch.run.preflight import check_writable
from manta.launch.run.resume_check import check_same_run
from manta.launch.run.start import step_text
from manta.launch.targets import kubernetes, slurm
from manta.trainer.dist.layout import largest_layout, layouts, shrunk_layouts
from manta.trainer.run_directory import RunDirectory

BASE = """\
run: {dir: run, seed: 3}
data:
  sources: {web: web/*.txt, code: {path: code.jsonl, filter: {minimum_characters: 10}}}
  mixture: {web: 0.7, code: 0.3}
  sequence_length: 64
tokenizer: {vocabulary: 512}
model: {preset: llama-tiny, experts: {experts: 4, width: 32}}
optimizer: {learning_rate: 1e-3}
train: {steps: 40, global_batch: 8, micro_batch: 4, batch_ramp: [{global_batch: 4}, {from_tokens: 1000, global_batch: 8}]}
cluster: {nodes: 1..2, ranks_per_node: 2, kubernetes: {node_selector: {pool: a}}, slurm: {time: 90}}
precision: fp32
"""


def keys(section: type[BaseModel] = config.RunConfig, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if (inner := section_of(field)) is not None:
            yield from keys(inner, f"{prefix}{name}.")


KEYS = list(keys())
WORDS = [  # what YAML, a shell, a file system or a URL reads in its own way
    *[
        "no",
        "on",
        "~",
        "null",
        "=",
        "<<",
        "0x10",
        "0o7",
        "010",
        "1_000",
        "1e4",
        "4.0",
        "-0",
        "1e400",
        ".nan",
        "-.inf",
        "1:30",
        "12:30:59",
        "2024-31-12",
        "2024-01-01",
        "2024-01-01T00:00:00Z",
    ],
    *[
        "'",
        '"',
        "{",
        "[",
        "@",
        "%x",
        "`",
        "|",
        ">",
        "- a",
        "a: b: c",
        "#",
        "? x",
        "--- a",
        "!!python/name:os.system",
        "!!bool x",
        "!!timestamp x",
        "!!binary ö",
    ],
    *[
        "!!set {a}",
        "&a [*a]",
        "*a",
        "{web: 1}",
        "[{path: x}]",
        "${HOME}",
        "$(id)",
        "\\ud800",
        "a.b:C",
        "1..0",
        "4..2",
        "masked",
        "bf16",
        "llama-8b",
        "bert-tiny",
    ],
    *[
        "~root/x",
        "~no-one",
        "s3://key:secret@bucket/x",
        "http://h:1/x",
        "file:///x",
        "hf:",
        "hf:/x",
        "stdlib:",
        "/dev/null/x",
        "/proc/self/mem",
        "..",
        "./model.yaml",
    ],
    *("", "\t", "\ufeff", "\u2028", "\x85", "é" * 200, "9" * 5000, "[[[[", "]" * 50),
]
NUMBERS = [0, 1, 2, 3, 7, 64, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**18, 10**30, 0.1, 0.5, -0.0, 1e-320, 1e300, 1e16]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=40),
    st.just("x" * 20_000),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*WORDS, "path", "name"]), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(KEYS) | st.sampled_from(KEYS).map(lambda key: key[:-1] + "x") | st.sampled_from(WORDS) | st.text(max_size=20)
override_texts = (
    st.builds(
        "{}={}".format, names, st.sampled_from(WORDS) | values.map(lambda value: json.dumps(value, default=str)) | st.text(max_size=40)
    )
    | st.text()
)


@st.composite
def trees(draw) -> str:
    """A config with some of its keys set to any value, deleted, or misspelled."""
    tree = yaml.safe_load(BASE)
    for _ in range(draw(st.integers(1, 3))):
        section, *path = draw(names).split(".")
        inner, key = tree, section
        for name in path:
            inner = inner.get(key) if isinstance(inner.get(key), dict) else inner.setdefault(key, {}) if key not in inner else inner
            key = name
        if draw(st.booleans()) and key in inner:
            del inner[key]
        else:
            inner[key] = draw(values)
    return yaml.dump(tree, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.sampled_from([None, True, False])), width=10**6)


@st.composite
def texts(draw) -> bytes:
    """The text of a config with bytes or YAML's own characters put in, repeated or cut out."""
    text = bytearray((BASE if draw(st.booleans()) else draw(trees())).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        piece = draw(
            st.binary(max_size=6)
            | st.sampled_from(WORDS).map(str.encode)
            | st.sampled_from([b"\n", b"\r", b": ", b"\0", b"\n  ", b"<<: *a"])
        )
        text[at : at + draw(st.integers(0, 6))] = piece * draw(st.sampled_from([1, 1, 1, 2, 300]))
    return bytes(text)


def check(file: Path, text: bytes, overrides: list[str]) -> None:
    file.write_bytes(text)
    outcome = call(lambda: plan(file, overrides))
    assert_refused_or_done(outcome, 0, 2)
    assert "secret@" not in outcome.output
    assert len(outcome.stderr.splitlines()) <= 25


def plan(file: Path, overrides: list[str]) -> None:
    """Do what `manta train` does with a config before it looks at text."""
    loaded = config.load(file, overrides)
    again = file.with_name("again.yaml")
    again.write_text(loaded.to_yaml(), encoding="utf-8")
    assert config.load(again) == loaded
    assert loaded.identity() == config.load(again).identity()
    run_dir = RunDirectory(loaded.run.dir.absolute())
    check_writable(run_dir, loaded) if loaded.checkpoint.directory is None else None
    check_same_run(run_dir, loaded)
    possible = layouts(loaded.train, loaded.parallel)
    shrunk_layouts(loaded.train, loaded.parallel)
    step_text(loaded, largest_layout(loaded.train, loaded.parallel, max(possible, default=1)))
    for target in (slurm, kubernetes):
        with_errors = call(lambda target=target: target.render(loaded))
        assert_refused_or_done(with_errors, 0, 2)


def fuzz(count: int):
    return settings(
        max_examples=count, derandomize=count < 1000, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
    )


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.yaml").write_text("{layers: 2, width: 64, heads: 4}")
    return tmp_path / "run.yaml"


@fuzz(60)
@given(text=texts(), overrides=st.lists(override_texts, max_size=2))
def test_a_sample_of_configs(file, text, overrides):
    check(file, text, overrides)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@fuzz(3000)
@given(text=texts() | trees().map(lambda tree: tree.encode("utf-8", "surrogatepass")), overrides=st.lists(override_texts, max_size=3))
def test_many_configs(file, text, overrides):
    check(file, text, overrides)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.slow
def test_every_value_at_every_key(file, key):
    for value in (*WORDS, *NUMBERS, None, True, [], {}, [[]], [{}], {"": {}}, "x" * 20_000):
        check(file, BASE.encode(), [f"{key}={value if isinstance(value, str) else json.dumps(value)}"])
