"""Damaged run directories: every command that reads one skips what it can, or refuses it in a line, and waits for nothing.

The run is a real one, of an earlier version, stopped at step 10 of 20. `resume` is everything up to the start of Ray.
"""

import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from fuzz import assert_refused_or_done, call, manta
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from old_run import copy_old_run

from manta.cluster.ray.runtime import LocalRay
from manta.cluster.supervise.event_log import read_events
from manta.cluster.supervise.run_state import replay
from manta.launch.config import find_run, load
from manta.launch.run.preflight import preflight
from manta.launch.run.start import write_run_directory
from manta.trainer.guard.record import Document, SampleLoss, Spike
from manta.trainer.serve.texts import GeneratedText

FILES = (
    *("config.yaml", "manifest.json", "metrics.jsonl", "events.jsonl", "tokenizer.json", "seal", "lock", "save-now", "stop-now"),
    *("spikes.jsonl", "samples.jsonl", "directory-token", "model.yaml", "source.json", "logs", "logs/attempt-0001", "checkpoints"),
    *(f"logs/attempt-0001/rank-000{rank}{suffix}" for rank in (0, 1) for suffix in (".log", ".error.json")),
    *(f"checkpoints/{name}" for name in ("latest", "fence.json", "step-00000010")),
    *(f"checkpoints/step-00000010/{name}" for name in ("manifest.json", "rank-0000.safetensors")),
)
TEXT = GeneratedText(step=10, seed=1, prompt="a", text="a text")
SPIKE = Spike(
    time=1.0,
    event="spike",
    attempt=1,
    step=9,
    message="step 9",
    action="rollback",
    loss=9.0,
    grad_norm=1.0,
    loss_limit=5.0,
    grad_norm_limit=2.0,
    samples=((10**6, 10**6 + 8),),
    worst=(SampleLoss(sample=10**6, loss=12.0, documents=(Document(source="a", location="a.jsonl: line 3", tokens=5),)),),
)
OFTEN = ("metrics.jsonl", "events.jsonl", "manifest.json", "config.yaml")  # they have the most to damage
VALUES = (
    *(None, True, False, -1, 0, 1, 3, 10**9, 2**63, 10**30, 1.5, -0.5, 1e300, float("nan"), float("inf")),
    *(
        "",
        "x",
        "0",
        "run-ended",
        "../..",
        "/etc/passwd",
        "/dev/zero",
        "\0",
        "\ud800",
        "\x1b[2J[bold]",
        "x" * 300,
        "x" * 100_000,
        "two\nlines",
    ),
    *([], {}, [[]], [{}], {"": {}}, [None] * 1000, {"x": {"y": [1]}}),
)
TEXTS = (
    *(b"", b"\n", b"null\n", b"[]\n", b"{}\n", b'"x"\n', b"5\n", b"NaN\n", b"\xff\xfe{}\n", b"\0" * 4096, b"\0" * 4096 + b"\n"),
    *(
        b"9" * 5000 + b"\n",
        b"[" * 100_000 + b"\n",
        b'{"a": ' * 50_000,
        b'{"step": 1}\n',
        b'{"event": "run-ended"}\n',
        b"x" * 3_000_000 + b"\n",
    ),
    *(b"- &a [*a, *a]\n", b"? {}\n", b"1: 2\n", b"\x1b]0;title\x07\n", b"Traceback (most recent call last)\n"),
)


def nothing(path: Path) -> None:
    pass


def pipe(path: Path) -> None:
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.mkdir()


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        folder = os.open(path.parent, os.O_RDONLY)
        bound.bind(f"/proc/self/fd/{folder}/{path.name}")  # its whole path is too long for an address
        os.close(folder)


def link_to(target: str):
    def link(path: Path) -> None:
        path.symlink_to(path if target == "itself" else target)

    return link


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)


REPLACEMENTS = (
    nothing,
    pipe,
    directory,
    unix_socket,
    sparse,
    *map(link_to, ("itself", "gone", "/dev/zero", "/", "/proc/self/mem", "lock")),
)


