"""Files in an object store, and a node's cache of them: each once, whole, within its limit, whatever breaks."""

import gzip
import logging
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import object_store
import pytest
import xxhash

from manta.data.errors import InputError
from manta.data.storage import cache, remote, remote_requests
from manta.data.storage.cache import CachedFile, ShardCache
from manta.data.storage.location import join, local_path
from manta.data.storage.remote import RemoteStore
from manta.data.storage.store import open_store

PLENTY = 10**9


@pytest.fixture(scope="module")
def store():
    with object_store.ObjectStore() as store:
        yield store


@pytest.fixture(scope="module")
def everyones(store):
    with object_store.Proxy(store.port) as proxy:
        yield proxy
        object_store.forget()


@pytest.fixture(autouse=True)
def proxy(everyones, monkeypatch):
    """Whatever a test asks of the store goes through this."""
    everyones.reset()
    for name, value in everyones.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_requests, "WAIT", 0.01)
    return everyones


@pytest.fixture
def elsewhere(monkeypatch):
    """Sets and unsets what tells of a store, so that the next request goes by that."""

    def go(**environment):
        object_store.forget()
        for name, value in environment.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)

    yield go
    object_store.forget()


def content(seed, size=100_000):
    return random.Random(seed).randbytes(size)


def file(store, key, seed=None, size=100_000):
    """An object, and what the cache has to know of it."""
    body = content(seed or key, size)
    return CachedFile(url=store.put(key, body), size=len(body), xxh3=xxhash.xxh3_64_hexdigest(body))


def fetch(cached, file, **options):
    return cached.fetch(file, **options)


def files_in(directory):
    return sorted(path.name for path in directory.iterdir())


def stat(url):
    return open_store(url).stat()


def read(url):
    return open_store(url).read()


def list_all(url):
    return RemoteStore(url).list()


def python(script, *arguments, **options):
    """Another process, with the same environment."""
    script = (
        "import sys; from pathlib import Path; from manta.data.storage.cache import ShardCache, CachedFile\n"
        "from manta.data.storage.store import open_store\n" + script
    )
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


FILE = "CachedFile(url=sys.argv[2], size=int(sys.argv[3]), xxh3=sys.argv[4])"
FETCH = f"print(ShardCache(Path(sys.argv[1]), 10**9).fetch({FILE}).read_bytes()[:0])"


def test_each_object_is_downloaded_once_and_found_again_without_a_store(store, elsewhere, tmp_path):
    files = [file(store, f"cold/{index}.bin") for index in range(4)]
    with object_store.Proxy(store.port) as proxy:
        elsewhere(**proxy.environment)
        cached = ShardCache(tmp_path / "cache", PLENTY)
        for each in (*files, *files):
            assert fetch(cached, each).read_bytes() == content(each.url.removeprefix("s3://corpus/"))
        assert proxy.gets == {f"cold/{index}.bin": 1 for index in range(4)}
        assert proxy.requests == 4
        assert [fetch(ShardCache(tmp_path / "cache", PLENTY), each).suffix for each in files] == [".bin"] * 4
        assert proxy.requests == 4
    with pytest.raises(OSError, match="tries failed"):  # nobody is there any more
        open_store(files[0].url).read()
    assert all(fetch(ShardCache(tmp_path / "cache", PLENTY), each).is_file() for each in files)


def test_a_cache_smaller_than_the_corpus_keeps_its_limit_and_still_reads_right(store, proxy, tmp_path):
    files = [file(store, f"large/{index}.bin") for index in range(8)]
    cached = ShardCache(tmp_path, 350_000)
    (tmp_path / "mine.bin").write_bytes(b"not the cache's")
    for each in [*files, *reversed(files), *files[:3], files[0]]:
        assert fetch(cached, each).read_bytes() == content(each.url.removeprefix("s3://corpus/"))
        assert sum(path.stat().st_size for path in tmp_path.glob("*-*")) <= 350_000
    assert files_in(tmp_path) == sorted(["mine.bin", *(each.name for each in files[:3])])  # the ones read last
    assert proxy.gets["large/0.bin"] == 2


