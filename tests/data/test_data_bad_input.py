"""Every bad corpus and tokenizer: one line that names file and line or key, exit code 2, and nothing left that looks whole."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import documents, write_lines
from foreign_corpora import write_tokenizer

from manta.data.shards.manifest import NAME
from manta.launch import cli

CONFIG = """
run: {dir: run}
data:
  sources: SOURCES
  sequence_length: 32
  validation: 0.1
tokenizer: {vocabulary: 400, train_bytes: 100000}
model: {preset: llama-tiny}
train: {steps: 2, global_batch: 8, micro_batch: 4}
"""


def lines(**more):
    """A maker of a good file, with a bad line after its hundredth."""

    def make(path: Path) -> None:
        texts = [json.dumps({"text": text}) for text in documents(100)]
        path.write_bytes(b"\n".join([*(text.encode() for text in texts), more.get("bad", b"")]))

    return make


def parquet(path: Path, **columns) -> None:
    pq.write_table(pa.table(columns or {"text": documents(100)}), path)


def cut(make, share: float = 0.7):
    """What is made, and then cut off."""

    def made(path: Path) -> None:
        make(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return made


def zipped(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in documents(100)).encode()))


CORPORA = {
    "missing": ("none.jsonl", lambda _: None, r"none\.jsonl': expected .*, got no such files"),
    "no match": ("none/*.txt", lambda _: None, r"none/\*\.txt': expected .*, got no such files"),
    "empty": ("x.txt", lambda path: path.write_bytes(b""), r"x\.txt: expected data, got an empty file"),
    "no documents": ("x.jsonl", lambda path: path.write_bytes(b"\n\n"), r"x\.jsonl.*: holds no documents"),
    "unknown kind": ("x.docx", lambda path: path.write_bytes(b"PK"), r"x\.docx: expected a known format"),
    "malformed line": (
        "x.jsonl",
        lines(bad=b'{"text": "cut sho'),
        r"x\.jsonl: line 101: expected one JSON object per line, got malformed JSON",
    ),
    "no object": ("x.jsonl", lines(bad=b"[1]"), r"x\.jsonl: line 101: expected one JSON object per line, got a list"),
    "missing field": (
        "x.jsonl",
        lines(bad=b'{"body": "x"}'),
        r"x\.jsonl: line 101: expected a field 'text', got 'body'\. Set data\.text_field",
    ),
    "wrong type": ("x.jsonl", lines(bad=b'{"text": 5}'), r"x\.jsonl: line 101: field 'text': expected text, got int"),
    "null": ("x.jsonl", lines(bad=b'{"text": null}'), r"x\.jsonl: line 101: field 'text': expected text, got null"),
    "lone surrogate": (
        "x.jsonl",
        lines(bad=rb'{"text": "\ud800"}'),
        r"x\.jsonl: line 101: field 'text': expected text, got a lone surrogate",
    ),
    "bad encoding": ("x.jsonl", lines(bad=b'{"text": "\xff"}'), r"x\.jsonl: line 101: expected UTF-8"),
    "bad text": ("x.txt", lambda path: path.write_bytes(b"good\n" * 9 + b"\xff\xfe bad"), r"x\.txt: line 10: expected UTF-8"),
    "truncated parquet": ("x.parquet", cut(parquet), r"x\.parquet: expected a readable file, got .*; it may be truncated or damaged"),
    "no column": ("x.parquet", lambda path: parquet(path, body=["x"]), r"x\.parquet: expected a field 'text', got 'body'"),
    "truncated gzip": ("x.jsonl.gz", cut(zipped), r"x\.jsonl\.gz: expected a readable file, got .*; it may be truncated or damaged"),
    "ids in a field": ("x.jsonl", lambda path: path.write_text('{"text": [1, 2, 3]}\n' * 99), r"holds token ids; wants the tokenizer"),
    "ids without a tokenizer": ("x.bin", lambda path: np.ones(999, np.uint16).tofile(path), r"holds token ids; wants the tokenizer"),
}


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["manta", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code, capsys.readouterr().err


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(home: Path, monkeypatch, capsys, *overrides: str) -> str:
    """The one line that comes after what a preparation says on its way."""
    code, err = run(monkeypatch, capsys, "prepare", "run.yaml", *overrides)
    assert code == 2, err
    found = [line for line in err.splitlines() if line.startswith("manta: ")]
    assert len(found) == 1, err
    assert err.splitlines()[-1] == found[0]
    assert not list(home.glob(f"corpora/*/{NAME}"))
    return found[0]


@pytest.mark.parametrize("case", CORPORA)
def test_a_bad_corpus_is_told_in_a_line(home, monkeypatch, capsys, case):
    name, make, words = CORPORA[case]
    make(home / name)
    (home / "run.yaml").write_text(CONFIG.replace("SOURCES", json.dumps([name])))
    assert re.search(words, told(home, monkeypatch, capsys))


def test_weights_and_epochs_that_make_no_sense_are_told(home, monkeypatch, capsys):
    write_lines(home / "x.jsonl", documents(100))
    (home / "run.yaml").write_text(CONFIG.replace("SOURCES", "{web: x.jsonl}"))
    for given, words in (
        ("data.mixture={web: 0}", r"data\.mixture.*: expected weights above 0, got 0 for 'web'"),
        ("data.mixture={wep: 1}", r"mixture: expected names of sources, got 'wep'\. Use web\."),
        ("data.mixture=[{from_tokens: 5, weights: {web: 1}}]", r"mixture: expected a first stage with from_tokens 0, got 5"),
        ("data.sources={web: {path: x.jsonl, epochs: 0}}", r"epochs: got 0, wants greater than 0"),
        ("data.skip=[[5, 5]]", r"skip: expected ascending ranges .*, got \[5, 5\]"),
        ("data.sources={web: {path: x.jsonl, filter: {matching: '('}}}", r"got '\(' .*, wants a regular expression"),
        ("data.sources={web: {path: x.jsonl, template: 'no field'}}", r"got 'no field', wants text with \{field\} in it"),
    ):
        code, err = run(monkeypatch, capsys, "prepare", "run.yaml", given)
        assert code == 2
        assert len(err.splitlines()) == 1, err
        assert re.search(words, err), err
    code, err = run(monkeypatch, capsys, "train", "run.yaml", "data.sources={web: {path: x.jsonl, epochs: 0.001}}")
    assert code == 2
    assert re.search(r"manta: data\.sources: web: expected at most 0\.001 epochs, got [\d.]+ epochs .*\. Shorten the run", err)
    code, err = run(monkeypatch, capsys, "train", "run.yaml", "train.global_batch=4000")
    assert code == 2
    assert re.search(r"manta: train\.global_batch: got 4000, wants at most the \d+ samples of an epoch", err)


def test_what_is_held_out_has_to_fit_what_is_trained_on(home, monkeypatch, capsys):
    (home / "all").mkdir()
    write_lines(home / "all" / "x.jsonl", documents(100))
    write_lines(home / "all" / "y.jsonl", documents(20, seed=1))
    write_tokenizer(home / "t.json")
    np.ones(999, np.uint16).tofile(home / "x.bin")
    (home / "blank.jsonl").write_text("\n")
    shards = "path: x.bin, format: nanogpt"
    for source, words in (
        ("path: all, validation: all/y.jsonl", r"validation: got .*/all/y\.jsonl, which is trained on as well; wants other files"),
        (f"path: all, validation: {home}/all/x.jsonl", r"validation: got .*/all/x\.jsonl, which is trained on as well"),
        (f"{shards}, validation: all", r"validation: got text, wants token shards|got none of them"),
        ("path: all, validation: blank.jsonl", r"validation: 'blank\.jsonl' holds no documents"),
        (f"{shards}, filter: {{minimum_characters: 5}}", r"got a filter, wants none: token shards have no text for it; leave it out"),
        (f"{shards}, text_field: body", r"got a text_field, wants none"),
    ):
        (home / "run.yaml").write_text(CONFIG.replace("SOURCES", f"[{{{source}}}]").replace("vocabulary: 400,", "file: t.json,"))
        assert re.search(words, told(home, monkeypatch, capsys)), source


def spoilt(change):
    def make(path: Path) -> None:
        write_tokenizer(path)
        spec = json.loads(path.read_text())
        path.write_text(json.dumps(change(spec)))

    return make


def _without_end(spec):
    renamed = {name.replace("<|endoftext|>", "<|other|>"): number for name, number in spec["model"]["vocab"].items()}
    return spec | {"added_tokens": [], "model": spec["model"] | {"vocab": renamed}}


TOKENIZERS = {
    "missing": (lambda _: None, "causal", r"t\.json: expected a readable tokenizer\.json, got FileNotFoundError"),
    "malformed": (lambda path: path.write_text("{"), "causal", r"t\.json: expected a tokenizer\.json as tokenizers\.Tokenizer saves it"),
    "a list": (lambda path: path.write_text("[1]"), "causal", r"t\.json: expected a tokenizer\.json as tokenizers\.Tokenizer saves it"),
    "no end": (spoilt(_without_end), "causal", r"t\.json: expected a token '<\|endoftext\|>'"),
    "no mask": (write_tokenizer, "masked", r"t\.json: expected \[CLS\] \[SEP\] \[MASK\] \[PAD\] .*, got no token \[CLS\] or <s>"),
    "an id twice": (
        spoilt(lambda spec: spec | {"model": spec["model"] | {"vocab": spec["model"]["vocab"] | {"a": 5}}}),
        "causal",
        r"t\.json: expected one token per id, got .* and .* for 5",
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_bad_tokenizer_is_told_in_a_line(home, monkeypatch, capsys, case):
    make, objective, words = TOKENIZERS[case]
    make(home / "t.json")
    write_lines(home / "x.jsonl", documents(100))
    text = CONFIG.replace("SOURCES", "[x.jsonl]").replace("tokenizer: {vocabulary: 400, train_bytes: 100000}", "tokenizer: {file: t.json}")
    if objective == "masked":
        text = text.replace("validation: 0.1", "validation: 0.1\n  objective: masked").replace("llama-tiny", "bert-tiny")
    (home / "run.yaml").write_text(text)
    assert re.search(words, told(home, monkeypatch, capsys))


def test_a_corpus_too_short_for_a_sample_is_told(home, monkeypatch, capsys):
    (home / "x.txt").write_text("a b c")
    (home / "run.yaml").write_text(CONFIG.replace("SOURCES", "[x.txt]"))
    code, err = run(monkeypatch, capsys, "prepare", "run.yaml")
    assert code == 2
    assert re.search(r"manta: data\..* expected at least 33 for a sample of 32, got .*\. Add ", err.splitlines()[-1])


def test_a_tokenizer_larger_than_the_embedding_is_told(home, monkeypatch, capsys):
    write_lines(home / "x.jsonl", documents(100))
    (home / "run.yaml").write_text(CONFIG.replace("SOURCES", "[x.jsonl]"))
    code, err = run(monkeypatch, capsys, "train", "run.yaml", "model.vocabulary=300")
    assert code == 2
    assert re.search(r"manta: model\.vocabulary: got 300, wants at least the tokenizer's 400; raise it", err)
