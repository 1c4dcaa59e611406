"""Sources and formats: what is read from text and JSON lines, where it stands, and how each bad input is told."""

import gzip
import json
import os
import random
import sysconfig
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import DOCUMENTS, arrow, pieces, places, put, read, skipped, table, told

from manta.data.errors import InputError
from manta.data.sources import formats, splits
from manta.data.sources.config import SourceConfig
from manta.data.sources.rows import Field

LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()


@contextmanager
def as_a_user_without_rights():
    """Root may read everything, so it becomes nobody for a while."""
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


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


def test_text_is_read_letter_for_letter_in_sorted_order(tmp_path):
    for name, text in zip(("a.txt", "b.md", "c.rst", "d.txt.gz"), DOCUMENTS, strict=True):
        put(tmp_path / name, gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    put(tmp_path / "photo.png", b"\x89PNG")
    put(tmp_path / "weights.bin", b"\0\0")
    assert read(tmp_path) == DOCUMENTS
    assert read(f"file://{tmp_path}") == DOCUMENTS
    assert read(tmp_path / "*.txt*") == [DOCUMENTS[0], DOCUMENTS[3]]
    assert read(tmp_path / "**" / "b.*") == [DOCUMENTS[1]]


def test_config_says_what_a_file_is_whose_name_does_not(tmp_path):
    path = put(tmp_path / "part-00000", LINES)
    assert read(path, format="json") == DOCUMENTS
    assert read(path, format="text") == [LINES.decode()]
    assert read(tmp_path, format="json") == DOCUMENTS
    assert read(put(tmp_path / "x.jsonl", b"abc"), format="text") == ["abc"]
    assert "unknown kind of file" in told(path)


def test_the_standard_library_is_a_corpus_of_its_own():
    work = pieces("stdlib:")
    assert len(work) >= 2
    assert max(piece.size for piece in work) < 2 * splits.TEXT_PIECE
    paths = [path for piece in work for path in piece.paths]
    assert f"{sysconfig.get_path('stdlib')}/abc.py" in paths
    assert not [path for path in paths if "site-packages" in path or "__pycache__" in path]
    assert "".join(document.content for document in next(iter(work)).documents())


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 200_000), breaks=st.sampled_from(["", " ", "\n", "\n\n", "\r\n"]), seed=st.integers(0, 99))
def test_cutting_a_long_text_loses_nothing(tmp_path_factory, length, breaks, seed):
    rng = random.Random(seed)
    text = "".join(rng.choice(["a", "ß", "雪", breaks]) for _ in range(length)) + "x"
    path = tmp_path_factory.getbasetemp() / "long.txt"
    parts = read(put(path, text.encode()))
    assert "".join(parts) == text
    assert len(parts) == 1 or (len(text) > formats.WHOLE and max(map(len, parts)) <= formats.DOCUMENT)


def test_a_long_text_is_cut_between_paragraphs_and_each_part_knows_its_first_line(tmp_path):
    paragraphs = [f"paragraph {i} ß " * 60 + "\n\n" for i in range(300)]
    path = put(tmp_path / "input.txt", "".join(paragraphs).encode())
    parts, lines = read(path), places(path)
    assert len(parts) > 10
    assert all(part.startswith("paragraph") and part.endswith("\n\n") for part in parts)
    assert lines == [f"{path}: from line {1 + 2 * int(part.split()[1])}" for part in parts]


def test_each_document_knows_its_file_and_line(tmp_path):
    for name, content in {"a.jsonl": LINES, "b.jsonl.gz": gzip.compress(b"\n" + LINES), "c.txt": b"one", "d.txt": b"two"}.items():
        put(tmp_path / name, content)
    lines = [f"a.jsonl: line {i}" for i in range(1, 5)] + [f"b.jsonl.gz: line {i}" for i in range(2, 6)]
    assert places(tmp_path) == [f"{tmp_path}/{place}" for place in [*lines, "c.txt: from line 1", "d.txt: from line 1"]]