def test_the_least_recently_read_files_go_first(store, tmp_path):
    files = [file(store, f"recent/{index}.bin") for index in range(3)]
    cached = ShardCache(tmp_path, 200_000)
    for index in (0, 1, 0, 2):
        fetch(cached, files[index])
    assert files_in(tmp_path) == sorted([files[0].name, files[2].name])
    ShardCache(tmp_path, 100_000)  # the limit has come down
    assert files_in(tmp_path) == [files[2].name]


def test_a_file_larger_than_the_limit_is_told_with_the_limit_it_wants(store, tmp_path):
    each = file(store, "huge.bin")
    with pytest.raises(InputError, match=r"data.cache.bytes: expected at least 100000 for s3://corpus/huge.bin, got 99999\. Raise it\."):
        fetch(ShardCache(tmp_path, 99_999), each)
    assert files_in(tmp_path) == []


def test_a_held_file_stays_and_an_evicted_one_stays_mapped(store, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PATIENCE", 0.3)
    first, second, third = (file(store, f"held/{index}.bin") for index in range(3))
    mine, others = ShardCache(tmp_path, 200_000), ShardCache(tmp_path, 200_000)
    with mine.hold(first) as path, fetch(mine, second).open("rb") as stream:
        fetch(others, third)
        assert files_in(tmp_path) == sorted([path.name, third.name])
        assert stream.read() == content("held/1.bin")
        with (
            others.hold(third),
            pytest.raises(InputError, match=r"data.cache.bytes: expected at least 300000: 200000 for files in use, .*; got 200000\."),
        ):
            fetch(others, second)
        releases = Thread(target=lambda: (time.sleep(0.1), fetch(mine, third)))
        releases.start()
        fetch(others, second)
        releases.join()
        assert path.name in files_in(tmp_path)


def test_a_cut_connection_costs_no_more_than_the_block_that_it_cut(store, proxy, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remote, "BLOCK", 40_000)
    each = file(store, "cut.bin")
    proxy.cut("cut.bin", at=70_000, times=3)
    assert fetch(ShardCache(tmp_path, PLENTY), each).read_bytes() == content("cut.bin")
    assert proxy.ranges == ["bytes=0-39999", *["bytes=40000-79999"] * 4, "bytes=80000-99999"]
    assert [record.args[1] for record in caplog.records] == [1, 2, 3]  # tries are counted here, and not below as well


def test_a_bit_flipped_on_the_way_is_noticed_and_mended(store, proxy, tmp_path, caplog):
    each = file(store, "flipped.bin")
    proxy.flip("flipped.bin", at=77_777, times=2)
    assert fetch(ShardCache(tmp_path, PLENTY), each).read_bytes() == content("flipped.bin")
    assert proxy.gets["flipped.bin"] == 3
    assert caplog.text.count(f"expected 100000 bytes of xxh3 {each.xxh3}") == 2


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "longer"])
def test_a_damaged_object_is_told_and_leaves_no_file(store, proxy, tmp_path, damage):
    each = file(store, "damaged.bin")
    body = bytearray(content("damaged.bin"))
    if damage == "a flipped bit":
        body[5] ^= 1
    body = body[:99_000] if damage == "cut short" else body
    store.put("damaged.bin", bytes(body))
    got = f"{len(body)} bytes of xxh3 {xxhash.xxh3_64_hexdigest(bytes(body))}"
    expected = f"expected 100000 bytes of xxh3 {each.xxh3}, got {got}, 3 times"
    if damage == "longer":  # what was asked for is there
        store.put("damaged.bin", bytes(body) + b"more")
        assert fetch(ShardCache(tmp_path, PLENTY), each).read_bytes() == body
        return
    with pytest.raises(InputError) as told:
        fetch(ShardCache(tmp_path, PLENTY), each)
    assert str(told.value) == f"s3://corpus/damaged.bin: {expected}. Prepare the corpus again: the object is damaged."
    assert proxy.gets["damaged.bin"] == 3
    assert files_in(tmp_path) == []


