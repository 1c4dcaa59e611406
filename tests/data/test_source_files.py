"""A source's files: which are found, which are refused, and when a source has changed."""

import glob
import json
import os
import sysconfig
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from source_reading import error_of, read, splits_of, write_file, write_parquet

from manta.data.errors import InputError
from manta.data.source_config import SourceConfig
from manta.data.sources import splits
from manta.data.sources.source import holds_token_files, identity, source_files, validation_source
from manta.data.storage.store import open_store

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
    assert error_of(write_file(tmp_path / "x.csv", b"x")).endswith("got .csv. Convert it, or name its folder as hf:FOLDER.")
    assert error_of(write_file(tmp_path / "x.tar.gz", b"x")).endswith("got .tar. Unpack or convert it, or set the source's format.")
    assert error_of(write_file(tmp_path / "x.TGZ", b"x")).endswith("got .tgz. Unpack or convert it, or set the source's format.")
    (tmp_path / "empty.jsonl").unlink()
    assert f"got none of them (skipped 5 files by format, first {tmp_path}/x.TGZ). Name a file" in error_of(tmp_path)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A directory with a file, beside a file and a folder that are not in it."""
    write_file(tmp_path / "secret.txt", b"a secret")
    write_file(tmp_path / "private" / "key.txt", b"another secret")
    write_file(tmp_path / "corpus" / "text" / "a.txt", b"text")
    return tmp_path / "corpus"


@pytest.mark.parametrize("link", ["text/b.txt", "text/b", "b"])
def test_no_link_leads_out_of_a_directory_or_a_glob(corpus, link):
    target = corpus.parent / ("secret.txt" if link.endswith(".txt") else "private")
    (corpus / link).symlink_to(os.path.relpath(target, (corpus / link).parent))
    message = f"{corpus / link}: expected a link that stays in {corpus}, got one to {target}, which is not read. Name {target} in"
    for path in (corpus, corpus / "**", corpus / "**" / "*.txt", f"file://{corpus}", f"hf:{corpus}"):
        assert error_of(path).startswith(message), path
    (corpus.parent / "other").symlink_to(corpus)  # a link that the user names
    assert message.removeprefix(str(corpus)) in error_of(corpus.parent / "other")


def test_links_inside_of_a_directory_and_links_that_the_user_names_are_followed(corpus):
    (corpus / "z.txt").symlink_to("text/a.txt")
    (corpus.parent / "other").symlink_to(corpus)
    (corpus.parent / "named.txt").symlink_to("secret.txt")
    assert read(corpus) == read(corpus.parent / "other" / "**" / "*.txt") == ["text", "text"]
    (corpus / "loop").symlink_to(".")
    assert read(corpus) == read(corpus / "**" / "*.txt") == ["text", "text"]
    assert read(corpus.parent / "named.txt") == ["a secret"]
    assert read(corpus.parent / "*.txt") == ["a secret", "a secret"]


def test_many_links_to_a_parent_cost_nothing(corpus):
    for number in range(5):
        (corpus / f"loop{number}").symlink_to(".")
    for path in (corpus, corpus / "**", corpus / "**" / "**" / "*.txt", corpus / "*" / "*" / "*.txt", corpus / "*" / "*" / "*" / "*.txt"):
        assert read(path) == ["text"], path


PATTERNS = "* *.txt ** **/*.txt */** **/a/* a/**/b/* [ab]/* a*/? .* .h/* **/.h x/* a.txt/* none/* none/**/x a/b/c.txt"


@pytest.mark.parametrize("pattern", PATTERNS.split())
def test_globs_match_what_glob_matches(tmp_path, monkeypatch, pattern):
    for name in ("a.txt", ".h/a.txt", "a/a.txt", "a/b/c.txt", "a/b/a/b/d.txt", "a/.h", "b/x", "b/site-packages/y.txt", "ab/c"):
        write_file(tmp_path / name, b"x")
    monkeypatch.chdir(tmp_path)
    for path in (pattern, f"{tmp_path}/{pattern}", f"./a/../{pattern}"):
        found = glob.glob(path, recursive=True)  # noqa: PTH207
        expected = sorted(str(Path(match)) for match in found if Path(match).is_file())
        assert list(open_store(path).find().files) == expected


def test_a_snapshot_in_the_cache_of_hugging_face_is_read(tmp_path):
    repository = tmp_path / "datasets--owner--name"
    write_file(repository / "blobs" / "0123", b"text")
    link = repository / "snapshots" / "4567" / "data" / "train.txt"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../../blobs/0123")
    assert read(link.parent.parent) == read(link.parent / "*.txt") == ["text"]
    (link.parent / "x.txt").symlink_to(write_file(tmp_path / "secret", b"a secret"))
    assert f"expected a link that stays in {repository}, got one to {tmp_path}/secret" in error_of(link.parent)


def test_what_is_no_regular_file_is_refused_and_never_opened(corpus):
    path = corpus / "b.txt"
    pipe = f"{path}: expected a regular file, got a named pipe. Remove it, or write its content to a file."
    for make, message in [
        (lambda: os.mkfifo(path), pipe),
        (lambda: path.symlink_to("/dev/zero"), "b.txt: expected a link that stays in"),
        (lambda: path.symlink_to("gone"), f"{path}: expected a file, got a link to gone (No such file or directory). Restore that file,"),
        (lambda: path.symlink_to("b.txt"), f"{path}: expected a file, got a link to b.txt (Too many levels of symbolic links)."),
    ]:
        make()
        for source in (corpus, corpus / "*.txt", f"hf:{corpus}"):
            assert message in error_of(source)
        named = message if "stays in" not in message else f"{path}: expected a regular file, got a device. Remove it"
        assert named in error_of(path)
        path.unlink()
    write_parquet(corpus / "x.parquet", text=["a"])
    (corpus / "x.parquet").rename(corpus / "\udcff.parquet")
    assert "expected a file name in UTF-8, which pyarrow needs, got another one. Rename it." in error_of(corpus)
    (corpus / "\udcff.parquet").rename(corpus / "a\nb.txt")
    assert error_of(corpus) == f"{corpus}/a\\nb.txt: expected a file name without line breaks, got one. Rename it."
    (corpus / "a\nb.txt").unlink()
    os.mkfifo(corpus / "notes")  # of no format: not a part of the source
    assert read(corpus) == ["text"]


def test_a_folder_with_wildcards_in_its_name_is_meant_if_it_exists(tmp_path):
    write_file(tmp_path / "[a]*" / "b?" / "x.txt", b"literal")
    write_file(tmp_path / "a1" / "b2" / "x.txt", b"matched")
    assert read(tmp_path / "[a]*" / "b?" / "*.txt") == read(tmp_path / "[a]*") == ["literal"]
    assert read(Path(glob.escape(str(tmp_path / "[a]*"))) / "**" / "*.txt") == ["literal"]
    assert read(tmp_path / "[a]?" / "b?" / "*.txt") == ["matched"]


def test_a_file_without_read_access_is_refused():
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        path = write_file(Path(home, "x.jsonl"), LINES)
        inner = write_file(Path(home, "locked", "x.jsonl"), LINES)
        write_file(Path(home, "locked", "sub", "x.jsonl"), LINES)
        Path(path).chmod(0)
        Path(inner).parent.chmod(0)
        try:
            with as_unprivileged_user():
                assert error_of(path).startswith(f"{path}: expected read access, got PermissionError")
                assert error_of(inner).startswith(f"{inner}: expected read access, got PermissionError")
                for path in (home, f"{home}/**/*.jsonl", f"{home}/locked/*.jsonl", f"{home}/*/x.jsonl", f"{home}/*/*/x.jsonl"):
                    assert error_of(path).startswith(f"{path}: expected read access, got PermissionError")  # it is not skipped
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