@settings(deadline=None)
@given(size=st.integers(1, 400))
def test_a_json_lines_file_shared_by_its_bytes_yields_each_line_once(tmp_path_factory, size):
    path = put(tmp_path_factory.getbasetemp() / "shared.jsonl", LINES)
    field = Field(name="text", key="data.text_field")
    shared = [formats.JsonLines(path=path, reader=field, start=at, stop=at + size, size=size) for at in range(0, len(LINES), size)]
    yielded = [(document.content, piece.where(document.place)) for piece in shared for document in piece.documents()]
    assert yielded == [(text, f"{path}: line {line}") for line, text in enumerate(DOCUMENTS, start=1)]


BAD_LINES = [
    (b'{"text": "half', "malformed JSON"),
    (b"[" * 100_000, "malformed JSON"),
    (b'{"txt": "a", "id": 3}', "no field 'text'; it has 'txt'"),
    (b'{"text": 7}', "field 'text' is int; wants text"),
    (b'{"text": null}', "field 'text' is null; wants text"),
    (b'{"text": ["a"]}', "field 'text' is list; wants text"),
    (b'["text"]', "got a JSON list"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_a_bad_json_line_is_told_by_file_and_line(tmp_path, monkeypatch, line, words):
    content = LINES + b"\n" + line + b"\n" + LINES
    path = put(tmp_path / "x.jsonl", content)
    assert told(path).startswith(f"{path}: line {len(DOCUMENTS) + 2}: ")
    assert words in told(path)
    packed = put(tmp_path / "x.jsonl.gz", gzip.compress(content))
    assert told(packed).startswith(f"{packed}: line {len(DOCUMENTS) + 2}: ")
    monkeypatch.setattr(splits, "PIECE", 30)
    assert told(path).startswith(f"{path}: line {len(DOCUMENTS) + 2}: ")


def test_bad_json_lines_are_left_out_and_each_is_told_where_config_says_skip(tmp_path, monkeypatch):
    path = put(tmp_path / "x.jsonl", BAD_LINES[0][0] + b"\n" + LINES + b"".join(line + b"\n" for line, _ in BAD_LINES) + LINES)
    expected = [f"{path}: line {line}: " for line in (1, *range(6, 6 + len(BAD_LINES)))]
    whole = skipped(path)
    for piece_bytes in (splits.PIECE, 30, 200):
        monkeypatch.setattr(splits, "PIECE", piece_bytes)
        documents, problems = skipped(path)
        assert documents == [*DOCUMENTS, *DOCUMENTS]
        assert problems == whole[1]
    assert all(map(str.startswith, problems, expected))
    assert all(words in problem for (_, words), problem in zip(BAD_LINES, problems[1:], strict=True))


def test_a_line_far_into_a_file_is_told_by_its_byte(tmp_path, monkeypatch):
    path = put(tmp_path / "x.jsonl", LINES + b"{}\n")
    monkeypatch.setattr(formats, "_COUNTED", 100)
    monkeypatch.setattr(splits, "PIECE", len(LINES) - 5)
    _, problems = skipped(path)
    assert problems == [f"{path}: byte {len(LINES)}: no field 'text'; it has none; set data.text_field"]


def test_half_a_surrogate_pair_matters_only_where_it_is_read(tmp_path):
    path = put(tmp_path / "x.jsonl", b'{"text": "a", "other": "\\ud800"}\n')
    assert read(path) == ["a"]
    assert "field 'other' holds a lone surrogate" in told(path, text_field="other")


def test_text_that_is_not_utf8_is_told_by_file_and_line(tmp_path):
    path = put(tmp_path / "x.txt", b"one\ntwo\nthr\xe9e\n")
    assert told(path) == f"{path}: line 3: not UTF-8 (byte 0xe9); convert the file"
    paragraph = "word ß " * 1000 + "\n\n"
    cut = (paragraph * 20).encode()
    path = put(tmp_path / "long.txt", cut + b"\xff\n" + cut)
    assert told(path).startswith(f"{path}: line 41: not UTF-8 (byte 0xff)")
    good, problems = skipped(path)
    assert problems == [f"{path}: line 41: not UTF-8 (byte 0xff); convert the file"]
    assert all("\udcff" not in part for part in good)
    assert 35 * len(paragraph) < sum(map(len, good)) < 40 * len(paragraph)  # only the part that holds it is left out


def test_a_template_joins_fields(tmp_path):
    rows = [{"title": "Tag", "body": "雪", "n": 3, "x": 0.5, "ok": True}, {"title": "", "body": "", "n": 0, "x": 1.0, "ok": False}]
    path = put(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    assert read(path, template="{{{title}}}\n\n{body} {title}") == ["{Tag}\n\n雪 Tag"]  # a row whose fields are all empty gives none
    spelled = ["3 0.5 true Tag", "0 1.0 false "]
    assert read(path, template="{n} {x} {ok} {title}") == spelled
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert read(table(tmp_path / "x.parquet", **columns), template="{n} {x} {ok} {title}") == spelled
    assert read(arrow(tmp_path / "x.arrow", **columns), template="{n} {x} {ok} {title}") == spelled


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"title": "a", "boy": "b"}, "no field 'body'; it has 'boy'; set template of 'news'"),
        ({"title": "a", "body": None}, "field 'body' is null; wants text, a number or a boolean"),
        ({"title": ["a"], "body": "b"}, "field 'title' is list; wants text, a number or a boolean"),
        ({"title": "\ud800", "body": "b"}, "field 'title' holds a lone surrogate"),
    ],
)
def test_a_field_that_a_template_misses_is_told_by_file_and_line(tmp_path, row, words):
    path = put(tmp_path / "x.jsonl", b'{"title": "a", "body": "b"}\n' + json.dumps(row).encode())
    assert told(path, template="{title}: {body}", name="news").startswith(f"{path}: line 2: {words}")
    assert skipped(path, template="{title}: {body}", name="news")[0] == ["a: b"]