def test_an_object_that_ends_at_a_block_is_short_too(store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 50_000)
    each = file(store, "short.bin")
    store.put("short.bin", content("short.bin")[:50_000])
    with pytest.raises(InputError, match=r"expected 100000 bytes of xxh3 .*, got 50000 bytes of xxh3"):
        fetch(ShardCache(tmp_path, PLENTY), each)


def test_a_store_that_is_unwell_is_asked_again_after_doubling_waits(store, proxy, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remote_requests, "WAIT", 0.05)
    each = file(store, "unwell.bin")
    for status in (500, 503, 429, 502):
        proxy.refuse("unwell.bin", status=status, times=1)
    begin = time.monotonic()
    assert fetch(ShardCache(tmp_path, PLENTY), each).read_bytes() == content("unwell.bin")
    assert 0.05 + 0.1 + 0.2 + 0.4 < time.monotonic() - begin < 3
    assert proxy.gets["unwell.bin"] == 5
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records] == [
        f"the next in {wait} s" for wait in (0.1, 0.1, 0.2, 0.4)
    ]


def test_a_store_that_stays_unwell_is_an_error_within_seconds(store, proxy, tmp_path):
    each = file(store, "down.bin")
    proxy.refuse("down.bin", status=500, times=100)
    with pytest.raises(OSError, match=r"^s3://corpus/down.bin: 5 tries failed, the last with OSError: .*told to$"):
        fetch(ShardCache(tmp_path, PLENTY), each)
    assert proxy.gets["down.bin"] == 5
    assert files_in(tmp_path) == []
    for ask in (stat, list_all, lambda url: open_store(url).write("", b"x")):
        before = proxy.requests
        with pytest.raises(OSError, match="5 tries failed"):
            ask(each.url)
        assert proxy.requests == before + 5


def test_an_unreachable_store_is_an_error_within_seconds(elsewhere):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = taken.getsockname()[1]
    elsewhere(AWS_ENDPOINT_URL=f"http://127.0.0.1:{nobody}")
    begin = time.monotonic()
    with pytest.raises(OSError, match=r"^s3://corpus/x: 5 tries failed, the last with EndpointConnectionError: Could not connect"):
        open_store("s3://corpus/x").exists()
    assert time.monotonic() - begin < 5


