"""Paths and URLs in configs and arguments: `~`, passwords, and names that no file can have."""

import ast
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import MANTA
from fuzz import assert_refused_or_done, manta

from manta.data.errors import InputError, redact
from manta.launch import config
from manta.trainer.run_directory import RunDirectory

SMALL = """\
run: {dir: run}
data: {sources: [text.jsonl], sequence_length: 32, validation: 0.1, directory: corpora}
tokenizer: {vocabulary: 300}
model: {family: llama, layers: 1, width: 32, heads: 2}
train: {steps: 2, global_batch: 4, micro_batch: 2}
cluster: {hot_standby: false, ranks_per_node: 1}
precision: fp32
"""


pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home directory; the working directory is another one, with a config and its text."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    Path("run.yaml").write_text(SMALL)
    Path("text.jsonl").write_text(
        "".join(json.dumps({"text": f"document {number} of a small corpus " * 20}) + "\n" for number in range(80))
    )
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def load(*overrides: str) -> config.RunConfig:
    return config.load(Path("run.yaml"), overrides)


def test_a_tilde_is_the_home_directory_in_every_path(home):
    """Else run.dir, data.directory and checkpoint.directory would make a folder named ~."""
    (home / "model.yaml").write_text("layers: 3")
    Path("run.yaml").write_text(SMALL.replace("dir: run", "dir: ~/runs/x").replace("directory: corpora", "directory: ~/corpora"))
    loaded = load(
        *("checkpoint.directory=~/checkpoints", "run.start_from=~/import", "tokenizer.file=~/tokenizer.json", "model.preset=~/model.yaml"),
        "data.sources=[~/a, {path: '~/b/*.txt', validation: ~/c}, 'hf:~/d', './~/e', stdlib:, 'hf:org/name:en', s3://bucket/~f]",
    )
    assert loaded.run.dir == home / "runs/x"
    assert loaded.run.start_from == f"{home}/import"
    assert loaded.checkpoint.directory == f"{home}/checkpoints"
    assert loaded.data.directory == f"{home}/corpora"
    assert loaded.tokenizer.file == home / "tokenizer.json"
    assert loaded.model.layers == 1
    paths = [source.path for source in loaded.data.sources]
    assert paths == [f"{home}/a", f"{home}/b/*.txt", f"hf:{home}/d", "./~/e", "stdlib:", "hf:org/name:en", "s3://bucket/~f"]
    assert loaded.data.sources[1].validation == f"{home}/c"
    # The home directory may be another one on each node: the cache expands it there.
    assert load("data.cache.directory=~/cache").data.cache.directory == Path("~/cache")
    assert load("data.directory=file:///data/x").data.directory == "file:///data/x"
    assert load("run.dir=file:///data/x").run.dir == Path("/data/x")
    for key in ("run.dir", "data.directory", "checkpoint.directory", "data.cache.directory", "tokenizer.file", "data.sources"):
        with pytest.raises(InputError, match=rf"^command line: {key}.*: expected a path, got '~no-one/x', and there is no user no-one\. "):
            load(f"{key}=~no-one/x")


def test_a_corpus_is_prepared_below_the_home_directory_and_no_folder_is_named_tilde(home):
    outcome = manta("prepare", "run.yaml", "data.directory=~/corpora", "data.workers=1", seconds=60)
    assert outcome.code == 0, outcome.output
    assert list((home / "corpora").iterdir())
    assert not Path("~").exists()


@pytest.mark.parametrize("arguments", [("import", "~/x", "--output=~/y"), ("status", "~/y"), ("data", "inspect", "~/y")])
def test_a_tilde_that_the_shell_leaves_is_replaced_on_the_command_line(home, arguments):
    """Shells expand ~ at the start of a word only, so not in --output=~/y."""
    (home / "y").mkdir()
    (home / "y/file").touch()
    outcome = manta(*arguments)
    assert_refused_or_done(outcome, 2)
    assert f"{home}/y" in outcome.output
    assert "~" not in outcome.output


def test_arguments_that_are_no_text_are_one_line():
    """They hold bytes that are no UTF-8."""
    for arguments in (("train", "run.yaml", "run.dir=caf\udce9"), ("generate", "run", "caf\udce9"), ("status", "caf\udce9")):
        outcome = manta(*arguments)
        got = arguments[-1].replace("\udce9", "?")
        expected = f'expected text in the encoding utf-8, got "{got}". Convert it, or set LC_ALL=C.UTF-8.'
        assert (outcome.code, outcome.output) == (2, f"manta: arguments: {expected}\n")


def test_a_working_directory_that_is_gone_is_one_line(home, monkeypatch):
    gone = home / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    outcome = manta("train", f"{home}/../work/run.yaml")
    expected = "expected one that exists, got an error: No such file or directory. Change to another."
    assert (outcome.code, outcome.output) == (2, f"manta: working directory: {expected}\n")


COMMANDS = (("train", "run.yaml", "run.dir={}"), ("status", "{}"), ("import", "x", "--output={}"), ("train", "{}"))


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 2500, "a\nb", "a\x7fb"], ids=["long name", "long path", "newline", "control character"])
def test_names_that_no_path_can_have_are_one_line(name):
    for command in COMMANDS:
        written = json.dumps(name) if "run.dir" in command[-1] else name
        outcome = manta(*(part.format(written) for part in command))
        assert_refused_or_done(outcome, 2)
        assert len(outcome.stderr.splitlines()) == 1
        assert ("each name of at most 255" if len(name) > 100 else "Remove the control characters.") in outcome.stderr


