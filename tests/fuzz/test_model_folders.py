"""Folders of models that a stranger made, and imports that were damaged: one line, or a model that loads. Nothing outside is read."""

import json
import os
import random
import resource
import shutil
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fuzz import assert_refused_or_done, manta
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from saved_models import EQUIVALENT, exported, random_run

from manta.cluster.protocol import ExitCode
from manta.trainer.pretrained.load import load_pretrained
from manta.trainer.run_directory import RunDirectory

CASES = ("gpt2", "llama", "window", "qk_norm and window", "experts", "experts balanced by a bias", "bert")
SECRET = "the user's private key"
MEMORY = 2**31  # more than any of these models needs
VALUES: list[Any] = [
    *(None, True, False, "", "x", "x" * 200_000, "\x1b[2J\n\0", "\U0001f642" * 300, "../secret", "/dev/zero", "<|endoftext|>", "gelu"),
    *(0, 1, 2, -1, 3, 7, 10**6, 2**31, 2**63, 10**18, 10**4000, -(10**18), 0.5, 4.0, 1e18, 1e-300, float("nan"), float("inf")),
    *([], {}, [[]], {"": {}}, [None] * 1000, ["x"], [0], {"x": "y"}, {"content": 3}),
]
TEXTS = [
    *("", "null", "[]", "{", '"x"', "\ufeff{}", '{"a": 1, "a": 2}', '{"a": 1e999}', '{"a": "\\ud800"}', "NaN", "{}" * 2),
    *("[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"hidden_size": ' + "9" * 5000 + "}", "\0" * 100),
]
SEEDS = st.integers(0, 2**32)
QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
SAMPLE = settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET)
LONG = settings(max_examples=400, deadline=None, database=None, suppress_health_check=QUIET, print_blob=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A small valid model of each family, whole and in shards."""
    base = tmp_path_factory.mktemp("folders")
    runs = [random_run(base, f"run {case}", **EQUIVALENT[case][0]) for case in CASES]
    return [exported(run, name, **options) for run in runs for name, options in (("whole", {}), ("shards", {"shard_size": 20_000}))]


@pytest.fixture(scope="module")
def imports(folders, tmp_path_factory) -> list[Path]:
    outputs = [tmp_path_factory.mktemp("imports") / str(index) for index in range(0, len(folders), 2)]
    for folder, output in zip(folders[::2], outputs, strict=True):
        assert manta("import", str(folder), "--output", str(output)).code == ExitCode.DONE
    return outputs


def import_or_refuse(folders: list[Path], directory: Path, seed: int) -> None:
    chance = random.Random(seed)
    shutil.rmtree(directory, ignore_errors=True)
    folder, output = directory / "model", directory / "imported"
    shutil.copytree(chance.choice(folders), folder)
    done = [damage(folder, chance) for _ in range(chance.choice([1, 1, 1, 2, 3]))]
    before = content(folder)
    with memory_limit():
        outcome = manta("import", str(folder), "--output", str(output))
    note(f"{done} {outcome}")
    assert_refused_or_done(outcome, ExitCode.DONE, ExitCode.USAGE)
    assert content(folder) == before, "the source was modified"
    assert SECRET not in outcome.output
    if outcome.code == ExitCode.USAGE:
        assert outcome.stderr.count("\n") == 1, outcome.stderr
        assert not output.exists()
        assert not list(directory.glob(".*"))
        return
    assert not [path for path in output.rglob("*") if path.is_symlink() or (path.is_file() and SECRET.encode() in path.read_bytes())]
    pretrained = load_pretrained(RunDirectory(output))
    assert pretrained.tokenizer.decode(pretrained.tokenizer.encode(["one"])[0]) is not None
    assert manta("export", str(output)).code == ExitCode.DONE


def use_or_refuse(imports: list[Path], directory: Path, seed: int) -> None:
    chance = random.Random(seed)
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(chance.choice(imports), directory / "imported")
    done = damage(directory / "imported", chance)
    with memory_limit():
        outcomes = [manta("generate", str(directory / "imported"), "one", "--tokens", "2"), manta("export", str(directory / "imported"))]
    note(f"{done} {outcomes}")
    for outcome in outcomes:
        assert_refused_or_done(outcome, ExitCode.DONE, ExitCode.USAGE, ExitCode.FAILED)
        assert SECRET not in outcome.output
    assert not [path for path in directory.glob("imported/export/hf/*") if path.is_symlink() or SECRET.encode() in path.read_bytes()]


@SAMPLE
@given(seed=SEEDS)
def test_a_strangers_model_is_imported_or_refused_in_one_line(folders, tmp_path, seed):
    import_or_refuse(folders, tmp_path / "case", seed)


@SAMPLE
@given(seed=SEEDS)
def test_a_damaged_import_is_used_or_refused_in_one_line(imports, tmp_path, seed):
    use_or_refuse(imports, tmp_path / "case", seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@LONG
@given(seed=SEEDS)
def test_many_strangers_models_are_imported_or_refused_in_one_line(folders, tmp_path, seed):
    import_or_refuse(folders, tmp_path / "case", seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@LONG
@given(seed=SEEDS)
def test_many_damaged_imports_are_used_or_refused_in_one_line(imports, tmp_path, seed):
    use_or_refuse(imports, tmp_path / "case", seed)


def damage(folder: Path, chance: random.Random) -> str:
    """Damage one file. Return how."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**24)
    if not files:
        return "nothing is left"
    file = chance.choice(files)
    own = {".json": [change_value], ".safetensors": [change_header], ".yaml": [change_line]}.get(file.suffix, [])
    kind = chance.choice([break_bytes, break_text, replace_file, *own * 6])
    return f"{file.name}: {kind.__name__} {kind(file, chance)[:100]}"


def change_value(file: Path, chance: random.Random) -> str:
    try:
        tree = json.loads(file.read_text())
    except (ValueError, RecursionError):  # it was damaged before
        return "not"
    if not isinstance(tree, dict | list):
        return "not"
    path = change_one(tree, chance)
    text = json.dumps(tree)
    file.write_text(text.replace("\\u0000", "\\ud800") if chance.random() < 0.5 else text)
    return path


def change_one(tree: Any, chance: random.Random) -> str:
    """Replace, remove, rename or add one value anywhere in a tree."""
    path = ""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return f"{path} is empty"
        key = chance.choice(keys)
        path += f".{key}"[:30]
        if isinstance(tree[key], dict | list) and tree[key] and chance.random() < 0.8:
            tree = tree[key]
            continue
        match chance.randrange(6):
            case 0:
                del tree[key]
                return f"{path} removed"
            case 1 if isinstance(tree, dict):
                name = chance.choice(["x", "x" * 200_000, "", "\x1b\n", "é"])
                tree[name] = tree.pop(key)
                return f"{path} renamed {name[:9]}"
            case 2 if isinstance(tree[key], int | float):
                tree[key] *= chance.choice([-1, 2, 3, 0, 10**6])
            case _:
                tree[key] = chance.choice(VALUES)
        return f"{path} = {str(tree[key])[:40]}"


def change_header(file: Path, chance: random.Random) -> str:
    raw = file.read_bytes()
    try:
        (length,) = struct.unpack("<Q", raw[:8])
        tree = json.loads(raw[8 : 8 + length])
    except (ValueError, struct.error, OverflowError):  # it was damaged before
        return "not"
    if chance.random() < 0.15:
        length = chance.choice([0, 1, length - 1, length + 1, 10**8, 2**63, 2**64 - 1])
        file.write_bytes(struct.pack("<Q", length) + raw[8:])
        return f"length {length}"
    names = sorted(tree.keys() - {"__metadata__"})
    if names and chance.random() < 0.5 and isinstance(tree[name := chance.choice(names)], dict):
        values: dict[str, list[Any]] = {
            "dtype": ["F64", "I64", "BOOL", "F8_E4M3", "BF16", "F16", "F32", "x" * 1000, 3],
            "shape": [[], [0], [2**63], [-1], [10**18, 10**18], [1] * 10_000, [0, 10**18], [4, 4], None],
            "data_offsets": [[0, 0], [8, 4], [0, 2**63], [-8, 0], [0], [0, 10**12]],
        }
        key = chance.choice(sorted(values))
        tree[name][key] = chance.choice(values[key])
        path = f"{name}.{key} = {str(tree[name][key])[:40]}"
    else:
        path = change_one(tree, chance)
    header = json.dumps(tree).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    return path


def change_line(file: Path, chance: random.Random) -> str:
    lines = file.read_text().splitlines()
    index = chance.randrange(len(lines))
    value = chance.choice([*map(str, VALUES), "1e6", "2024-31-12", "&a [*a]", "[" * 1000, "!!python/name:os.system", "0x7fffffff"])
    lines[index] = lines[index].partition(":")[0] + ": " + value
    file.write_text("\n".join(lines))
    return lines[index]


def break_text(file: Path, chance: random.Random) -> str:
    text = chance.choice(TEXTS)
    file.write_text(text)
    return text


def break_bytes(file: Path, chance: random.Random) -> str:
    raw = bytearray(file.read_bytes())
    at = chance.randrange(max(1, min(len(raw), chance.choice([40, 2000, 10**9]))))
    kind = chance.choice(["cut", "overwritten", "repeated", "extended"])
    if kind == "cut":
        del raw[at:]
    elif kind == "overwritten":
        raw[at : at + chance.randrange(9)] = chance.randbytes(chance.randrange(9))
    elif kind == "repeated":
        raw[at:at] = raw[: chance.randrange(200)]
    else:
        raw += bytes(chance.randrange(1000))
    file.write_bytes(raw)
    return f"{kind} at {at}"


def replace_file(file: Path, chance: random.Random) -> str:
    """Put what is no file of the model in its place, or a link to a secret of the user."""
    secret = file.parent.parent / f"secret-{file.name}"
    text = file.read_bytes()
    secret.write_bytes(b'{"secret": ' + json.dumps(SECRET).encode() + b", " + text[1:] if text.startswith(b"{") else text)
    file.unlink()
    kinds: dict[str, Callable[[], object]] = {
        "missing": lambda: None,
        "pipe": lambda: os.mkfifo(file),
        "directory": file.mkdir,
        "link": lambda: file.symlink_to(secret),
        "relative link": lambda: file.symlink_to(f"../{secret.name}"),
        "link to itself": lambda: file.symlink_to(file.name),
        "link to nothing": lambda: file.symlink_to("nowhere"),
        "endless device": lambda: file.symlink_to("/dev/zero"),
        "sparse": lambda: (file.touch(), os.truncate(file, 2**36)),
    }
    kind = chance.choice(sorted(kinds))
    kinds[kind]()
    return kind


def content(folder: Path) -> dict[str, object]:
    """What a folder holds, without following links."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        small = stat.S_ISREG(status.st_mode) and status.st_size < 2**24
        held = path.read_bytes() if small else path.readlink() if path.is_symlink() else None
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, held)
    return found


@contextmanager
def memory_limit() -> Iterator[None]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