def test_processes_and_threads_that_ask_at_once_share_one_download(store, proxy, tmp_path):
    files = [file(store, f"shared/{index}.bin") for index in range(3)]
    proxy.stall("shared/0.bin", at=50_000)
    script = (
        "cached = ShardCache(Path(sys.argv[1]), 10**9)\n"
        "for url, size, xxh3 in zip(*[iter(sys.argv[2:])] * 3):\n"
        "    assert cached.fetch(CachedFile(url=url, size=int(size), xxh3=xxh3)).stat().st_size == int(size)"
    )
    arguments = [part for each in files for part in (each.url, each.size, each.xxh3)]
    processes = [python(script, tmp_path, *arguments) for _ in range(2)]
    assert proxy.stalled.wait(20)
    cached = ShardCache(tmp_path, PLENTY)
    threads = [Thread(target=fetch, args=(cached, each)) for each in files for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(1)  # time for the second process to come to the same object, and wait
    assert proxy.gets["shared/0.bin"] == 1
    proxy.go()
    for thread in threads:
        thread.join()
    assert [process.communicate(timeout=30) for process in processes] == [("", "")] * 2
    assert proxy.gets == {f"shared/{index}.bin": 1 for index in range(3)}
    assert files_in(tmp_path) == sorted(each.name for each in files)


def test_a_killed_download_is_taken_over(store, proxy, tmp_path):
    each, other = file(store, "killed.bin"), file(store, "other.bin")
    for key in ("killed.bin", "other.bin"):
        proxy.stall(key, at=50_000)
    downloads = [python(FETCH, tmp_path, one.url, one.size, one.xxh3) for one in (each, other)]
    deadline = time.monotonic() + 20
    while proxy.gets.total() < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    cached = ShardCache(tmp_path, PLENTY)
    assert files_in(tmp_path) == sorted(f".{one.name}.tmp" for one in (each, other))  # they live: nobody removes them
    waits = Thread(target=fetch, args=(cached, each))
    waits.start()
    for process in reversed(downloads):
        process.send_signal(signal.SIGKILL)
        process.communicate()
    waits.join(20)
    assert (tmp_path / each.name).read_bytes() == content("killed.bin")
    assert files_in(tmp_path) == [each.name]  # what the other left went with the next count
    proxy.go()


def test_a_process_that_is_told_to_leave_leaves_no_temporary(store, proxy, tmp_path):
    each = file(store, "interrupted.bin")
    proxy.stall("interrupted.bin", at=50_000)
    process = python(FETCH, tmp_path, each.url, each.size, each.xxh3)
    assert proxy.stalled.wait(20)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    proxy.go()
    assert files_in(tmp_path) == []


def test_a_file_that_was_truncated_or_damaged_in_the_cache_is_replaced(store, proxy, tmp_path, caplog):
    each = file(store, "rotten.bin")
    cached = ShardCache(tmp_path, PLENTY)
    os.truncate(fetch(cached, each), 99_000)
    assert fetch(cached, each).read_bytes() == content("rotten.bin")
    damaged = bytearray(content("rotten.bin"))
    damaged[1] ^= 8
    (tmp_path / each.name).write_bytes(damaged)
    assert fetch(cached, each).read_bytes() == damaged  # trusted by name and size
    assert fetch(cached, each, verify=True).read_bytes() == content("rotten.bin")
    assert proxy.gets["rotten.bin"] == 3
    assert fetch(cached, each, verify=True)
    assert proxy.gets["rotten.bin"] == 3
    assert "expected 100000 bytes, got 99000; it is downloaded again" in caplog.text


def test_reading_ahead_fetches_in_order_what_fits_and_drops_what_is_no_longer_wanted(store, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "DOWNLOADS", 1)
    files = [file(store, f"ahead/{index}.bin") for index in range(6)]
    cached = ShardCache(tmp_path, 300_000)
    fetch(cached, files[5])
    proxy.stall("ahead/0.bin", at=10)
    cached.prefetch(files[:2])
    assert proxy.stalled.wait(10)
    cached.prefetch([files[2], files[5], files[3]])  # 0 has begun, 1 has not
    proxy.go()
    assert settled(cached, tmp_path, [files[2], files[5], files[3]])
    assert fetch(cached, files[3]).read_bytes() == content("ahead/3.bin")
    cached.prefetch(files)
    assert settled(cached, tmp_path, files[:3])  # as many as fit
    assert proxy.gets == {f"ahead/{index}.bin": count for index, count in ((0, 2), (1, 1), (2, 1), (3, 1), (5, 1))}


def settled(cached, directory, files):
    """Whether, once nothing is read ahead any more, these files are there."""
    deadline = time.monotonic() + 10
    while cached._workers and time.monotonic() < deadline:
        time.sleep(0.02)
    return files_in(directory) == sorted(each.name for each in files)


def test_an_error_in_reading_ahead_is_logged_and_shows_where_the_file_is_asked_for(store, tmp_path, caplog):
    each, after = file(store, "bad-ahead.bin"), file(store, "after.bin")
    store.delete("bad-ahead.bin")
    cached = ShardCache(tmp_path, PLENTY)
    cached.prefetch([each, after])
    assert settled(cached, tmp_path, [after])
    assert "prefetch: " in caplog.text
    with pytest.raises(FileNotFoundError, match=r"s3://corpus/bad-ahead\.bin"):
        fetch(cached, each)


def test_a_process_ends_though_it_reads_ahead(store, proxy, tmp_path):
    each = file(store, "endless.bin")
    proxy.stall("endless.bin", at=50_000)
    script = f"ShardCache(Path(sys.argv[1]), 10**9).prefetch([{FILE}])\ninput()"
    process = python(script, tmp_path, each.url, each.size, each.xxh3, stdin=subprocess.PIPE)
    assert proxy.stalled.wait(20)
    begin = time.monotonic()
    assert process.communicate("\n", timeout=20) == ("", "")
    assert time.monotonic() - begin < 5
    assert process.returncode == 0


def test_a_full_disk_is_told_with_path_and_bytes(store, tmp_path):
    each = file(store, "full.bin")
    script = "try:\n    " + FETCH + "\nexcept OSError as error:\n    print(error.errno, error)"
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))}
    told, errors = python(script, tmp_path, each.url, each.size, each.xxh3, **limited).communicate(timeout=20)
    assert errors == ""
    assert f"no space for the 100000 bytes of s3://corpus/full.bin. Free some, or lower data.cache.bytes.: '{tmp_path / each.name}'" in told
    assert files_in(tmp_path) == []