def test_a_template_looks_into_no_value(tmp_path):
    path = put(tmp_path / "x.jsonl", b'{"a": "text", "a.__class__": "a field"}\n')
    assert read(path, template="{a.__class__}") == ["a field"]


def test_a_field_is_named_for_the_source_or_for_all(tmp_path):
    path = put(tmp_path / "x.jsonl", b'{"body": "b", "text": "t"}\n')
    assert read(path) == ["t"]
    assert read(path, text_field="body") == ["b"]
    assert "set text_field of 'news'" in told(path, text_field="boddy", name="news")


def test_a_truncated_or_damaged_file_is_told_and_never_skipped(tmp_path):
    noise = os.urandom(100_000).hex().encode()
    lines = b'{"text": "' + noise + b'"}\n'
    for name, content in {
        "t.jsonl.gz": gzip.compress(lines)[:-100],
        "t.jsonl.zst": zstandard.compress(lines)[:-100],
        "t.txt.zst": zstandard.compress(noise)[:-100],
        "g.jsonl.gz": b"this is not gzip",
    }.items():
        path = put(tmp_path / name, content)
        for bad_rows in ("fail", "skip"):
            assert told(path, bad_rows=bad_rows).startswith(f"{path}: cannot be read (")
            assert told(path, bad_rows=bad_rows).endswith("fetch it again")


def test_a_missing_empty_or_unknown_file_is_told(tmp_path):
    assert "no such files" in told(tmp_path / "none.jsonl")
    assert "no such files" in told(tmp_path / "*.jsonl")
    assert "wants a directory that holds text, JSONL, parquet or Arrow files" in told(tmp_path)
    assert "empty file" in told(put(tmp_path / "empty.jsonl", b""))
    assert "unknown kind of file; wants .arrow .bin .c" in told(put(tmp_path / "x.docx", b"x"))
    assert "unknown kind of file" in told(put(tmp_path / "x.parquet.gz", b"x"))
    (tmp_path / "z.txt").symlink_to(tmp_path / "gone")
    assert "cannot be read (FileNotFoundError" in told(tmp_path)


