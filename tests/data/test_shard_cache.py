"""A node's cache of remote files: each is downloaded once, complete and within the limit, whatever breaks."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import object_store
import pytest
import xxhash
from object_store import content
from small_disk import small_disk

from manta.data.errors import InputError
from manta.data.storage import cache, remote, remote_requests
from manta.data.storage.cache import CachedFile, ShardCache
from manta.data.storage.store import open_store

pytest_plugins = ["object_store_fixtures"]
pytestmark = pytest.mark.usefixtures("proxy")

UNLIMITED = 10**9


def put(store, key: str) -> CachedFile:
    """Put an object of 100,000 bytes."""
    body = content(key)
    return CachedFile(url=store.put(key, body), size=len(body), xxh3=xxhash.xxh3_64_hexdigest(body))


def fetch(cached: ShardCache, file: CachedFile) -> Path:
    with cached.hold(file) as path:
        return path


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def start_process(script: str, *arguments: object, **options) -> subprocess.Popen:
    script = "import sys; from pathlib import Path; from manta.data.storage.cache import ShardCache, CachedFile\n" + script
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


FILE = "CachedFile(url=sys.argv[2], size=int(sys.argv[3]), xxh3=sys.argv[4])"
FETCH = f"with ShardCache(Path(sys.argv[1]), 10**9).hold({FILE}) as path: print(path.read_bytes()[:0])"


def test_each_file_is_downloaded_once_and_then_read_without_the_store(store, store_environment, tmp_path):
    files = [put(store, f"cold/{index}.bin") for index in range(4)]
    with object_store.Proxy(store.port) as proxy:
        store_environment(**proxy.environment)
        cached = ShardCache(tmp_path / "cache", UNLIMITED)
        for file in (*files, *files):
            assert fetch(cached, file).read_bytes() == content(file.url.removeprefix("s3://corpus/"))
        assert proxy.gets == {f"cold/{index}.bin": 1 for index in range(4)}
        assert proxy.requests == 4
        assert [fetch(ShardCache(tmp_path / "cache", UNLIMITED), file).suffix for file in files] == [".bin"] * 4
        assert proxy.requests == 4
    with pytest.raises(OSError, match="tries failed"):  # the proxy is closed
        open_store(files[0].url).read()
    assert all(fetch(ShardCache(tmp_path / "cache", UNLIMITED), file).is_file() for file in files)


def test_a_cache_smaller_than_the_corpus_keeps_its_limit(store, proxy, tmp_path):
    files = [put(store, f"large/{index}.bin") for index in range(8)]
    cached = ShardCache(tmp_path, 350_000)
    (tmp_path / "mine.bin").write_bytes(b"not the cache's")
    for file in [*files, *reversed(files), *files[:3], files[0]]:
        assert fetch(cached, file).read_bytes() == content(file.url.removeprefix("s3://corpus/"))
        assert sum(path.stat().st_size for path in tmp_path.glob("*-*")) <= 350_000
    assert names_in(tmp_path) == sorted(["mine.bin", *(file.name for file in files[:3])])  # the last ones read
    assert proxy.gets["large/0.bin"] == 2


def test_the_least_recently_used_files_are_evicted_first(store, tmp_path):
    files = [put(store, f"recent/{index}.bin") for index in range(3)]
    cached = ShardCache(tmp_path, 200_000)
    for index in (0, 1, 0, 2):
        fetch(cached, files[index])
    assert names_in(tmp_path) == sorted([files[0].name, files[2].name])
    ShardCache(tmp_path, 100_000)  # a lower limit
    assert names_in(tmp_path) == [files[2].name]


def test_a_file_larger_than_the_limit_is_refused(store, tmp_path):
    file = put(store, "huge.bin")
    with pytest.raises(InputError, match=r"data.cache.bytes: expected at least 100000 for s3://corpus/huge.bin, got 99999\. Raise it\."):
        fetch(ShardCache(tmp_path, 99_999), file)
    assert names_in(tmp_path) == []


def test_a_held_file_is_not_evicted_and_an_evicted_file_stays_mapped(store, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PATIENCE", 0.3)
    first, second, third = (put(store, f"held/{index}.bin") for index in range(3))
    mine, others = ShardCache(tmp_path, 200_000), ShardCache(tmp_path, 200_000)
    with mine.hold(first) as path, fetch(mine, second).open("rb") as stream:
        fetch(others, third)
        assert names_in(tmp_path) == sorted([path.name, third.name])
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
        assert path.name in names_in(tmp_path)


def test_a_cut_connection_repeats_one_block(store, proxy, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remote, "BLOCK", 40_000)
    file = put(store, "cut.bin")
    proxy.cut("cut.bin", at=70_000, times=3)
    assert fetch(ShardCache(tmp_path, UNLIMITED), file).read_bytes() == content("cut.bin")
    assert proxy.ranges == ["bytes=0-39999", *["bytes=40000-79999"] * 4, "bytes=80000-99999"]
    assert [record.args[1] for record in caplog.records] == [1, 2, 3]  # the libraries do not retry as well


def test_a_bit_flipped_in_transit_is_downloaded_again(store, proxy, tmp_path, caplog):
    file = put(store, "flipped.bin")
    proxy.flip("flipped.bin", at=77_777, times=2)
    assert fetch(ShardCache(tmp_path, UNLIMITED), file).read_bytes() == content("flipped.bin")
    assert proxy.gets["flipped.bin"] == 3
    assert caplog.text.count(f"expected 100000 bytes of xxh3 {file.xxh3}") == 2


@pytest.mark.parametrize("damage", ["a flipped bit", "truncated", "longer"])
def test_a_damaged_object_is_refused_and_leaves_no_file(store, proxy, tmp_path, damage):
    file = put(store, "damaged.bin")
    body = bytearray(content("damaged.bin"))
    if damage == "a flipped bit":
        body[5] ^= 1
    body = body[:99_000] if damage == "truncated" else body
    store.put("damaged.bin", bytes(body))
    if damage == "longer":  # the expected bytes are there
        store.put("damaged.bin", bytes(body) + b"more")
        assert fetch(ShardCache(tmp_path, UNLIMITED), file).read_bytes() == body
        return
    with pytest.raises(InputError) as refused:
        fetch(ShardCache(tmp_path, UNLIMITED), file)
    got = f"{len(body)} bytes of xxh3 {xxhash.xxh3_64_hexdigest(bytes(body))}"
    problem = f"expected 100000 bytes of xxh3 {file.xxh3}, got {got}, 3 times"
    assert str(refused.value) == f"s3://corpus/damaged.bin: {problem}. Prepare the corpus again: the object is damaged."
    assert proxy.gets["damaged.bin"] == 3
    assert names_in(tmp_path) == []


def test_an_object_truncated_at_a_block_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 50_000)
    file = put(store, "short.bin")
    store.put("short.bin", content("short.bin")[:50_000])
    with pytest.raises(InputError, match=r"expected 100000 bytes of xxh3 .*, got 50000 bytes of xxh3"):
        fetch(ShardCache(tmp_path, UNLIMITED), file)


def test_requests_to_an_unavailable_store_are_retried_with_doubling_waits(store, proxy, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remote_requests, "WAIT", 0.05)
    file = put(store, "unavailable.bin")
    for status in (500, 503, 429, 502):
        proxy.refuse("unavailable.bin", status=status, times=1)
    start = time.monotonic()
    assert fetch(ShardCache(tmp_path, UNLIMITED), file).read_bytes() == content("unavailable.bin")
    assert 0.05 + 0.1 + 0.2 + 0.4 < time.monotonic() - start < 3
    assert proxy.gets["unavailable.bin"] == 5
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records] == [
        f"the next in {wait} s" for wait in (0.1, 0.1, 0.2, 0.4)
    ]


def test_a_download_from_a_store_that_stays_unavailable_leaves_no_file(store, proxy, tmp_path):
    file = put(store, "down.bin")
    proxy.refuse("down.bin", status=500, times=100)
    with pytest.raises(OSError, match=r"^s3://corpus/down.bin: 5 tries failed, the last with OSError: .*by the test$"):
        fetch(ShardCache(tmp_path, UNLIMITED), file)
    assert proxy.gets["down.bin"] == 5
    assert names_in(tmp_path) == []


def test_concurrent_processes_and_threads_share_one_download(store, proxy, tmp_path):
    files = [put(store, f"shared/{index}.bin") for index in range(3)]
    proxy.stall("shared/0.bin", at=50_000)
    script = (
        "cached = ShardCache(Path(sys.argv[1]), 10**9)\n"
        "for url, size, xxh3 in zip(*[iter(sys.argv[2:])] * 3):\n"
        "    with cached.hold(CachedFile(url=url, size=int(size), xxh3=xxh3)) as path:\n"
        "        assert path.stat().st_size == int(size)"
    )
    arguments = [part for file in files for part in (file.url, file.size, file.xxh3)]
    processes = [start_process(script, tmp_path, *arguments) for _ in range(2)]
    assert proxy.stalled.wait(20)
    cached = ShardCache(tmp_path, UNLIMITED)
    threads = [Thread(target=fetch, args=(cached, file)) for file in files for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(1)  # until the second process waits for the same object
    assert proxy.gets["shared/0.bin"] == 1
    proxy.resume()
    for thread in threads:
        thread.join()
    assert [process.communicate(timeout=30) for process in processes] == [("", "")] * 2
    assert proxy.gets == {f"shared/{index}.bin": 1 for index in range(3)}
    assert names_in(tmp_path) == sorted(file.name for file in files)


def test_a_waiting_process_takes_over_a_killed_download(store, proxy, tmp_path):
    awaited, other = put(store, "killed.bin"), put(store, "other.bin")
    for key in ("killed.bin", "other.bin"):
        proxy.stall(key, at=50_000)
    downloads = [start_process(FETCH, tmp_path, file.url, file.size, file.xxh3) for file in (awaited, other)]
    deadline = time.monotonic() + 20
    while proxy.gets.total() < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    cached = ShardCache(tmp_path, UNLIMITED)
    assert names_in(tmp_path) == sorted(f".{file.name}.tmp" for file in (awaited, other))  # kept: their processes are alive
    waits = Thread(target=fetch, args=(cached, awaited))
    waits.start()
    for process in reversed(downloads):
        process.send_signal(signal.SIGKILL)
        process.communicate()
    waits.join(20)
    assert (tmp_path / awaited.name).read_bytes() == content("killed.bin")
    assert names_in(tmp_path) == [awaited.name]  # the other temporary file was deleted
    proxy.resume()


def test_an_interrupted_process_leaves_no_temporary_file(store, proxy, tmp_path):
    file = put(store, "interrupted.bin")
    proxy.stall("interrupted.bin", at=50_000)
    process = start_process(FETCH, tmp_path, file.url, file.size, file.xxh3)
    assert proxy.stalled.wait(20)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    proxy.resume()
    assert names_in(tmp_path) == []


def test_a_truncated_file_in_the_cache_is_downloaded_again(store, proxy, tmp_path, caplog):
    file = put(store, "truncated.bin")
    cached = ShardCache(tmp_path, UNLIMITED)
    os.truncate(fetch(cached, file), 99_000)
    assert fetch(cached, file).read_bytes() == content("truncated.bin")
    damaged = bytearray(content("truncated.bin"))
    damaged[1] ^= 8
    (tmp_path / file.name).write_bytes(damaged)
    assert fetch(cached, file).read_bytes() == damaged, "trusted by name and size"
    assert proxy.gets["truncated.bin"] == 2
    assert "expected 100000 bytes, got 99000; it is downloaded again" in caplog.text


def test_prefetch_downloads_in_order_what_fits_and_drops_the_old_queue(store, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "DOWNLOADS", 1)
    files = [put(store, f"ahead/{index}.bin") for index in range(6)]
    cached = ShardCache(tmp_path, 300_000)
    fetch(cached, files[5])
    proxy.stall("ahead/0.bin", at=10)
    cached.prefetch(files[:2])
    assert proxy.stalled.wait(10)
    cached.prefetch([files[2], files[5], files[3]])  # 0 has started, 1 has not
    proxy.resume()
    assert holds_after_prefetch(cached, tmp_path, [files[2], files[5], files[3]])
    assert fetch(cached, files[3]).read_bytes() == content("ahead/3.bin")
    cached.prefetch(files)
    assert holds_after_prefetch(cached, tmp_path, files[:3])  # the limit
    assert proxy.gets == {f"ahead/{index}.bin": count for index, count in ((0, 2), (1, 1), (2, 1), (3, 1), (5, 1))}


def holds_after_prefetch(cached: ShardCache, directory: Path, files: list[CachedFile]) -> bool:
    deadline = time.monotonic() + 10
    while cached._workers and time.monotonic() < deadline:
        time.sleep(0.02)
    return names_in(directory) == sorted(file.name for file in files)


def test_an_error_in_prefetch_is_logged_and_raised_when_the_file_is_read(store, tmp_path, caplog):
    missing, later = put(store, "missing.bin"), put(store, "later.bin")
    store.delete("missing.bin")
    cached = ShardCache(tmp_path, UNLIMITED)
    cached.prefetch([missing, later])
    assert holds_after_prefetch(cached, tmp_path, [later])
    assert "prefetch: " in caplog.text
    with pytest.raises(FileNotFoundError, match=r"s3://corpus/missing\.bin"):
        fetch(cached, missing)


def test_a_process_exits_during_a_prefetch(store, proxy, tmp_path):
    file = put(store, "endless.bin")
    proxy.stall("endless.bin", at=50_000)
    script = f"ShardCache(Path(sys.argv[1]), 10**9).prefetch([{FILE}])\ninput()"
    process = start_process(script, tmp_path, file.url, file.size, file.xxh3, stdin=subprocess.PIPE)
    assert proxy.stalled.wait(20)
    start = time.monotonic()
    assert process.communicate("\n", timeout=20) == ("", "")
    assert time.monotonic() - start < 5
    assert process.returncode == 0


def test_a_full_disk_is_reported_with_path_and_bytes(store, tmp_path):
    file = put(store, "full.bin")
    script = "try:\n    " + FETCH + "\nexcept OSError as error:\n    print(error.errno, error)"
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))}
    output, errors = start_process(script, tmp_path, file.url, file.size, file.xxh3, **limited).communicate(timeout=20)
    assert errors == ""
    problem = "no space for the 100000 bytes of s3://corpus/full.bin. Free some, or lower data.cache.bytes."
    assert f"{problem}: '{tmp_path / file.name}'" in output
    assert names_in(tmp_path) == []


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_disk_smaller_than_the_limit_evicts_older_files(store, tmp_path, caplog):
    files = [put(store, f"small/{index}.bin") for index in range(5)]
    with small_disk(tmp_path / "disk", "size=260k") as disk:
        cached = ShardCache(disk.path, UNLIMITED)
        for file in files:
            assert fetch(cached, file).read_bytes() == content(file.url.removeprefix("s3://corpus/"))
        assert files[-1].name in names_in(disk.path)
        assert len(names_in(disk.path)) == 2
    assert caplog.text.count("less than data.cache.bytes fit") == 1


def test_a_cache_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^data.cache.directory: expected a directory on a local disk .*, got .*/file \(.*\)\."):
        ShardCache(tmp_path / "file", UNLIMITED)
    with pytest.raises(InputError, match=r"^data.cache.directory: expected a directory .*, got /proc/"):
        ShardCache(Path("/proc/cache"), UNLIMITED)
