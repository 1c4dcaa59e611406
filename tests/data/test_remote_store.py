"""Files in object stores: an S3 server on loopback, connections that break, and other stores that fsspec knows."""

import gzip
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest
from object_store import content

from manta.data.errors import InputError
from manta.data.storage import remote
from manta.data.storage.location import join, local_path
from manta.data.storage.remote import RemoteStore
from manta.data.storage.store import open_store

pytest_plugins = ["object_store_fixtures"]
pytestmark = pytest.mark.usefixtures("proxy")


def stat(url):
    return open_store(url).stat()


def read(url):
    return open_store(url).read()


def list_all(url):
    return RemoteStore(url).list()


def copy_to(url, path):
    path.write_bytes(open_store(url).read())


def test_a_store_that_stays_unavailable_is_an_error_within_seconds(store, proxy):
    url = store.put("down.bin", content("down.bin"))
    proxy.refuse("down.bin", status=500, times=100)
    for request in (stat, list_all, lambda url: open_store(url).write("", b"x")):
        before = proxy.requests
        with pytest.raises(OSError, match="5 tries failed"):
            request(url)
        assert proxy.requests == before + 5


def test_an_unreachable_store_is_an_error_within_seconds(store_environment):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        unused_port = taken.getsockname()[1]
    store_environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{unused_port}")
    start = time.monotonic()
    with pytest.raises(OSError, match=r"^s3://corpus/x: 5 tries failed, the last with EndpointConnectionError: Could not connect"):
        open_store("s3://corpus/x").exists()
    assert time.monotonic() - start < 5


def test_a_forked_child_opens_its_own_connections(store, tmp_path):
    url = store.put("forked.bin", content("forked.bin"))
    assert open_store(url).exists()
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=copy_to, args=(url, tmp_path / str(index))) for index in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert open_store(url).read() == content("forked.bin")
    assert (tmp_path / "1").read_bytes() == content("forked.bin")


def test_an_object_is_written_read_and_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 30_000)
    url = join("s3://corpus/written/", "deep/a.bin")
    assert url == "s3://corpus/written/deep/a.bin"
    assert not open_store(url).exists()
    open_store(url).write("", content("a"))
    (tmp_path / "b.bin").write_bytes(content("b"))
    open_store(join("s3://corpus/written", "b.bin")).upload(tmp_path / "b.bin", "")
    assert open_store(url).exists()
    assert open_store("s3://corpus/written").exists()
    assert open_store(url).stat().size == 100_000
    assert open_store(url).read() == content("a")
    assert open_store("s3://corpus/written/b.bin").read() == content("b")
    open_store(url).write("", b"")  # listings are not cached
    assert open_store(url).stat().size == 0
    assert open_store(url).read() == b""
    for _ in range(2):
        open_store(url).delete()
        assert not open_store(url).exists()
    with pytest.raises(FileNotFoundError, match=r"none\.bin"):
        open_store(url).upload(tmp_path / "none.bin", "")


def test_a_large_file_is_uploaded_in_parts(store, proxy, tmp_path):
    with (tmp_path / "large.bin").open("wb") as stream:
        stream.truncate(110_000_000)
        stream.write(b"start")
    open_store("s3://corpus/large.bin").upload(tmp_path / "large.bin", "")
    assert open_store("s3://corpus/large.bin").stat().size == 110_000_000
    with open_store("s3://corpus/large.bin").open() as stream:
        assert stream.read(6) == b"start\0"
        assert proxy.gets["large.bin"] == 1
    store.delete("large.bin")


def test_a_stream_seeks_and_survives_cut_connections(store, proxy, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 30_000)
    body = content("stream")
    url = store.put("stream.bin", body)
    proxy.cut("stream.bin", at=45_000, times=2)
    with open_store(url).open() as stream:
        assert stream.read(10) == body[:10]
        assert stream.read() == body[10:]
        assert stream.read() == b""
        stream.seek(-7, os.SEEK_END)
        assert stream.tell() == 99_993
        assert stream.read(100) == body[-7:]
        stream.seek(50_000)
        assert stream.read(3) == body[50_000:50_003]
        with pytest.raises(ValueError, match="seek"):
            stream.seek(-1)
    assert proxy.gets["stream.bin"] == 4 + 2 + 2
    lines = "".join(f"line {index}\n" for index in range(20_000))
    packed = store.put("lines.txt.gz", gzip.compress(lines.encode()))
    with open_store(packed).open(size=open_store(packed).stat().size) as stream, gzip.open(stream, "rt") as text:
        assert text.read() == lines


