"""Corpora of strangers: `manta prepare` reads what is a document of the source, or refuses in one line. It reads nothing else."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import socket
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from fuzz import assert_refused_or_done, manta
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from small_corpora import documents, texts_of

from manta.data.prepare.prepare import find_prepared
from manta.launch.config import load

CONFIG = """
run: {dir: run}
data: {sources: [corpus], sequence_length: 16, validation: 0, workers: 1, longest_document: 100000}
tokenizer: {vocabulary: 300, train_bytes: 20000}
model: {preset: llama-tiny}
train: {steps: 2, global_batch: 8, micro_batch: 4}
"""
SECRET = "the private key of the user is 7f3a9c"
TEXTS = documents(12)

ROWS = st.one_of(
    st.sampled_from(TEXTS * 6).map(lambda text: {"text": text, "id": 1}),
    st.sampled_from(
        [
            None,
            [],
            ["text"],
            7,
            {"text": None},
            {"text": ["two", "paragraphs"]},
            {"text": [5, 6]},
            {"text": [True]},
            {"text": {"en": "a"}},
            {"text": "\ud800"},
            {"text": "\x00\x1b[2J\u202e\n"},
            {"text": ""},
            {"txt": "a"},
            {"meta": {"text": "nested"}},
            {"text": "long " * 30_000},
            {"text": "a", "k" * 5_000: "b"},
            {"text": "a", "n": 10**4000},
            {"text": float("nan")},
        ]
    ),
)


def text(rows: list[object]) -> bytes:
    return "\n\n".join(json.dumps(row) if not isinstance(row, dict) else str(row.get("text")) for row in rows).encode("utf-8", "replace")


def lines(rows: list[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[object]) -> pa.Table:
    values = [row["text"] if isinstance(row, dict) and isinstance(row.get("text"), str) else None for row in rows]
    return pa.table(
        {"text": pa.array([None if value is None else value.encode("utf-8", "surrogatepass") for value in values]).view(pa.string())}
    )


def tables(rows: list[object]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table(rows), sink, row_group_size=2)
    return sink.getvalue()


def arrow(rows: list[object]) -> bytes:
    sink, content = io.BytesIO(), table(rows)
    with pa.ipc.new_stream(sink, content.schema, options=pa.ipc.IpcWriteOptions(compression=None)) as writer:
        writer.write_table(content, max_chunksize=3)
    return sink.getvalue()


FORMATS = {
    ".txt": text,
    ".md": text,
    ".jsonl": lines,
    ".json": lines,
    ".JSONL": lines,
    ".parquet": tables,
    ".arrow": arrow,
    ".bin": text,
    ".pdf": text,
}
COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".tgz": gzip.compress,
}
DAMAGES = {
    "none": lambda content, _: content,
    "cut": lambda content, at: content[: int(at * len(content))],
    "flipped": lambda content, at: (
        content[: (cut := int(at * len(content)))] + bytes([byte ^ 0x55 for byte in content[cut : cut + 3]]) + content[cut + 3 :]
    ),
    "zeros": lambda content, at: content[: (cut := int(at * len(content)))] + bytes(100) + content[cut:],
    "longer": lambda content, _: content + b"garbage\xff\xfe",
    "twice": lambda content, _: content + content,
    "UTF-16": lambda content, _: content.decode("latin-1").encode("utf-16"),
    "BOM": lambda content, _: b"\xef\xbb\xbf" + content,
    "deep": lambda content, _: content + b"[" * 50_000,
    "digits": lambda content, _: content + b'{"text": [' + b"7" * 5_000 + b"]}\n",
    "line ends": lambda content, _: content.replace(b"\n", b"\r"),
    "empty": lambda _, __: b"",
    "other": lambda _, at: bytes(range(256)) * int(1 + 5 * at),
}
NAMES = (
    "a",
    "part 1",
    "-x",
    "[a]*",
    "train",
    "test",
    "README",
    "雪",
    "a\nb",
    "'\"$(id)",
    "x" * 200,
    b"\xff\xfe".decode(errors="surrogateescape"),
    ".hidden",
    "%s{0}",
)
FOLDERS = ("", "data", "test", "[1]", "a/b/c", "__pycache__", "\n")
FILES = st.tuples(
    st.sampled_from([*["", "data"] * 6, *FOLDERS]),
    st.sampled_from([*["a", "part 1"] * 12, *NAMES]),
    st.sampled_from([*[".txt", ".jsonl", ".parquet", ".arrow"] * 3, *FORMATS]),
    st.sampled_from(["", "", *COMPRESSIONS]),
    st.lists(ROWS, max_size=3).map(lambda rows: [*rows, *({"text": one} for one in TEXTS)]),
    st.sampled_from([*["none"] * 12, *DAMAGES]),
    st.floats(0, 1),
)
LINKS = (
    *["no"] * 12,
    "to the secret",
    "to its folder",
    "to nothing",
    "to itself",
    "to the root",
    "inside",
    "pipe",
    "socket",
    "device",
    "locked",
)
PATHS = (
    *["corpus", "corpus/**", "link", "file"] * 4,
    "corpus",
    "corpus",
    "corpus/*",
    "corpus/**",
    "corpus/**/*.*",
    "corpus/[1]/*",
    "file",
    "corpus/../corpus",
    "corpus/a*",
    "link",
)
OVERRIDES = (
    "data.text_field=meta.text",
    "data.bad_rows=skip",
    "data.bad_rows=skip",
    "data.sources=[{path: PATH, format: json}]",
    "data.sources=[{path: PATH, template: '{text}{id}'}]",
    "data.live=true",
    "data.sources=[{path: PATH, filter: {dedup: true}}]",
    "data.validation=0.2",
)


def make_link(kind: str, corpus: Path) -> None:
    path = corpus / "linked.txt"
    targets = {
        "to the secret": "../secret.txt",
        "to its folder": "../private",
        "to nothing": "gone",
        "to itself": "linked.txt",
        "to the root": "/",
    }
    targets |= {"inside": ".", "device": "/dev/zero"}
    if kind in targets:
        (path if "folder" not in kind else corpus / "linked").symlink_to(targets[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    elif kind == "locked":
        path.write_text("locked")
        path.chmod(0)


def check_corpus(directory: Path, files: list[tuple], link: str, path: str, overrides: list[str]) -> None:
    shutil.rmtree(directory)
    corpus = directory / "corpus"
    for folder in ("corpus", "private"):
        (directory / folder).mkdir(parents=True)
    for secret in ("secret.txt", "private/key.txt"):
        (directory / secret).write_text(SECRET * 20)
    (directory / "run.yaml").write_text(CONFIG)
    os.chdir(directory)
    written = list[Path]()
    for folder, name, suffix, compression, rows, damage, at in files:
        file = corpus / folder / f"{name}{suffix}{compression}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(DAMAGES[damage](COMPRESSIONS[compression](FORMATS[suffix](rows)), at))
        written.append(file)
    make_link(link, corpus)
    (directory / "link").symlink_to("corpus")
    source = os.path.relpath(written[0]) if path == "file" else path
    try:
        source.encode()
    except UnicodeEncodeError:
        source = "corpus"
    arguments = [f"data.sources=[{json.dumps(source)}]", *(override.replace("PATH", json.dumps(source)) for override in overrides)]
    outcome = manta("prepare", "run.yaml", *arguments)
    event(f"exit code {outcome.code}")
    assert_refused_or_done(outcome, 0, 2)
    problems = [line for line in outcome.stderr.splitlines() if line.startswith("manta: ")]
    assert len(problems) == (1 if outcome.code == 2 else 0), outcome.stderr[-2000:]
    assert len(outcome.stderr) < 20_000
    if outcome.code == 0:
        config = load(directory / "run.yaml", arguments)
        prepared = find_prepared(config.data, config.tokenizer)
        assert prepared is not None
        texts = "".join(texts_of(prepared, "train") + texts_of(prepared, "validation"))
        assert SECRET not in texts


QUIET = {
    "deadline": None,
    "database": None,
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
}
CORPORA = {
    "files": st.lists(FILES, min_size=1, max_size=3),
    "link": st.sampled_from(LINKS),
    "path": st.sampled_from(PATHS),
    "overrides": st.lists(st.sampled_from(OVERRIDES), max_size=2),
}


@pytest.fixture
def directory(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@settings(max_examples=15, derandomize=True, **QUIET)
@given(**CORPORA)
def test_corpora_are_read_or_refused_in_a_line(directory, files, link, path, overrides):
    check_corpus(directory, files, link, path, overrides)


@pytest.mark.slow
@settings(max_examples=400, **QUIET)
@given(**CORPORA)
def test_many_corpora_are_read_or_refused_in_a_line(directory, files, link, path, overrides):
    check_corpus(directory, files, link, path, overrides)