URLS = [
    "s3://key:hunter2@bucket/x",
    "http://me:hunter2@host/x",
    "s3://key:hun/hunter2@bucket",
    "sftp://:hunter2@host/x",
    "http://me:1@hunter2@host",
]
KEYS = ["checkpoint.directory", "data.directory", "data.ray_address", "data.cache.directory", "run.dir", "run.start_from", "tokenizer.file"]


@pytest.mark.parametrize("url", URLS)
def test_a_password_in_a_url_is_refused_and_never_repeated(url):
    for key in (*KEYS, "model.preset", "data.sources", "run.seed", "train.steps", "optimizer.name", "no.key", "model.family"):
        outcome = manta("train", "run.yaml", f"{key}={url}")
        assert_refused_or_done(outcome, 2)
        assert "hunter2" not in outcome.output
        if key in {"checkpoint.directory", "data.directory", "data.ray_address", "run.start_from", "data.sources"}:
            assert "expected a URL without a password, got" in outcome.stderr
    for override in (f"data.sources=[{{path: text.jsonl, validation: '{url}'}}]", f"data.sources={{a: '{url}'}}"):
        assert "hunter2" not in manta("train", "run.yaml", override).output
    for arguments in (("train", url), ("train", "run.yaml", url), ("status", url), ("train", "run.yaml", "--on", url)):
        outcome = manta(*arguments)
        assert_refused_or_done(outcome, 2)
        assert "hunter2" not in outcome.output
    Path("run.yaml").write_text(SMALL.replace("dir: run", f"dir: '{url}'"))
    assert "hunter2" not in manta("train", "run.yaml").output


def test_a_run_directory_in_an_object_store_is_refused_as_such():
    with pytest.raises(InputError) as refused:
        load("run.dir=s3://bucket/run")
    remedy = "Choose a local one; checkpoints may be there: checkpoint.directory=s3://bucket/run."
    assert str(refused.value) == f"command line: run.dir: expected a directory of this machine, got s3://bucket/run. {remedy}"
    for key in ("tokenizer.file", "data.cache.directory"):
        expected = "expected a path of this machine, got s3://bucket/x. Choose a local one."
        with pytest.raises(InputError, match=f"^command line: {key}: {re.escape(expected)}"):
            load(f"{key}=s3://bucket/x")


def test_only_secrets_are_redacted():
    for text, shown in (
        ("see http://host:8265/a@b and s3://bucket/x, or me@host", None),
        ("sftp://me@host/x", "sftp://***@host/x"),
        ("https://h/x?X-Amz-Signature=abc&part=1", "https://h/x?X-Amz-Signature=***&part=1"),
        ("https://h/x?a=1&sig=a%2Fb, twice", "https://h/x?a=1&sig=*** twice"),
    ):
        assert redact(text) == (shown or text)


def test_paths_that_cannot_be_written_are_refused_before_a_corpus_is_prepared():
    Path("file").touch()
    Path("dangling").symlink_to("nowhere/x")
    Path("loop").symlink_to("loop")
    for key in ("run.dir", "checkpoint.directory", "data.directory"):
        for value in ("file", "file/x", "/proc/x", "dangling", "dangling/x", "loop", "loop/x"):
            outcome = manta("train", "run.yaml", f"{key}={value}")
            assert_refused_or_done(outcome, 2)
            assert re.match(rf"manta: ({key}|/.*/{value}): expected a (run )?directory", outcome.stderr), outcome.stderr
            assert len(outcome.stderr.splitlines()) == 1
    assert not Path("corpora").exists()


def test_a_locale_without_letters_prints_escapes():
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"}
    result = subprocess.run([MANTA, "status", "é→"], capture_output=True, text=True, check=False, env=ascii_only)
    assert (result.returncode, result.stderr.count("\\xe9\\u2192"), result.stdout) == (2, 2, "")
    no_utf8 = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    Path("run.yaml").write_text(SMALL.replace("dir: run", "dir: é→"), encoding="utf-8")
    result = subprocess.run([MANTA, "train", "run.yaml"], capture_output=True, text=True, check=False, env=no_utf8)
    expected = "expected a path in the encoding ascii, got '\\xe9\\u2192'. Set LC_ALL=C.UTF-8."
    assert (result.returncode, result.stderr) == (2, f"manta: run.yaml: run.dir: {expected}\n")


def test_an_address_of_ssh_hosts_below_the_home_directory(home):
    (home / "hosts").write_text("no host: at all\n")
    outcome = manta("train", "run.yaml", "--on=ssh:~/hosts")
    assert_refused_or_done(outcome, 2)
    assert f"{home}/hosts:1: expected [user@]host" in outcome.stderr
    assert RunDirectory(Path("run")).saved_step() == 0


def test_text_is_read_and_written_in_utf8_in_every_locale():
    """Without encoding= Python takes the locale's, so that a path or a text would be another one on another node."""
    locales = []
    for package in ("cluster", "data", "launch", "trainer"):
        for file in (Path(__file__).parents[2] / package).rglob("*.py"):
            calls = (
                node
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            )
            text_calls = (call for call in calls if call.func.attr in {"read_text", "write_text"})
            locales += [f"{file}:{call.lineno}" for call in text_calls if "encoding" not in {keyword.arg for keyword in call.keywords}]
    assert locales == []
