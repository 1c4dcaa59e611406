"""A source's files: which are found, which are refused, and when a source has changed."""

import json
import os
import sysconfig
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from source_reading import error_of, splits_of, write_file

from manta.data.errors import InputError
from manta.data.source_config import SourceConfig
from manta.data.sources import splits
from manta.data.sources.source import holds_token_files, identity, source_files, validation_source

LINES = b'{"text": "one"}\n{"text": "two"}\n'


@contextmanager
def as_unprivileged_user():
    """Drop root's privileges for a while: root can read everything."""
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_the_standard_library_is_a_source():
    found = splits_of("stdlib:")
    assert len(found) >= 2
    assert max(split.size for split in found) < 2 * splits.TEXT_SPLIT_BYTES
    paths = [path for split in found for path in split.paths]
    assert f"{sysconfig.get_path('stdlib')}/abc.py" in paths
    assert not [path for path in paths if "site-packages" in path or "__pycache__" in path]
    assert "".join(document.content for document in next(iter(found)).documents())


def test_a_missing_empty_or_unknown_file_is_refused(tmp_path):
    assert "no such files" in error_of(tmp_path / "none.jsonl")
    assert "no such files" in error_of(tmp_path / "*.jsonl")
    assert "expected text, JSONL, Parquet or Arrow files, or token shards, got none of them" in error_of(tmp_path)
    assert "got an empty file" in error_of(write_file(tmp_path / "empty.jsonl", b""))
    assert "expected a known format (.arrow .bin .c" in error_of(write_file(tmp_path / "x.docx", b"x"))
    assert "expected a known format" in error_of(write_file(tmp_path / "x.parquet.gz", b"x"))
    (tmp_path / "z.txt").symlink_to(tmp_path / "gone")
    assert "expected a readable file, got FileNotFoundError" in error_of(tmp_path)


def test_a_file_without_read_access_is_refused():
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        path = write_file(Path(home, "x.jsonl"), LINES)
        inner = write_file(Path(home, "locked", "x.jsonl"), LINES)
        Path(path).chmod(0)
        Path(inner).parent.chmod(0)
        try:
            with as_unprivileged_user():
                assert error_of(path).startswith(f"{path}: expected read access, got PermissionError")
                assert error_of(inner).startswith(f"{inner}: expected read access, got PermissionError")
                assert error_of(home).startswith(f"{home}: expected read access, got PermissionError")  # a locked folder is not skipped
        finally:
            Path(inner).parent.chmod(0o755)


def test_identity_changes_with_the_files_and_the_selection(tmp_path):
    path = write_file(tmp_path / "x.txt", b"abc")
    held = write_file(tmp_path / "held.txt", b"abc")
    os.utime(path, ns=(0, 0))
    before = identity(SourceConfig(path=path))
    assert identity(SourceConfig(path=path, name="other", epochs=3)) == before
    changed = [{"format": "text"}, {"text_field": "body"}, {"template": "{a}"}, {"filter": {"minimum_characters": 3}}, {"validation": held}]
    identities = [before, *(identity(SourceConfig(path=path, **keys)) for keys in changed)]
    os.utime(held, ns=(0, 1))
    identities.append(identity(SourceConfig(path=path, validation=held)))
    os.utime(path, ns=(0, 1))
    identities.append(identity(SourceConfig(path=path)))
    assert len(set(map(json.dumps, identities))) == len(changed) + 3


def test_a_validation_path_is_a_source_with_the_same_settings(tmp_path):
    path, held = write_file(tmp_path / "x.jsonl", LINES), write_file(tmp_path / "held.jsonl", b'{"text": "held"}\n')
    validation = validation_source(SourceConfig(path=path, validation=held, name="news"))
    assert validation == SourceConfig(path=held, name="news")
    assert validation_source(validation) is None
    with pytest.raises(InputError, match="no such files"):
        identity(SourceConfig(path=path, validation=str(tmp_path / "none")))


def test_token_files_are_found_and_recognized(tmp_path):
    for name in ("a_text.bin", "a_text.idx", "train.bin"):
        write_file(tmp_path / "shards" / name, b"\0\0")
    shards = [str(tmp_path / "shards" / name) for name in ("a_text.bin", "a_text.idx", "train.bin")]
    for path, expected, keys in [
        (tmp_path / "shards", shards, {}),
        (tmp_path / "shards" / "*.bin", [shards[0], shards[2]], {}),
        (shards[2], shards[2:], {"format": "nanogpt"}),
        (tmp_path / "shards" / "a_text", shards[:2], {"format": "megatron"}),
    ]:
        source = SourceConfig(path=str(path), **keys)
        assert holds_token_files(source)
        assert [file.path for file in source_files(source)] == expected
    text = write_file(tmp_path / "shards" / "x.txt", b"abc")
    assert not holds_token_files(SourceConfig(path=str(tmp_path / "shards")))  # a directory with text ignores other files
    assert not holds_token_files(SourceConfig(path="stdlib:"))
    assert not holds_token_files(SourceConfig(path=text))
    assert "expected documents as in the source's other files, got token ids" in error_of(tmp_path / "shards" / "*")
    assert "expected a known format" in error_of(text, format="llm.c")
