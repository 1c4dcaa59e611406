"""Sources and formats: what is read from each, and how each bad input is told."""

import gzip
import json
import os
import pickle
import random
import sysconfig
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from manta.data import corpus, formats
from manta.data.errors import InputError

DOCUMENTS = ["Guten Tag.\n", "雪が降る", "a\r\nb", "🙂 <|endoftext|> not the end"]
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()


def read(source: str, field: str = "text") -> list[str]:
    return [text for piece in corpus.pieces(source, field) for text in pickle.loads(pickle.dumps(piece)).documents()]


def told(source: str, field: str = "text") -> str:
    """The one line that a bad source is refused with."""
    with pytest.raises(InputError) as caught:
        read(source, field)
    message = str(pickle.loads(pickle.dumps(caught.value)))
    assert "\n" not in message
    return message


def put(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def table(path: Path, **columns: list) -> str:
    parquet.write_table(pa.table(columns), path, row_group_size=2)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", LINES),
        ("x.json", b"\xef\xbb\xbf" + LINES + b"\n\n"),
        ("x.jsonl.gz", gzip.compress(LINES)),
        ("x.json.gz", gzip.compress(LINES[:50]) + gzip.compress(LINES[50:])),
        ("x.jsonl.zst", zstandard.compress(LINES[:50]) + zstandard.compress(LINES[50:])),
    ],
)
def test_json_lines_are_read_plain_and_compressed(tmp_path, name, content):
    assert read(put(tmp_path / name, content)) == DOCUMENTS


def test_parquet_is_read(tmp_path):
    assert read(table(tmp_path / "x.parquet", id=[1, 2, 3, 4], body=DOCUMENTS), "body") == DOCUMENTS


def test_text_is_read_letter_for_letter_in_sorted_order(tmp_path):
    for name, text in zip(("a.txt", "b.md", "c.rst", "d.txt.gz"), DOCUMENTS, strict=True):
        put(tmp_path / name, gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    put(tmp_path / "photo.png", b"\x89PNG")
    assert read(str(tmp_path)) == DOCUMENTS
    assert read(str(tmp_path / "*.txt*")) == [DOCUMENTS[0], DOCUMENTS[3]]
    assert read(str(tmp_path / "**" / "b.*")) == [DOCUMENTS[1]]


def test_a_local_hugging_face_dataset_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for part in range(2):
        table(tmp_path / f"train-{part}.parquet", text=[f"{text} {part}" for text in DOCUMENTS])
    assert read(f"hf:{tmp_path}") == [f"{text} {part}" for part in range(2) for text in DOCUMENTS]
    assert "'txet'; it has 'text'; set data.text_field" in told(f"hf:{tmp_path}", "txet")
    assert f"hf:{tmp_path / 'none'}: cannot be opened" in told(f"hf:{tmp_path / 'none'}")
    assert "names no dataset" in told("hf:")


def test_the_standard_library_is_a_corpus_of_its_own():
    pieces = corpus.pieces("stdlib:", "text")
    assert len(pieces) >= 2
    assert max(piece.size for piece in pieces) < 2 * corpus.TEXT_PIECE
    paths = [path for piece in pieces for path in piece.paths]
    assert f"{sysconfig.get_path('stdlib')}/abc.py" in paths
    assert not [path for path in paths if "site-packages" in path or "__pycache__" in path]
    assert "".join(next(iter(pieces)).documents())


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 200_000), breaks=st.sampled_from(["", " ", "\n", "\n\n", "\r\n"]), seed=st.integers(0, 99))
def test_cutting_a_long_text_loses_nothing(tmp_path_factory, length, breaks, seed):
    rng = random.Random(seed)
    text = "".join(rng.choice(["a", "ß", "雪", breaks]) for _ in range(length)) + "x"
    path = tmp_path_factory.getbasetemp() / "long.txt"
    parts = read(put(path, text.encode()))
    assert "".join(parts) == text
    assert len(parts) == 1 or (len(text) > formats.WHOLE and max(map(len, parts)) <= formats.DOCUMENT)


def test_a_long_text_is_cut_between_paragraphs(tmp_path):
    paragraphs = [f"paragraph {i} " * 60 + "\n\n" for i in range(300)]
    parts = read(put(tmp_path / "input.txt", "".join(paragraphs).encode()))
    assert len(parts) > 10
    assert all(part.startswith("paragraph") and part.endswith("\n\n") for part in parts)