def test_an_object_that_shrinks_while_it_is_read_is_an_error(store, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 30_000)
    url = store.put("shrinks.bin", content("shrinks"))
    with open_store(url).open() as stream:
        stream.read(10)
        store.put("shrinks.bin", content("shrinks")[:40_000])
        with pytest.raises(OSError, match=r"s3://corpus/shrinks.bin: expected 100000 bytes, got 40000; it changed"):
            stream.read()


def test_list_returns_an_object_a_directory_or_a_glob(store):
    for key in ("list/b.jsonl", "list/a.jsonl", "list/deep/c.jsonl", "list/deep/d.txt", "listed-not/e.jsonl"):
        store.put(key, content(key, 10))
    store.put("list/", b"")  # what consoles write for a directory

    def urls(url):
        return [found.path.removeprefix("s3://corpus/") for found in RemoteStore(url).list()]

    assert urls("s3://corpus/list") == urls("s3://corpus/list/") == ["list/a.jsonl", "list/b.jsonl", "list/deep/c.jsonl", "list/deep/d.txt"]
    assert urls("s3://corpus/list/*.jsonl") == ["list/a.jsonl", "list/b.jsonl"]
    assert urls("s3://corpus/list/**/*.jsonl") == ["list/a.jsonl", "list/b.jsonl", "list/deep/c.jsonl"]
    assert urls("s3://corpus/list*/[ab].jsonl") == ["list/a.jsonl", "list/b.jsonl"]
    assert urls("s3://corpus/list/a.jsonl") == ["list/a.jsonl"]
    (before,) = RemoteStore("s3://corpus/list/a.jsonl").list()
    assert before.size == 10
    assert RemoteStore("s3://corpus/list/a*").list()[0] == before  # the same version, however it was found
    store.put("list/a.jsonl", content("another", 10))
    assert RemoteStore("s3://corpus/list/a*").list()[0].version != before.version != ""
    for missing in ("s3://corpus/none", "s3://corpus/none/*.txt", "s3://no-such-bucket", "s3://no-such-bucket/*.txt"):
        assert RemoteStore(missing).list() == []


def test_a_missing_object_or_bucket_is_not_retried(store, proxy):
    before = proxy.requests
    for url in ("s3://corpus/none.bin", "s3://no-such-bucket/x.bin"):
        for request in (stat, read, lambda url: open_store(url).open(), lambda url: list(open_store(url).blocks(5))):
            with pytest.raises(FileNotFoundError, match="no such object, or no such bucket") as error:
                request(url)
            assert url in str(error.value)
        assert not open_store(url).exists()
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        open_store("s3://no-such-bucket/x.bin").write("", b"x")
    assert proxy.requests < before + 30  # none was retried
    store.put("below/x.bin", b"x")
    with pytest.raises(FileNotFoundError, match="no such object, only others below it"):
        open_store("s3://corpus/below").stat()


def test_a_wrong_key_is_not_retried_and_not_shown(store, proxy, caplog):
    caplog.set_level(logging.DEBUG, logger="manta")
    url = store.put("locked.bin", b"x")
    store.check_keys(on=True)
    try:
        requests = (lambda url: open_store(url).exists(), stat, read, list_all, lambda url: open_store(url).write("", b""))
        messages = []
        for request in requests:
            before = proxy.requests
            with pytest.raises(InputError, match=r"^s3://corpus/locked.bin: no access \(.*\)\. Set AWS_") as error:
                request(url)
            assert proxy.requests <= before + 2
            messages.append(str(error.value))
    finally:
        store.check_keys(on=False)
    assert open_store(url).exists()
    for value in (proxy.environment["AWS_ACCESS_KEY_ID"], proxy.environment["AWS_SECRET_ACCESS_KEY"]):
        assert all(value not in message for message in (*messages, caplog.text))


