"""Sources by URL: on a web server, in a bucket, and in an in-memory store."""

import bz2
import functools
import gzip
import io
import json
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import object_store
import pytest
import zstandard
from source_reading import DOCUMENTS, error_of, locations, read, read_skipping, splits_of, write_arrow, write_file, write_parquet

from manta.data.source_config import SourceConfig
from manta.data.sources import splits
from manta.data.sources.source import holds_token_files, identity, source_files
from manta.data.storage import remote, remote_requests

LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()
LINE_NUMBERS = [f"line {line}" for line in range(1, len(DOCUMENTS) + 1)]


class Website:
    """A folder on a web server with ETags and range requests."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.requests: list[str] = []
        website = self

        class Handler(SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                pass

            def send_head(self):
                path = Path(self.translate_path(self.path))
                website.requests.append(f"{self.command} {path.name}")
                if not path.is_file():
                    return super().send_head()
                content = path.read_bytes()
                if path.name.startswith("secret"):
                    self.send_error(403)
                    return None
                ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
                first, end = (int(ranged[1]), int(ranged[2] or len(content)) + 1) if ranged else (0, len(content))
                self.send_response(206 if ranged else 200)
                self.send_header("ETag", f'"{hash(content):x}"')
                self.send_header("Content-Length", str(len(content[first:end])))
                self.end_headers()
                return io.BytesIO(content[first:end])

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(home)))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def website(tmp_path):
    with Website(tmp_path / "web") as website:
        website.home.mkdir()
        yield website


@pytest.fixture
def memory():
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


@pytest.fixture
def bucket(monkeypatch):
    with object_store.ObjectStore() as store, object_store.Proxy(store.port) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(remote_requests, "WAIT", 0.01)
        object_store.close_connections()
        yield store, proxy


def test_a_bucket_is_read_despite_broken_responses(bucket, tmp_path):
    store, proxy = bucket
    store.put("web/a.jsonl", LINES)
    store.put("web/b.jsonl.gz", gzip.compress(LINES))
    store.put("web/deep/c.parquet", Path(write_parquet(tmp_path / "c.parquet", text=DOCUMENTS)).read_bytes())
    store.put("web/deep/d.arrow", Path(write_arrow(tmp_path / "d.arrow", text=DOCUMENTS)).read_bytes())
    store.put("web/photo.png", b"\x89PNG")
    for key in ("web/a.jsonl", "web/b.jsonl.gz", "web/deep/c.parquet", "web/deep/d.arrow"):
        proxy.cut(key, at=50)
    rows = [f"row {row}" for row in range(1, 5)]
    expected = [
        *((f"web/{name}", LINE_NUMBERS) for name in ("a.jsonl", "b.jsonl.gz")),
        *((f"web/deep/{name}", rows) for name in ("c.parquet", "d.arrow")),
    ]
    for path in ("s3://corpus/web", "s3://corpus/web/", "s3://corpus/web/**"):
        if path.endswith("**"):
            store.delete("web/photo.png")
        assert read(path) == DOCUMENTS * 4
        assert locations(path) == [f"s3://corpus/{key}: {row}" for key, file_rows in expected for row in file_rows]
    assert read("s3://corpus/web/*.jsonl") == DOCUMENTS
    source = SourceConfig(path="s3://corpus/web/a.jsonl")
    before = identity(source)
    store.put("web/a.jsonl", LINES.replace(b"Guten", b"guten"))
    assert identity(source) != before
    store.put("web/empty.jsonl.gz", b"")
    assert "s3://corpus/web/empty.jsonl.gz: expected data, got an empty file" in error_of("s3://corpus/web")
    assert "no such files" in error_of("s3://corpus/other")
    assert "no such files" in error_of("s3://other/web")
    store.check_keys(on=True)
    assert "no access" in error_of("s3://corpus/web")


def test_files_of_every_format_are_read_from_a_web_server(website):
    home = website.home
    lines = {
        write_file(home / "x.jsonl", LINES): LINE_NUMBERS,
        write_file(home / "x.jsonl.gz", gzip.compress(LINES)): LINE_NUMBERS,
        write_file(home / "x.jsonl.zst", zstandard.compress(LINES)): LINE_NUMBERS,
        write_file(home / "x.jsonl.bz2", bz2.compress(LINES)): LINE_NUMBERS,
        write_parquet(home / "x.parquet", text=DOCUMENTS): [f"row {row}" for row in range(1, 5)],
        write_arrow(home / "x.arrow", text=DOCUMENTS): [f"row {row}" for row in range(1, 5)],
        write_arrow(home / "y.arrow", stream=True, text=DOCUMENTS): [f"row {row}" for row in range(1, 5)],
    }
    for path, expected in lines.items():
        url = f"{website.url}/{Path(path).name}"
        assert read(url) == DOCUMENTS
        assert locations(url) == [f"{url}: {row}" for row in expected]
    write_file(home / "x y.txt.gz", gzip.compress(b"one\ntwo"))
    assert read(f"{website.url}/x%20y.txt.gz") == ["one\ntwo"]
    assert read(f"{website.url}/x.jsonl?download=true") == DOCUMENTS


def test_directories_and_globs_on_a_web_server_are_sorted(website):
    for name, text in zip(("a.txt", "b.txt", "deep/c.txt", "deep/d.jsonl"), DOCUMENTS, strict=True):
        write_file(website.home / name, json.dumps({"text": text}).encode() if name.endswith("jsonl") else text.encode())
    write_file(website.home / "photo.png", b"\x89PNG")
    write_file(website.home / ".hidden.txt", b"hidden")
    assert read(f"{website.url}/") == [DOCUMENTS[3], *DOCUMENTS[:3]]  # text files share a split, which comes last
    assert read(f"{website.url}/deep/") == [DOCUMENTS[3], DOCUMENTS[2]]
    assert read(f"{website.url}/*.txt") == DOCUMENTS[:2]
    assert read(f"{website.url}/**/*.txt") == DOCUMENTS[:3]


def test_any_fsspec_store_is_read_like_a_disk(memory):
    for name, text in zip(("a.txt", "b.txt", "deep/c.txt", "deep/d.txt.gz"), DOCUMENTS, strict=True):
        memory.pipe_file(f"/web/{name}", gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    memory.pipe_file("/web/photo.png", b"\x89PNG")
    memory.pipe_file("/web/.hidden/x.txt", b"hidden")
    for url in ("memory://web", "memory:///web/"):
        assert read(url) == DOCUMENTS
    assert read("memory://web/*.txt") == DOCUMENTS[:2]
    assert read("memory://web/.hid*/*.txt") == ["hidden"]
    assert read("memory://web/a.txt") == DOCUMENTS[:1]
    assert "expected a known format" in error_of("memory://web/photo.png")
    assert "no such files" in error_of("memory://other")


def test_token_files_by_url_are_found(memory):
    for name in ("a.bin", "a.idx"):
        memory.pipe_file(f"/shards/{name}", b"\0\0")
    for path, keys in (("memory://shards", {}), ("memory://shards/a", {"format": "megatron"})):
        source = SourceConfig(path=path, **keys)
        assert holds_token_files(source)
        assert [Path(file.path).name for file in source_files(source)] == ["a.bin", "a.idx"]


def test_json_lines_by_url_are_split_by_bytes(website, monkeypatch):
    write_file(website.home / "x.jsonl", LINES * 3)
    monkeypatch.setattr(splits, "SPLIT_BYTES", 100)
    monkeypatch.setattr(remote, "BLOCK", 70)
    url = f"{website.url}/x.jsonl"
    assert len(splits_of(url)) == -(-len(LINES * 3) // 100)
    assert read(url) == DOCUMENTS * 3
    assert locations(url) == [f"{url}: line {line}" for line in range(1, 13)]


def test_parquet_by_url_is_split_by_row_groups(website, monkeypatch):
    write_parquet(website.home / "x.parquet", text=DOCUMENTS)
    monkeypatch.setattr(splits, "SPLIT_BYTES", 1)
    url = f"{website.url}/x.parquet"
    assert [split.groups for split in splits_of(url)] == [(0, 1), (1, 2)]
    assert read(url) == DOCUMENTS


def test_a_saved_dataset_is_recognized_by_url(memory, tmp_path):
    for name in ("state.json", "dataset_info.json"):
        memory.pipe_file(f"/saved/{name}", b"{}")
    memory.pipe_file("/saved/data-00000-of-00001.arrow", Path(write_arrow(tmp_path / "x.arrow", text=DOCUMENTS)).read_bytes())
    assert read("memory://saved") == DOCUMENTS


def test_a_bad_row_by_url_is_reported_or_skipped(website, monkeypatch):
    write_file(website.home / "x.jsonl", LINES + b"{}\n" + LINES)
    url = f"{website.url}/x.jsonl"
    message = f"{url}: line 5: expected a field 'text', got no fields. Set data.text_field."
    assert error_of(url) == message
    assert read_skipping(url) == ([*DOCUMENTS, *DOCUMENTS], [message])
    monkeypatch.setattr(splits, "SPLIT_BYTES", len(LINES))
    assert error_of(url).startswith(f"{url}: byte {len(LINES)}: expected a field 'text'")  # without downloading all lines before it


@pytest.mark.parametrize("bad_rows", ["fail", "skip"])
def test_a_missing_locked_or_truncated_file_by_url_is_refused(website, bad_rows):
    home, url = website.home, website.url
    write_file(home / "empty.jsonl", b"")
    write_file(home / "secret.jsonl", LINES)
    write_file(home / "cut.jsonl.gz", gzip.compress(LINES)[:-10])
    write_file(home / "cut.parquet", Path(write_parquet(home / "x.parquet", text=DOCUMENTS)).read_bytes()[:-40])
    write_file(home / "cut.arrow", Path(write_arrow(home / "x.arrow", text=DOCUMENTS)).read_bytes()[:-40])
    assert "no such files" in error_of(f"{url}/none.jsonl", bad_rows=bad_rows)
    assert f"{url}/empty.jsonl: expected data, got an empty file" in error_of(f"{url}/empty.jsonl", bad_rows=bad_rows)
    assert f"{url}/secret.jsonl: no access" in error_of(f"{url}/secret.jsonl", bad_rows=bad_rows)
    for name in ("cut.jsonl.gz", "cut.parquet", "cut.arrow"):
        assert error_of(f"{url}/{name}", bad_rows=bad_rows).startswith(f"{url}/{name}: ")
        assert error_of(f"{url}/{name}", bad_rows=bad_rows).endswith("Download it again.")
    assert "expected a scheme that fsspec knows, such as s3://, got nonsense://" in error_of("nonsense://x.jsonl", bad_rows=bad_rows)


def test_identity_of_a_url_changes_with_its_content(website):
    path = write_file(website.home / "x.jsonl", LINES)
    source = SourceConfig(path=f"{website.url}/x.jsonl")
    before = identity(source)
    assert identity(source) == before
    write_file(Path(path), LINES.replace(b"Guten", b"guten"))
    assert identity(source) != before


def test_identity_of_a_url_downloads_nothing(website):
    write_file(website.home / "x.txt", b"abc")
    source = SourceConfig(path=f"{website.url}/x.txt")
    identity(source)
    assert not holds_token_files(source)
    assert website.requests
    assert not [request for request in website.requests if request.startswith("GET")]