def test_a_directory_that_can_not_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^data.cache.directory: expected a directory on a local disk .*, got .*/file \(.*\)\."):
        ShardCache(tmp_path / "file", PLENTY)
    with pytest.raises(InputError, match=r"^data.cache.directory: expected a directory .*, got /proc/"):
        ShardCache(Path("/proc/cache"), PLENTY)


def test_a_forked_child_makes_connections_of_its_own(store, tmp_path):
    each = file(store, "forked.bin")
    assert open_store(each.url).exists()
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=fetch, args=(ShardCache(tmp_path / str(index), PLENTY), each)) for index in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert open_store(each.url).read() == content("forked.bin")
    assert (tmp_path / "1" / each.name).read_bytes() == content("forked.bin")


def test_what_is_written_is_read(tmp_path, monkeypatch):
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
    open_store(url).write("", b"")  # no listing is remembered
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
        stream.write(b"begin")
    open_store("s3://corpus/large.bin").upload(tmp_path / "large.bin", "")
    assert open_store("s3://corpus/large.bin").stat().size == 110_000_000
    with open_store("s3://corpus/large.bin").open() as stream:
        assert stream.read(6) == b"begin\0"
        assert proxy.gets["large.bin"] == 1
    store.delete("large.bin")


def test_a_stream_reads_seeks_and_survives_cut_connections(store, proxy, monkeypatch):
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


def test_a_listing_is_of_an_object_a_directory_or_a_glob(store):
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
    assert RemoteStore("s3://corpus/list/a*").list()[0] == before  # the same identity, however it was found
    store.put("list/a.jsonl", content("another", 10))
    assert RemoteStore("s3://corpus/list/a*").list()[0].version != before.version != ""
    for nothing in ("s3://corpus/none", "s3://corpus/none/*.txt", "s3://no-such-bucket", "s3://no-such-bucket/*.txt"):
        assert RemoteStore(nothing).list() == []


def test_what_is_missing_is_told_at_once(store, proxy):
    before = proxy.requests
    for url in ("s3://corpus/none.bin", "s3://no-such-bucket/x.bin"):
        for ask in (stat, read, lambda url: open_store(url).open(), lambda url: list(open_store(url).blocks(5))):
            with pytest.raises(FileNotFoundError, match="no such object, or no such bucket") as told:
                ask(url)
            assert url in str(told.value)
        assert not open_store(url).exists()
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        open_store("s3://no-such-bucket/x.bin").write("", b"x")
    assert proxy.requests < before + 30  # not one of them was tried twice
    store.put("below/x.bin", b"x")
    with pytest.raises(FileNotFoundError, match="no such object, only others below it"):
        open_store("s3://corpus/below").stat()


