"""Text and JSON lines: documents, their locations, templates, and the error of each bad row."""

import bz2
import gzip
import json
import lzma
import os
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from source_reading import DOCUMENTS, error_of, locations, read, read_skipping, splits_of, write_arrow, write_file, write_parquet

from manta.data.errors import InputError
from manta.data.sources import splits, text_formats
from manta.data.sources.input_split import ReadOptions
from manta.data.sources.rows import FieldReader
from manta.data.sources.text_formats import JsonLinesSplit
from manta.data.storage import positions
from manta.data.storage.store import open_store

ZST_SKIPPED = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"  # a frame that readers skip
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", LINES),
        ("x.json", b"\xef\xbb\xbf" + LINES + b"\n\n"),
        ("x.jsonl.gz", gzip.compress(LINES)),
        ("x.json.gz", gzip.compress(LINES[:50]) + gzip.compress(LINES[50:])),
        ("x.jsonl.gz", gzip.compress(b"") + gzip.compress(LINES) + gzip.compress(b"")),
        ("x.jsonl.zst", zstandard.compress(LINES[:50]) + zstandard.compress(LINES[50:])),
        ("x.jsonl.zst", ZST_SKIPPED + zstandard.compress(LINES[:50]) + ZST_SKIPPED + zstandard.compress(LINES[50:]) + ZST_SKIPPED),
        ("x.jsonl.bz2", bz2.compress(LINES[:50]) + bz2.compress(b"") + bz2.compress(LINES[50:])),
        ("x.jsonl.xz", lzma.compress(LINES)),
        ("x.jsonl.xz", lzma.compress(LINES[:50]) + bytes(4) + lzma.compress(b"") + lzma.compress(LINES[50:]) + bytes(1 << 21)),
        ("x.JSONL", LINES),
        ("X.JSONL.GZ", gzip.compress(LINES)),
    ],
)
def test_json_lines_are_read_plain_and_compressed(tmp_path, name, content):
    assert read(write_file(tmp_path / name, content)) == DOCUMENTS


def test_text_is_read_unchanged_in_sorted_order(tmp_path):
    for name, text in zip(("a.txt", "b.md", "c.rst", "d.txt.gz"), DOCUMENTS, strict=True):
        write_file(tmp_path / name, gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    write_file(tmp_path / "photo.png", b"\x89PNG")
    write_file(tmp_path / "weights.bin", b"\0\0")
    assert read(tmp_path) == DOCUMENTS
    assert read(f"file://{tmp_path}") == DOCUMENTS
    assert read(tmp_path / "*.txt*") == [DOCUMENTS[0], DOCUMENTS[3]]
    assert read(tmp_path / "**" / "b.*") == [DOCUMENTS[1]]


def test_the_configured_format_overrides_the_suffix(tmp_path):
    path = write_file(tmp_path / "part-00000", LINES)
    assert read(path, format="json") == DOCUMENTS
    assert read(path, format="text") == [LINES.decode()]
    assert read(tmp_path, format="json") == DOCUMENTS
    assert read(write_file(tmp_path / "x.jsonl", b"abc"), format="text") == ["abc"]
    assert "expected a known format" in error_of(path)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 200_000), breaks=st.sampled_from(["", " ", "\n", "\n\n", "\r\n"]), seed=st.integers(0, 99))
def test_cutting_a_long_text_loses_nothing(tmp_path_factory, length, breaks, seed):
    rng = random.Random(seed)
    text = "".join(rng.choice(["a", "ß", "雪", breaks]) for _ in range(length)) + "x"
    path = tmp_path_factory.getbasetemp() / "long.txt"
    parts = read(write_file(path, text.encode()))
    assert "".join(parts) == text
    assert len(parts) == 1 or (len(text) > text_formats.MAX_DOCUMENT and max(map(len, parts)) <= text_formats.CUT_DOCUMENT)


def test_a_long_text_is_cut_between_paragraphs_with_line_numbers(tmp_path):
    paragraphs = [f"paragraph {i} ß " * 60 + "\n\n" for i in range(300)]
    path = write_file(tmp_path / "input.txt", "".join(paragraphs).encode())
    parts, lines = read(path), locations(path)
    assert len(parts) > 10
    assert all(part.startswith("paragraph") and part.endswith("\n\n") for part in parts)
    assert lines == [f"{path}: line {1 + 2 * int(part.split()[1])}" for part in parts]


def test_each_document_has_its_file_and_line(tmp_path):
    for name, content in {"a.jsonl": LINES, "b.jsonl.gz": gzip.compress(b"\n" + LINES), "c.txt": b"one", "d.txt": b"two"}.items():
        write_file(tmp_path / name, content)
    lines = [f"a.jsonl: line {i}" for i in range(1, 5)] + [f"b.jsonl.gz: line {i}" for i in range(2, 6)]
    assert locations(tmp_path) == [f"{tmp_path}/{line}" for line in [*lines, "c.txt: line 1", "d.txt: line 1"]]