def test_a_file_that_vanishes_before_it_is_read_is_told(tmp_path):
    path = put(tmp_path / "x.jsonl", LINES)
    piece = pieces(path)[0]
    Path(path).unlink()
    for read_it in (lambda: list(piece.documents()), lambda: piece.where(30)):
        with pytest.raises(InputError, match=f"{path}: cannot be read"):
            read_it()


def test_no_access_is_told():
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        path = put(Path(home, "x.jsonl"), LINES)
        inner = put(Path(home, "locked", "x.jsonl"), LINES)
        Path(path).chmod(0)
        Path(inner).parent.chmod(0)
        try:
            with as_a_user_without_rights():
                assert told(path).startswith(f"{path}: no access (PermissionError")
                assert told(inner).startswith(f"{inner}: no access (PermissionError")
                assert told(home).startswith(f"{home}: no access (PermissionError")  # nor is what it can not look into passed over
        finally:
            Path(inner).parent.chmod(0o755)


def test_a_source_is_another_one_once_a_file_or_what_is_made_of_it_changes(tmp_path):
    path = put(tmp_path / "x.txt", b"abc")
    held = put(tmp_path / "held.txt", b"abc")
    os.utime(path, ns=(0, 0))
    before = splits.identity(SourceConfig(path=path))
    assert splits.identity(SourceConfig(path=path, name="other", epochs=3)) == before
    changed = [{"format": "text"}, {"text_field": "body"}, {"template": "{a}"}, {"filter": {"minimum_characters": 3}}, {"validation": held}]
    identities = [before, *(splits.identity(SourceConfig(path=path, **keys)) for keys in changed)]
    os.utime(held, ns=(0, 1))
    identities.append(splits.identity(SourceConfig(path=path, validation=held)))
    os.utime(path, ns=(0, 1))
    identities.append(splits.identity(SourceConfig(path=path)))
    assert len(set(map(json.dumps, identities))) == len(changed) + 3


def test_held_out_documents_are_a_source_like_the_others(tmp_path):
    path, held = put(tmp_path / "x.jsonl", LINES), put(tmp_path / "held.jsonl", b'{"text": "held"}\n')
    apart = splits.held_out(SourceConfig(path=path, validation=held, name="news"))
    assert apart == SourceConfig(path=held, name="news")
    assert splits.held_out(apart) is None
    with pytest.raises(InputError, match="no such files"):
        splits.identity(SourceConfig(path=path, validation=str(tmp_path / "none")))


def test_token_shards_are_listed_and_known(tmp_path):
    for name in ("a_text.bin", "a_text.idx", "train.bin"):
        put(tmp_path / "shards" / name, b"\0\0")
    shards = [str(tmp_path / "shards" / name) for name in ("a_text.bin", "a_text.idx", "train.bin")]
    for path, listed, keys in [
        (tmp_path / "shards", shards, {}),
        (tmp_path / "shards" / "*.bin", [shards[0], shards[2]], {}),
        (shards[2], shards[2:], {"format": "nanogpt"}),
        (tmp_path / "shards" / "a_text", shards[:2], {"format": "megatron"}),
    ]:
        source = SourceConfig(path=str(path), **keys)
        assert splits.is_tokens(source)
        assert [file.path for file in splits.files(source)] == listed
    text = put(tmp_path / "shards" / "x.txt", b"abc")
    assert not splits.is_tokens(SourceConfig(path=str(tmp_path / "shards")))  # a directory of text, where something else lies too
    assert not splits.is_tokens(SourceConfig(path="stdlib:"))
    assert not splits.is_tokens(SourceConfig(path=text))
    assert "token ids beside documents" in told(tmp_path / "shards" / "*")
    assert "unknown kind of file" in told(text, format="llm.c")