def test_missing_credentials_are_reported(store_environment):
    store_environment(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    with pytest.raises(InputError, match=r"no access \(NoCredentialsError: .*Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_store("s3://corpus/x").read()


def test_an_error_that_repeats_a_secret_does_not_show_it(store_environment):
    store_environment(AWS_SESSION_TOKEN="tok-en-that-is-secret", AWS_ENDPOINT_URL="http://tok-en-that-is-secret.invalid:1")
    with pytest.raises(OSError, match=r"\$AWS_SESSION_TOKEN") as error:
        open_store("s3://corpus/x").read()
    assert "is-secret" not in str(error.value)
    with pytest.raises(InputError, match="expected no password in the URL") as error:
        open_store("ftp://user:hunter2@example.invalid/file").exists()
    assert "hunter2" not in str(error.value)


def test_unknown_schemes_missing_packages_and_malformed_urls_are_refused():
    with pytest.raises(
        InputError, match=r"^s3://Bad Bucket/x: expected a URL that its store can read, got ParamValidationError: .*Fix the URL\.$"
    ):
        open_store("s3://Bad Bucket/x").write("", b"")
    with pytest.raises(InputError, match=r"^s5://corpus/x: expected a scheme that fsspec knows, such as s3://, got s5://"):
        open_store("s5://corpus/x").read()
    with pytest.raises(InputError, match=r"^oss://corpus/x: the package for oss:// is not installed; .*ossfs"):
        open_store("oss://corpus/x").read()
    script = "import sys; sys.modules['s3fs'] = None; from manta.data.storage.store import open_store; open_store('s3://corpus/x').exists()"
    failed = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False, timeout=20)
    assert (
        failed.stderr.splitlines()[-1].removeprefix("manta.data.errors.InputError: ")
        == "s3://corpus/x: the package for s3:// is not installed; pip install 'manta[s3]'"
    )


def test_a_store_that_serves_no_ranges_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x.bin").write_bytes(content("whole"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            port = server.stdout.readline().partition(" port ")[2].split()[0]
            url = f"http://127.0.0.1:{port}/x.bin"
            assert open_store(url).stat().size == 100_000
            assert open_store(url).read() == content("whole")
            monkeypatch.setattr(remote, "BLOCK", 30_000)
            with pytest.raises(InputError, match="expected a store that serves ranges, got the whole object"):
                open_store(url).read()
            with pytest.raises(FileNotFoundError, match=r"y\.bin"):
                open_store(f"http://127.0.0.1:{port}/y.bin").read()
        finally:
            server.kill()
    with pytest.raises(OSError, match="5 tries failed, the last with Client"):  # not reported as missing
        open_store(url).exists()


def test_any_fsspec_store_is_written_read_and_listed():
    url = join("memory://root", "below/x.txt")
    open_store(url).write("", b"text")
    assert open_store(url).read() == b"text"
    assert [found.size for found in RemoteStore("memory://root").list()] == [4]
    assert RemoteStore("memory://root/*/*.txt").list() == RemoteStore("memory://root").list() == RemoteStore(url).list()
    assert RemoteStore(url).list()[0].version


@pytest.mark.parametrize("root", ["a directory", "memory://a-store", "s3://corpus/a-store"])
def test_local_and_remote_stores_behave_alike(root, tmp_path):
    store = open_store(root if "://" in root else tmp_path / root)
    assert store.is_local == ("://" not in root)
    store.create()
    store.check_writable("data.directory")
    assert not store.exists("x")
    for read in (store.read, store.stat, store.open, lambda name: list(store.blocks(4, name))):
        with pytest.raises(FileNotFoundError):
            read("x")
    store.write("x", b"old")
    store.write("x", b"0123456789")
    assert store.exists("x")
    assert store.read("x") == open_store(store.location("x")).read() == b"0123456789"
    assert (store.stat("x").path, store.stat("x").size) == (store.location("x"), 10)
    assert b"".join(map(bytes, store.blocks(4, "x"))) == b"0123"
    assert b"".join(map(bytes, store.blocks(99, "x"))) == b"0123456789"
    buffer = bytearray(4)
    with store.open_ranges("x") as read_into:
        assert read_into(2, memoryview(buffer)) == 4
        assert buffer == b"2345"
        assert read_into(8, memoryview(buffer)) == 2
        assert buffer == b"8945"
    with store.open("x") as stream:
        stream.seek(7)
        assert stream.read() == b"789"
    store.write_parts("deep/y", lambda: iter([memoryview(b"one"), memoryview(b"two")]))
    assert store.read("deep/y") == b"onetwo"
    with store.staging() as folder:
        (folder / "z").write_bytes(b"staged")
    assert store.read("z") == b"staged"
    found = store.find()
    assert found.is_directory
    assert sorted(path.rpartition("a-store/")[2].rpartition("a directory/")[2] for path in found.files) == ["deep/y", "x", "z"]
    for _ in range(2):
        store.delete("x")
        assert not store.exists("x")


def test_only_urls_of_stores_are_remote():
    remotes = ("s3://bucket/x", "gs://b", "hf://datasets/a/b", "https://host/x", "S3://bucket", "memory://x")
    locals_ = ("x.txt", "/a/b", "stdlib:", "hf:name", "hf:/local", "file:///a/b", "C:\\x", "a://b"[1:], "dir/s3://x", "")
    assert [local_path(path) is None for path in remotes] == [True] * len(remotes)
    assert [local_path(path) is None for path in locals_] == [False] * len(locals_)