@settings(deadline=None)
@given(size=st.integers(1, 400))
def test_byte_ranges_of_json_lines_yield_each_line_once(tmp_path_factory, size):
    path = write_file(tmp_path_factory.getbasetemp() / "shared.jsonl", LINES)
    options = ReadOptions(reader=FieldReader(name="text", key="data.text_field"))
    ranges = list(JsonLinesSplit.from_files([open_store(path).stat()], options, size))
    assert len(ranges) == -(-len(LINES) // size)
    documents = [(document.content, split.places.location(document.position)) for split in ranges for document in split.documents()]
    assert documents == [(text, f"{path}: line {line}") for line, text in enumerate(DOCUMENTS, start=1)]


BAD_LINES = [
    (b'{"text": "half', "got malformed JSON"),
    (b"[" * 100_000, "got malformed JSON"),
    (b'{"text": "a", "n": ' + b"7" * 5000 + b"}", "got malformed JSON"),
    (b'{"text": ["a"]}', "expected text or a list of token ids, got a list of 1 texts. Join"),
    (b'{"txt": "a", "id": 3}', "expected a field 'text', got 'txt'"),
    (b'{"text": 7}', "field 'text': expected text, got int"),
    (b'{"text": null}', "field 'text': expected text, got null"),
    (b'{"text": [7.5]}', "field 'text': expected text, got list"),
    (b'["text"]', "expected one JSON object per line, got list"),
    (b'[{"text": "a"}]', "expected one JSON object per line, got a list of objects. Write each object in a line, for example with jq -c"),
    (b"{", "Write each object in a line, for example with jq -c"),
    (b'{"text": "\xff"}', "expected UTF-8"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_a_bad_json_line_is_reported_with_file_and_line(tmp_path, monkeypatch, line, words):
    content = LINES + b"\n" + line + b"\n" + LINES
    path = write_file(tmp_path / "x.jsonl", content)
    assert error_of(path).startswith(f"{path}: line {len(DOCUMENTS) + 2}: ")
    assert words in error_of(path)
    compressed = write_file(tmp_path / "x.jsonl.gz", gzip.compress(content))
    assert error_of(compressed).startswith(f"{compressed}: line {len(DOCUMENTS) + 2}: ")
    monkeypatch.setattr(splits, "SPLIT_BYTES", 30)
    assert error_of(path).startswith(f"{path}: line {len(DOCUMENTS) + 2}: ")


def test_skip_removes_bad_json_lines_and_reports_each(tmp_path, monkeypatch):
    path = write_file(tmp_path / "x.jsonl", BAD_LINES[0][0] + b"\n" + LINES + b"".join(line + b"\n" for line, _ in BAD_LINES) + LINES)
    expected = [f"{path}: line {line}: " for line in (1, *range(6, 6 + len(BAD_LINES)))]
    whole = read_skipping(path)
    for split_bytes in (splits.SPLIT_BYTES, 30, 200):
        monkeypatch.setattr(splits, "SPLIT_BYTES", split_bytes)
        documents, messages = read_skipping(path)
        assert documents == [*DOCUMENTS, *DOCUMENTS]
        assert messages == whole[1]
    assert all(map(str.startswith, messages, expected))
    assert all(words in message for (_, words), message in zip(BAD_LINES, messages[1:], strict=True))


def test_a_bad_line_far_into_a_file_is_named_by_its_byte(tmp_path, monkeypatch):
    path = write_file(tmp_path / "x.jsonl", LINES + b"{}\n")
    monkeypatch.setattr(positions, "MAX_COUNTED", 100)
    monkeypatch.setattr(splits, "SPLIT_BYTES", len(LINES) - 5)
    _, messages = read_skipping(path)
    assert messages == [f"{path}: byte {len(LINES)}: expected a field 'text', got no fields. Set data.text_field."]


def test_a_lone_surrogate_in_an_unused_field_is_ignored(tmp_path):
    path = write_file(tmp_path / "x.jsonl", b'{"text": "a", "other": "\\ud800"}\n')
    assert read(path) == ["a"]
    assert "field 'other': expected text, got a lone surrogate" in error_of(path, text_field="other")


def test_text_that_is_not_utf8_is_reported_with_file_and_line(tmp_path):
    path = write_file(tmp_path / "x.txt", b"one\ntwo\nthr\xe9e\n")
    assert error_of(path) == f"{path}: line 3: expected UTF-8, got byte 0xe9. Convert the file."
    paragraph = "word ß " * 1000 + "\n\n"
    half = (paragraph * 20).encode()
    path = write_file(tmp_path / "long.txt", half + b"\xff\n" + half)
    assert error_of(path).startswith(f"{path}: line 41: expected UTF-8, got byte 0xff")
    good, messages = read_skipping(path)
    assert messages == [f"{path}: line 41: expected UTF-8, got byte 0xff. Convert the file."]
    assert all("\udcff" not in part for part in good)
    assert 35 * len(paragraph) < sum(map(len, good)) < 40 * len(paragraph)  # only the part with the bad byte is removed


def test_a_template_joins_fields(tmp_path):
    rows = [{"title": "Tag", "body": "雪", "n": 3, "x": 0.5, "ok": True}, {"title": "", "body": "", "n": 0, "x": 1.0, "ok": False}]
    path = write_file(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    assert read(path, template="{{{title}}}\n\n{body} {title}") == ["{Tag}\n\n雪 Tag"]  # a row with only empty fields has no document
    texts = ["3 0.5 true Tag", "0 1.0 false "]
    assert read(path, template="{n} {x} {ok} {title}") == texts
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert read(write_parquet(tmp_path / "x.parquet", **columns), template="{n} {x} {ok} {title}") == texts
    assert read(write_arrow(tmp_path / "x.arrow", **columns), template="{n} {x} {ok} {title}") == texts


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"title": "a", "boy": "b"}, "expected a field 'body', got 'title', 'boy'. Set template of 'news'."),
        ({"title": "a", "body": None}, "field 'body': expected text, a number or a boolean, got null"),
        ({"title": ["a"], "body": "b"}, "field 'title': expected text, a number or a boolean, got list"),
        ({"title": "\ud800", "body": "b"}, "field 'title': expected text, got a lone surrogate"),
    ],
)
def test_a_bad_template_field_is_reported_with_file_and_line(tmp_path, row, words):
    path = write_file(tmp_path / "x.jsonl", b'{"title": "a", "body": "b"}\n' + json.dumps(row).encode())
    assert error_of(path, template="{title}: {body}", name="news").startswith(f"{path}: line 2: {words}")
    assert read_skipping(path, template="{title}: {body}", name="news")[0] == ["a: b"]