@settings(deadline=None)
@given(size=st.integers(1, 400))
def test_a_json_lines_file_shared_by_its_bytes_yields_each_line_once(tmp_path_factory, size):
    path = put(tmp_path_factory.getbasetemp() / "shared.jsonl", LINES)
    starts = range(0, len(LINES), size)
    ranges = [formats.JsonLines(path=path, field="text", start=start, stop=start + size, size=size) for start in starts]
    assert [text for piece in ranges for text in piece.documents()] == DOCUMENTS


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "half', "malformed JSON"),
        (b'{"txt": "a", "id": 3}', "no field 'text'; it has 'txt'"),
        (b'{"text": 7}', "field 'text' is int; wants text"),
        (b'{"text": null}', "field 'text' is NoneType; wants text"),
        (b'["text"]', "got a JSON list"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
    ],
)
def test_a_bad_json_line_is_told_by_file_and_line(tmp_path, monkeypatch, line, words):
    content = LINES + b"\n" + line + b"\n" + LINES
    path = put(tmp_path / "x.jsonl", content)
    assert told(path).startswith(f"{path}: line {len(DOCUMENTS) + 2}: ")
    assert words in told(path)
    packed = put(tmp_path / "x.jsonl.gz", gzip.compress(content))
    assert told(packed).startswith(f"{packed}: line {len(DOCUMENTS) + 2}: ")
    monkeypatch.setattr(corpus, "JSON_PIECE", 30)
    assert told(path).startswith(f"{path}: line {len(DOCUMENTS) + 2}: ")


def test_a_bad_row_is_told_by_file_and_row(tmp_path):
    path = table(tmp_path / "null.parquet", text=["a", "b", None, "d"])
    assert told(path) == f"{path}: row 3: field 'text' is NoneType; wants text"
    path = table(tmp_path / "number.parquet", text=[1, 2])
    assert told(path) == f"{path}: row 1: field 'text' is int; wants text"
    path = table(tmp_path / "other.parquet", texts=["a"], url=["b"])
    assert told(path) == f"{path}: no field 'text'; it has 'texts'; set data.text_field"


def test_a_truncated_or_damaged_file_is_told(tmp_path):
    noise = os.urandom(100_000).hex().encode()
    lines = b'{"text": "' + noise + b'"}\n'
    whole = Path(table(tmp_path / "whole.parquet", text=["a" * 100] * 10)).read_bytes()
    for name, content in {
        "t.jsonl.gz": gzip.compress(lines)[:-100],
        "t.jsonl.zst": zstandard.compress(lines)[:-100],
        "t.txt.zst": zstandard.compress(noise)[:-100],
        "t.parquet": whole[:-40],
        "g.jsonl.gz": b"this is not gzip",
    }.items():
        path = put(tmp_path / name, content)
        assert told(path).startswith(f"{path}: cannot be read (")
        assert told(path).endswith("fetch it again")


def test_bad_text_is_told_by_file_and_line(tmp_path):
    path = put(tmp_path / "x.txt", b"one\ntwo\nthr\xe9e\n")
    assert told(path).startswith(f"{path}: line 3: not UTF-8")


def test_a_missing_empty_or_unknown_file_is_told(tmp_path):
    assert "no such files" in told(str(tmp_path / "none.jsonl"))
    assert "no such files" in told(str(tmp_path / "*.jsonl"))
    assert "wants a directory that holds text, JSONL or parquet files" in told(str(tmp_path))
    assert "empty file" in told(put(tmp_path / "empty.jsonl", b""))
    assert "unknown kind of file; wants .c" in told(put(tmp_path / "x.docx", b"x"))
    assert "unknown kind of file" in told(put(tmp_path / "x.parquet.gz", b"x"))


def test_a_source_is_another_one_once_a_file_changes(tmp_path):
    path = put(tmp_path / "x.txt", b"abc")
    os.utime(path, ns=(0, 0))
    before = corpus.identity(path)
    assert corpus.identity(path) == before
    os.utime(path, ns=(0, 1))
    assert corpus.identity(path) != before
