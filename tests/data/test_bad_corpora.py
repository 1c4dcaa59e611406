"""Every bad corpus and tokenizer ends with one line that names file and line or key, exit code 2, and no manifest."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpora import documents, write_lines
from token_file_writers import write_tokenizer

from manta.data.shards.manifest import MANIFEST
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


def lines(last: bytes):
    """Return a writer of a hundred good lines and this last one."""

    def write(path: Path) -> None:
        texts = [json.dumps({"text": text}) for text in documents(100)]
        path.write_bytes(b"\n".join([*(text.encode() for text in texts), last]))

    return write


def parquet(path: Path, **columns) -> None:
    pq.write_table(pa.table(columns or {"text": documents(100)}), path)


def truncated(write, share: float = 0.7):
    def write_part(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return write_part


def gzipped(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in documents(100)).encode()))


LINE = r"x\.jsonl: line 101: "
CORPORA = {
    "missing": ("none.jsonl", lambda _: None, r"none\.jsonl': expected .*, got no such files"),
    "no match": ("none/*.txt", lambda _: None, r"none/\*\.txt': expected .*, got no such files"),
    "empty": ("x.txt", lambda path: path.write_bytes(b""), r"x\.txt: expected data, got an empty file"),
    "no documents": ("x.jsonl", lambda path: path.write_bytes(b"\n\n"), r"x\.jsonl.*: expected documents, got none\. Add text\."),
    "unknown format": ("x.docx", lambda path: path.write_bytes(b"PK"), r"x\.docx: expected a known format"),
    "malformed line": ("x.jsonl", lines(b'{"text": "cut sho'), LINE + "expected one JSON object per line, got malformed JSON"),
    "no object": ("x.jsonl", lines(b"[1]"), LINE + "expected one JSON object per line, got list"),
    "missing field": ("x.jsonl", lines(b'{"body": "x"}'), LINE + r"expected a field 'text', got 'body'\. Set data\.text_field"),
    "wrong type": ("x.jsonl", lines(b'{"text": 5}'), LINE + "field 'text': expected text, got int"),
    "null": ("x.jsonl", lines(b'{"text": null}'), LINE + "field 'text': expected text, got null"),
    "lone surrogate": ("x.jsonl", lines(rb'{"text": "\ud800"}'), LINE + "field 'text': expected text, got a lone surrogate"),
    "bad encoding": ("x.jsonl", lines(b'{"text": "\xff"}'), LINE + "expected UTF-8"),
    "bad text": ("x.txt", lambda path: path.write_bytes(b"good\n" * 9 + b"\xff\xfe bad"), r"x\.txt: line 10: expected UTF-8"),
    "truncated parquet": ("x.parquet", truncated(parquet), r"x\.parquet: expected a readable file, got .*; it may be truncated or damaged"),
    "no column": ("x.parquet", lambda path: parquet(path, body=["x"]), r"x\.parquet: expected a field 'text', got 'body'"),
    "truncated gzip": ("x.jsonl.gz", truncated(gzipped), r"x\.jsonl\.gz: expected a readable file, got .*; it may be truncated or damaged"),
    "ids in a field": ("x.jsonl", lambda path: path.write_text('{"text": [1, 2, 3]}\n' * 99), r"got token ids\. Set tokenizer\.file"),
    "ids without a tokenizer": ("x.bin", lambda path: np.ones(999, np.uint16).tofile(path), r"got token ids\. Set tokenizer\.file"),
}


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["manta", *arguments])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    return exited.value.code, capsys.readouterr().err


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare_error(home: Path, monkeypatch, capsys, *overrides: str, complete: bool = False) -> str:
    """Return the one error line, which follows the progress of the preparation. complete: whether the corpus was made before the error."""
    code, err = run(monkeypatch, capsys, "prepare", "run.yaml", *overrides)
    assert code == 2, err
    errors = [line for line in err.splitlines() if line.startswith("manta: ")]
    assert len(errors) == 1, err
    assert err.splitlines()[-1] == errors[0]
    assert complete or not list(home.glob(f"corpora/*/{MANIFEST}"))
    return errors[0]


@pytest.mark.parametrize("case", CORPORA)
def test_a_bad_corpus_is_refused_in_one_line(home, monkeypatch, capsys, case):
    name, write, words = CORPORA[case]
    write(home / name)
    (home / "run.yaml").write_text(CONFIG.replace("SOURCES", json.dumps([name])))
    assert re.search(words, prepare_error(home, monkeypatch, capsys))


def test_impossible_weights_and_epochs_are_refused(home, monkeypatch, capsys):
    write_lines(home / "x.jsonl", documents(100))
    (home / "run.yaml").write_text(CONFIG.replace("SOURCES", "{web: x.jsonl}"))
    for override, words in (
        ("data.mixture={web: 0}", r"data\.mixture.*: expected weights above 0, got 0 for 'web'"),
        ("data.mixture={wep: 1}", r"mixture: expected names of sources, got 'wep'\. Use web\."),
        ("data.mixture=[{from_tokens: 5, weights: {web: 1}}]", r"mixture: expected a first stage with from_tokens 0, got 5"),
        ("data.sources={web: {path: x.jsonl, epochs: 0}}", r"epochs: expected a number greater than 0 .*, got 0"),
        ("data.skip=[[5, 5]]", r"skip: expected ascending ranges .*, got \[5, 5\]"),
        ("data.sources={web: {path: x.jsonl, filter: {matching: '('}}}", r"filter\.matching: expected a regular expression, got '\(' "),
        ("data.sources={web: {path: x.jsonl, template: 'no field'}}", r"template: expected text with fields in braces.*, got 'no field'"),
    ):
        code, err = run(monkeypatch, capsys, "prepare", "run.yaml", override)
        assert code == 2
        assert len(err.splitlines()) == 1, err
        assert re.search(words, err), err
    code, err = run(monkeypatch, capsys, "train", "run.yaml", "data.sources={web: {path: x.jsonl, epochs: 0.001}}")
    assert code == 2
    assert re.search(r"manta: data\.sources: web: expected at most 0\.001 epochs, got [\d.]+ epochs .*\. Shorten the run", err)


def test_a_validation_path_that_does_not_fit_is_refused(home, monkeypatch, capsys):
    (home / "all").mkdir()
    write_lines(home / "all" / "x.jsonl", documents(100))
    write_lines(home / "all" / "y.jsonl", documents(20, seed=1))
    write_tokenizer(home / "t.json")
    np.ones(999, np.uint16).tofile(home / "x.bin")
    (home / "blank.jsonl").write_text("\n")
    shards = "path: x.bin, format: nanogpt"
    for source, words in (
        ("path: all, validation: all/y.jsonl", r"validation: expected other files than its path has, got .*/all/y\.jsonl in both"),
        (f"path: all, validation: {home}/all/x.jsonl", r"validation: expected other files than its path has, got .*/all/x\.jsonl in both"),
        (f"{shards}, validation: all", r"validation: expected token shards as in its path, got text|got none of them"),
        ("path: all, validation: blank.jsonl", r"validation: expected documents in 'blank\.jsonl', got none"),
        (f"{shards}, filter: {{minimum_characters: 5}}", r"expected no filter for token shards, which have no text, got one\. Remove it\."),
        (f"{shards}, text_field: body", r"expected no text_field for token shards"),
    ):
        (home / "run.yaml").write_text(CONFIG.replace("SOURCES", f"[{{{source}}}]").replace("vocabulary: 400,", "file: t.json,"))
        assert re.search(words, prepare_error(home, monkeypatch, capsys)), source


def edited(change):
    def write(path: Path) -> None:
        write_tokenizer(path)
        spec = json.loads(path.read_text())
        path.write_text(json.dumps(change(spec)))

    return write


def _without_end(spec):
    renamed = {name.replace("<|endoftext|>", "<|other|>"): number for name, number in spec["model"]["vocab"].items()}
    return spec | {"added_tokens": [], "model": spec["model"] | {"vocab": renamed}}


TOKENIZERS = {
    "missing": (lambda _: None, "causal", r"t\.json: expected a readable tokenizer\.json, got an error: No such file"),
    "malformed": (lambda path: path.write_text("{"), "causal", r"t\.json: expected a tokenizer\.json as tokenizers\.Tokenizer saves it"),
    "a list": (lambda path: path.write_text("[1]"), "causal", r"t\.json: expected a tokenizer\.json as tokenizers\.Tokenizer saves it"),
    "no end": (edited(_without_end), "causal", r"t\.json: expected a token '<\|endoftext\|>'"),
    "no mask": (write_tokenizer, "masked", r"t\.json: expected \[CLS\] \[SEP\] \[MASK\] \[PAD\] .*, got no token \[CLS\] or <s>"),
    "an id twice": (
        edited(lambda spec: spec | {"model": spec["model"] | {"vocab": spec["model"]["vocab"] | {"a": 5}}}),
        "causal",
        r"t\.json: expected one token per id, got .* and .* for 5",
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_bad_tokenizer_is_refused_in_one_line(home, monkeypatch, capsys, case):
    write, objective, words = TOKENIZERS[case]
    write(home / "t.json")
    write_lines(home / "x.jsonl", documents(100))
    text = CONFIG.replace("SOURCES", "[x.jsonl]").replace("tokenizer: {vocabulary: 400, train_bytes: 100000}", "tokenizer: {file: t.json}")
    if objective == "masked":
        text = text.replace("validation: 0.1", "validation: 0.1\n  objective: masked").replace("llama-tiny", "bert-tiny")
    (home / "run.yaml").write_text(text)
    assert re.search(words, prepare_error(home, monkeypatch, capsys))


def test_too_little_text_for_a_sample_is_refused(home, monkeypatch, capsys):
    (home / "x.txt").write_text("a b c")
    (home / "run.yaml").write_text(CONFIG.replace("SOURCES", "[x.txt]"))
    code, err = run(monkeypatch, capsys, "prepare", "run.yaml")
    assert code == 2
    assert re.search(r"manta: data\..* expected at least 33 for a sample of 32, got .*\. Add ", err.splitlines()[-1])


def test_equal_documents_are_named_as_the_reason(home, monkeypatch, capsys):
    lines = [json.dumps({"text": text}) + "\n" for text in documents(40)]
    config = CONFIG.replace("SOURCES", "[x.jsonl]").replace("0.1", "0.4")
    remedy = "name other text as the validation of the source, or set data.validation to 0."
    all_held_out = "expected documents to train on in 'x.jsonl', got all 100 held out"
    found = set()
    for line in lines:
        (home / "x.jsonl").write_text(line * 100)
        (home / "run.yaml").write_text(config)
        found.add(prepare_error(home, monkeypatch, capsys, complete=True).replace("at least 33 for a sample of 32, ", ""))
        if len(found) == 2:
            break
    assert found == {
        f"manta: data.validation: expected got 0 validation tokens. Its documents seem to be equal, which are on the same side: {remedy}",
        f"manta: data.validation: {all_held_out}. Equal documents are on the same side: {remedy}",
    }


def test_a_vocabulary_larger_than_the_embedding_is_refused(home, monkeypatch, capsys):
    write_lines(home / "x.jsonl", documents(100))
    (home / "run.yaml").write_text(CONFIG.replace("SOURCES", "[x.jsonl]"))
    code, err = run(monkeypatch, capsys, "train", "run.yaml", "model.vocabulary=300")
    assert code == 2
    assert re.search(r"manta: model\.vocabulary: expected at least the tokenizer's 400, got 300\. Raise or omit it", err)