def places(tree, path=()):
    """Yield the path of each value in nested lists and dicts."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def changed(tree, data):
    """Return it with one value replaced, or removed."""
    *above, last = data.draw(st.sampled_from(sorted(places(tree), key=str)[1:] or [()]), "place") or (None,)
    value = data.draw(st.sampled_from((*VALUES, "remove it")), "value")
    if last is None:
        return value
    holder = tree
    for key in above:
        holder = holder[key]
    if value == "remove it":
        del holder[last]
    else:
        holder[last] = value
    return tree


def with_changed_value(content: bytes, suffix: str, data) -> bytes:
    """Raises an error unless it is JSON lines, JSON or YAML."""
    if suffix == ".jsonl":
        lines = content.splitlines() or [b""]
        at = data.draw(st.integers(0, len(lines) - 1), "line")
        lines[at] = json.dumps(changed(json.loads(lines[at]), data)).encode()
        return b"\n".join([*lines, b""])
    if suffix == ".yaml":
        return yaml.safe_dump(changed(yaml.safe_load(content), data), sort_keys=False).encode()
    return json.dumps(changed(json.loads(content), data)).encode()


def mutate(path: Path, data) -> None:
    """Change one value of the file, or some bytes if it has none."""
    content = path.read_bytes()
    try:
        content = with_changed_value(content, path.suffix, data)
    except (ValueError, RecursionError, yaml.YAMLError):
        at = data.draw(st.integers(0, len(content)), "at")
        content = content[:at] + data.draw(st.sampled_from(TEXTS), "text") + content[at + 5 :]
    path.write_bytes(content)


def damage(run: Path, data) -> None:
    path = run / data.draw(st.sampled_from((*FILES, *OFTEN * 6)), "file")
    kind = data.draw(st.sampled_from(("mutate", "mutate", "mutate", "torn", "text", "insert", "replace")), "damage")
    if not path.parent.is_dir() or path.parent.is_symlink():
        return
    if kind == "replace" or not path.is_file() or path.is_symlink():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        data.draw(st.sampled_from(REPLACEMENTS), "replacement")(path)
    elif path.stat().st_size > 1 << 24:
        return
    elif kind == "mutate":
        mutate(path, data)
    elif kind == "torn":
        os.truncate(path, data.draw(st.integers(0, path.stat().st_size), "size"))
    elif kind == "text":
        path.write_bytes(data.draw(st.sampled_from(TEXTS), "text"))
    else:
        lines = path.read_bytes().splitlines(keepends=True)
        lines.insert(data.draw(st.integers(0, len(lines)), "line"), data.draw(st.sampled_from(TEXTS), "text"))
        path.write_bytes(b"".join(lines))


def resume(run: Path) -> None:
    """Do what `manta resume` does before it starts Ray."""
    config = load(find_run(run).config_file, [f"run.dir={json.dumps(str(run))}"])
    plan = preflight(config, LocalRay(1))
    replay(read_events(find_run(run).events_file))
    if plan is not None:
        write_run_directory(plan.run_dir, plan.config, plan.prepared, plan.recorded)


def read_by_every_command(run: Path, heavy: bool) -> None:
    name = str(run)
    for command in (
        ("status", name),
        ("status", name, "--json", "--exit-code"),
        ("goodput", name, "--json"),
        ("list", name, "--json"),
        ("report", name),
        ("compare", name, name, "--json"),
        ("track", name, "--tensorboard"),
        ("status", name, "--watch"),
        ("attach", name),
        ("stop", name, "--timeout", "1"),
        ("checkpoint", "now", name, "--timeout", "1"),
        ("checkpoint", "list", name),
        ("data", "mixture", name),
        ("data", "sample-at", name, "7"),
    ):
        assert_refused_or_done(manta(*command))
    for options in ((), ("--rank", "1", "--attempt", "1", "--follow")):
        outcome = manta("logs", name, *options)
        assert_refused_or_done(replace(outcome, stdout=""))  # a log may hold anything
    if heavy:
        for command in (
            ("checkpoint", "verify", name),
            ("checkpoint", "inspect", name, "--match", "norm*"),
            ("checkpoint", "prune", name, "--dry-run"),
            ("data", "inspect", name, "--read", "1000"),
            ("data", "verify", name),
            ("generate", name, "a", "--tokens", "1"),
            ("export", name, "--output", str(run.parent / "exported")),
        ):
            assert_refused_or_done(manta(*command))
    assert_refused_or_done(call(lambda: resume(run)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    run = copy_old_run(tmp_path_factory.mktemp("whole") / "workspace")
    (run / "logs/attempt-0001").mkdir(parents=True)
    for rank in (0, 1):
        (run / f"logs/attempt-0001/rank-000{rank}.log").write_text("a line\n" * 100)
    (run / "lock").touch()
    return run


def check(whole: Path, place: Path, data, *, heavy: bool) -> None:
    shutil.rmtree(place, ignore_errors=True)
    run = copy_old_run(place)
    shutil.copytree(whole / "logs", run / "logs")
    (run / "spikes.jsonl").write_text(SPIKE.model_dump_json() + "\n")
    (run / "samples.jsonl").write_bytes(TEXT.to_json() + b"\n")
    (run / "lock").touch()
    for _ in range(data.draw(st.sampled_from((1, 1, 1, 2, 4)), "damages")):
        damage(run, data)
    read_by_every_command(run, heavy)


QUIET = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)


def test_a_whole_run_directory_is_read_by_every_command(whole):
    """The control: damage is what the other tests see."""
    for command in (("status",), ("logs",), ("data", "mixture"), ("checkpoint", "list")):
        assert_refused_or_done(manta(*command, str(whole)), 0)
    assert_refused_or_done(manta("data", "sample-at", str(whole), "7"), 0)
    assert_refused_or_done(manta("attach", str(whole)), 1)
    assert_refused_or_done(call(lambda: resume(whole)), 0)


@given(data=st.data())
@settings(QUIET, max_examples=8)
def test_a_damaged_run_directory_ends_no_command_in_a_traceback(whole, tmp_path, data):
    check(whole, tmp_path / "workspace", data, heavy=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(data=st.data())
@settings(QUIET, derandomize=False, max_examples=500)
def test_many_damaged_run_directories_end_no_command_in_a_traceback(whole, tmp_path, data):
    check(whole, tmp_path / "workspace", data, heavy=True)