def test_a_template_does_not_follow_attributes(tmp_path):
    path = write_file(tmp_path / "x.jsonl", b'{"a": "text", "a.__class__": "a field"}\n')
    assert read(path, template="{a.__class__}") == ["a field"]


def test_text_field_is_set_per_source_or_for_all(tmp_path):
    path = write_file(tmp_path / "x.jsonl", b'{"body": "b", "text": "t"}\n')
    assert read(path) == ["t"]
    assert read(path, text_field="body") == ["b"]
    assert "Set text_field of 'news' to 'body'." in error_of(path, text_field="boddy", name="news")


def test_a_truncated_or_damaged_file_is_never_skipped(tmp_path):
    noise = os.urandom(100_000).hex().encode()
    lines = b'{"text": "' + noise + b'"}\n'
    for name, content in {
        "t.jsonl.gz": gzip.compress(lines)[:-100],
        "t.jsonl.zst": zstandard.compress(lines)[:-100],
        "t.txt.zst": zstandard.compress(noise)[:-100],
        "t.jsonl.bz2": bz2.compress(lines)[:-100],
        "t.jsonl.xz": lzma.compress(lines)[:-100],
        "u.jsonl.xz": lzma.compress(lines)[:20],
        "g.jsonl.gz": b"this is not gzip",
        "h.jsonl.gz": gzip.compress(lines) + b"garbage",
        "h.jsonl.zst": zstandard.compress(lines) + b"garbage",
        "h.jsonl.bz2": bz2.compress(lines) + b"garbage",
        "h.jsonl.xz": lzma.compress(lines) + bytes(4) + b"garbage",
        "i.jsonl.xz": bytes(8),
    }.items():
        path = write_file(tmp_path / name, content)
        for bad_rows in ("fail", "skip"):
            assert error_of(path, bad_rows=bad_rows).startswith(f"{path}: expected a readable file, got ")
            assert error_of(path, bad_rows=bad_rows).endswith("Download it again.")


def test_a_file_deleted_before_it_is_read_is_an_error(tmp_path):
    path = write_file(tmp_path / "x.jsonl", LINES)
    split = splits_of(path)[0]
    Path(path).unlink()
    with pytest.raises(InputError, match=f"{path}: expected a readable file"):
        list(split.documents())
    assert split.places.location(30) == f"{path}: byte 30"


def test_a_line_that_is_too_long_is_bad_and_does_not_shift_others(tmp_path, monkeypatch):
    short = [json.dumps({"text": text}).encode() for text in ("a", "b", "c")]
    longest = max(map(len, short))
    long = b'{"text": "' + b"x" * longest + b'"}'
    monkeypatch.setattr(text_formats, "_BLOCK", 7)
    for newline, last in ((b"\n", b"\n"), (b"\r\n", b""), (b"\n", b"")):
        content = newline.join([short[0], long, short[1], long + b" " * 50, short[2], long]) + last
        for size, compress in ((splits.SPLIT_BYTES, bytes), (10, bytes), (20, bytes), (splits.SPLIT_BYTES, gzip.compress)):
            monkeypatch.setattr(splits, "SPLIT_BYTES", size)
            path = write_file(tmp_path / ("x.jsonl" if compress is bytes else "x.jsonl.gz"), compress(content))
            keys = {"data": {"longest_document": longest + len(newline) - 1}}
            found, messages = read_skipping(path, **keys)
            assert found == ["a", "b", "c"]
            assert [message.partition(": expected at")[0] for message in messages] == [f"{path}: line {line}" for line in (2, 4, 6)]
            assert error_of(path, **keys) == messages[0]