def test_a_wrong_key_is_told_at_once_and_not_shown(store, proxy, caplog):
    caplog.set_level(logging.DEBUG, logger="manta")
    url = store.put("locked.bin", b"x")
    store.check_keys(on=True)
    try:
        asks = (lambda url: open_store(url).exists(), stat, read, list_all, lambda url: open_store(url).write("", b""))
        messages = []
        for ask in asks:
            before = proxy.requests
            with pytest.raises(InputError, match=r"^s3://corpus/locked.bin: no access \(.*\)\. Set AWS_") as told:
                ask(url)
            assert proxy.requests <= before + 2
            messages.append(str(told.value))
    finally:
        store.check_keys(on=False)
    assert open_store(url).exists()
    for value in (proxy.environment["AWS_ACCESS_KEY_ID"], proxy.environment["AWS_SECRET_ACCESS_KEY"]):
        assert all(value not in message for message in (*messages, caplog.text))


def test_no_credentials_at_all_are_told(elsewhere):
    elsewhere(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    with pytest.raises(InputError, match=r"no access \(NoCredentialsError: .*Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_store("s3://corpus/x").read()


def test_a_secret_that_an_error_repeats_is_not_shown(elsewhere):
    elsewhere(AWS_SESSION_TOKEN="tok-en-that-nobody-sees", AWS_ENDPOINT_URL="http://tok-en-that-nobody-sees.invalid:1")
    with pytest.raises(OSError, match=r"\$AWS_SESSION_TOKEN") as told:
        open_store("s3://corpus/x").read()
    assert "nobody-sees" not in str(told.value)
    with pytest.raises(InputError, match="expected no password in the URL") as told:
        open_store("ftp://somebody:hunter2@example.invalid/file").exists()
    assert "hunter2" not in str(told.value)


def test_unknown_schemes_missing_packages_and_malformed_urls_are_told():
    with pytest.raises(
        InputError, match=r"^s3://Bad Bucket/x: expected a URL that its store can read, got ParamValidationError: .*Fix the URL\.$"
    ):
        open_store("s3://Bad Bucket/x").write("", b"")
    with pytest.raises(InputError, match=r"^s5://corpus/x: expected a scheme that fsspec knows, such as s3://, got s5://"):
        open_store("s5://corpus/x").read()
    with pytest.raises(InputError, match=r"^oss://corpus/x: the package for oss:// is not installed; .*ossfs"):
        open_store("oss://corpus/x").read()
    script = "sys.modules['s3fs'] = None\ntry:\n    open_store('s3://corpus/x').exists()\nexcept ValueError as error:\n    print(error)"
    told, errors = python(script).communicate(timeout=20)
    assert errors == ""
    assert told.strip() == "s3://corpus/x: the package for s3:// is not installed; pip install 'manta[s3]'"


def test_a_store_without_parts_is_refused_and_never_read_wrong(tmp_path, monkeypatch):
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
    with pytest.raises(OSError, match="5 tries failed, the last with Client"):  # and not that it is missing
        open_store(url).exists()


def test_any_store_is_written_read_and_listed():
    url = join("memory://here", "below/x.txt")
    open_store(url).write("", b"text")
    assert open_store(url).read() == b"text"
    assert [found.size for found in RemoteStore("memory://here").list()] == [4]
    assert RemoteStore("memory://here/*/*.txt").list() == RemoteStore("memory://here").list() == RemoteStore(url).list()
    assert RemoteStore(url).list()[0].version


def test_only_urls_of_stores_are_remote():
    remotes = ("s3://bucket/x", "gs://b", "hf://datasets/a/b", "https://host/x", "S3://bucket", "memory://x")
    locals_ = ("x.txt", "/a/b", "stdlib:", "hf:name", "hf:/local", "file:///a/b", "C:\\x", "a://b"[1:], "dir/s3://x", "")
    assert [local_path(path) is None for path in remotes] == [True] * len(remotes)
    assert [local_path(path) is None for path in locals_] == [False] * len(locals_)
