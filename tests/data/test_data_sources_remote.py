"""Sources by URL: a web server, and a store in memory."""

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
from reading import DOCUMENTS, arrow, pieces, places, put, read, skipped, table, told

from manta.data.sources import splits
from manta.data.sources.config import SourceConfig
from manta.data.storage import remote

LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()
PLACES = [f"line {line}" for line in range(1, len(DOCUMENTS) + 1)]


class Website:
    """A folder on a web server, as servers are: it tells ETags and gives parts of files."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.asked: list[str] = []
        website = self

        class Handler(SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                pass

            def send_head(self):
                path = Path(self.translate_path(self.path))
                website.asked.append(f"{self.command} {path.name}")
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
        monkeypatch.setattr(remote, "WAIT", 0.01)
        object_store.forget()
        yield store, proxy


def test_a_bucket_is_read_as_a_disk_is_through_answers_that_break(bucket, tmp_path):
    store, proxy = bucket
    store.put("web/a.jsonl", LINES)
    store.put("web/b.jsonl.gz", gzip.compress(LINES))
    store.put("web/deep/c.parquet", Path(table(tmp_path / "c.parquet", text=DOCUMENTS)).read_bytes())
    store.put("web/deep/d.arrow", Path(arrow(tmp_path / "d.arrow", text=DOCUMENTS)).read_bytes())
    store.put("web/photo.png", b"\x89PNG")
    for key in ("web/a.jsonl", "web/b.jsonl.gz", "web/deep/c.parquet", "web/deep/d.arrow"):
        proxy.cut(key, at=50)
    rows = [f"row {row}" for row in range(1, 5)]
    expected = [
        *((f"web/{name}", PLACES) for name in ("a.jsonl", "b.jsonl.gz")),
        *((f"web/deep/{name}", rows) for name in ("c.parquet", "d.arrow")),
    ]
    for path in ("s3://corpus/web", "s3://corpus/web/", "s3://corpus/web/**"):
        if path.endswith("**"):
            store.delete("web/photo.png")
        assert read(path) == DOCUMENTS * 4
        assert places(path) == [f"s3://corpus/{key}: {place}" for key, of_file in expected for place in of_file]
    assert read("s3://corpus/web/*.jsonl") == DOCUMENTS
    source = SourceConfig(path="s3://corpus/web/a.jsonl")
    before = splits.identity(source)
    store.put("web/a.jsonl", LINES.replace(b"Guten", b"guten"))
    assert splits.identity(source) != before
    store.put("web/empty.jsonl", b"")
    assert "s3://corpus/web/empty.jsonl: empty file" in told("s3://corpus/web")
    assert "no such files" in told("s3://corpus/other")
    assert "no such files" in told("s3://other/web")
    store.check_keys(on=True)
    assert "no access" in told("s3://corpus/web")


def test_files_of_every_kind_are_read_from_a_web_server(website):
    home = website.home
    lines = {
        put(home / "x.jsonl", LINES): PLACES,
        put(home / "x.jsonl.gz", gzip.compress(LINES)): PLACES,
        put(home / "x.jsonl.zst", zstandard.compress(LINES)): PLACES,
        put(home / "x.jsonl.bz2", bz2.compress(LINES)): PLACES,
        table(home / "x.parquet", text=DOCUMENTS): [f"row {row}" for row in range(1, 5)],
        arrow(home / "x.arrow", text=DOCUMENTS): [f"row {row}" for row in range(1, 5)],
        arrow(home / "y.arrow", stream=True, text=DOCUMENTS): [f"row {row}" for row in range(1, 5)],
    }
    for path, expected in lines.items():
        url = f"{website.url}/{Path(path).name}"
        assert read(url) == DOCUMENTS
        assert places(url) == [f"{url}: {place}" for place in expected]
    put(home / "x y.txt.gz", gzip.compress(b"one\ntwo"))
    assert read(f"{website.url}/x%20y.txt.gz") == ["one\ntwo"]
    assert read(f"{website.url}/x.jsonl?download=true") == DOCUMENTS


def test_a_directory_and_a_glob_on_a_web_server_are_read_in_sorted_order(website):
    for name, text in zip(("a.txt", "b.txt", "deep/c.txt", "deep/d.jsonl"), DOCUMENTS, strict=True):
        put(website.home / name, json.dumps({"text": text}).encode() if name.endswith("jsonl") else text.encode())
    put(website.home / "photo.png", b"\x89PNG")
    put(website.home / ".hidden.txt", b"hidden")
    assert read(f"{website.url}/") == [DOCUMENTS[3], *DOCUMENTS[:3]]  # text travels together, and so after the lines
    assert read(f"{website.url}/deep/") == [DOCUMENTS[3], DOCUMENTS[2]]
    assert read(f"{website.url}/*.txt") == DOCUMENTS[:2]
    assert read(f"{website.url}/**/*.txt") == DOCUMENTS[:3]


def test_a_store_is_read_as_a_disk_is(memory):
    for name, text in zip(("a.txt", "b.txt", "deep/c.txt", "deep/d.txt.gz"), DOCUMENTS, strict=True):
        memory.pipe_file(f"/web/{name}", gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    memory.pipe_file("/web/photo.png", b"\x89PNG")
    memory.pipe_file("/web/.hidden/x.txt", b"hidden")
    for url in ("memory://web", "memory:///web/"):
        assert read(url) == DOCUMENTS
    assert read("memory://web/*.txt") == DOCUMENTS[:2]
    assert read("memory://web/.hid*/*.txt") == ["hidden"]
    assert read("memory://web/a.txt") == DOCUMENTS[:1]
    assert "unknown kind of file" in told("memory://web/photo.png")
    assert "no such files" in told("memory://other")


def test_token_shards_by_url_are_listed(memory):
    for name in ("a.bin", "a.idx"):
        memory.pipe_file(f"/shards/{name}", b"\0\0")
    for path, keys in (("memory://shards", {}), ("memory://shards/a", {"format": "megatron"})):
        source = SourceConfig(path=path, **keys)
        assert splits.is_tokens(source)
        assert [Path(file.path).name for file in splits.files(source)] == ["a.bin", "a.idx"]


def test_json_lines_by_url_are_shared_by_their_bytes(website, monkeypatch):
    put(website.home / "x.jsonl", LINES * 3)
    monkeypatch.setattr(splits, "PIECE", 100)
    monkeypatch.setattr(remote, "BLOCK", 70)
    url = f"{website.url}/x.jsonl"
    assert len(pieces(url)) == -(-len(LINES * 3) // 100)
    assert read(url) == DOCUMENTS * 3
    assert places(url) == [f"{url}: line {line}" for line in range(1, 13)]


def test_row_groups_by_url_are_shared(website, monkeypatch):
    table(website.home / "x.parquet", text=DOCUMENTS)
    monkeypatch.setattr(splits, "PIECE", 1)
    url = f"{website.url}/x.parquet"
    assert [piece.groups for piece in pieces(url)] == [(0, 1), (1, 2)]
    assert read(url) == DOCUMENTS


def test_a_dataset_saved_to_disk_is_known_by_url(memory, tmp_path):
    for name in ("state.json", "dataset_info.json"):
        memory.pipe_file(f"/saved/{name}", b"{}")
    memory.pipe_file("/saved/data-00000-of-00001.arrow", Path(arrow(tmp_path / "x.arrow", text=DOCUMENTS)).read_bytes())
    assert read("memory://saved") == DOCUMENTS


def test_a_bad_row_by_url_is_told_or_skipped(website, monkeypatch):
    put(website.home / "x.jsonl", LINES + b"{}\n" + LINES)
    url = f"{website.url}/x.jsonl"
    problem = f"{url}: line 5: no field 'text'; it has none; set data.text_field"
    assert told(url) == problem
    assert skipped(url) == ([*DOCUMENTS, *DOCUMENTS], [problem])
    monkeypatch.setattr(splits, "PIECE", len(LINES))
    assert told(url).startswith(f"{url}: byte {len(LINES)}: no field 'text'")  # lines before it are not fetched to be counted


@pytest.mark.parametrize("bad_rows", ["fail", "skip"])
def test_a_missing_empty_locked_or_truncated_file_by_url_is_told(website, bad_rows):
    home, url = website.home, website.url
    put(home / "empty.jsonl", b"")
    put(home / "secret.jsonl", LINES)
    put(home / "cut.jsonl.gz", gzip.compress(LINES)[:-10])
    put(home / "cut.parquet", Path(table(home / "x.parquet", text=DOCUMENTS)).read_bytes()[:-40])
    put(home / "cut.arrow", Path(arrow(home / "x.arrow", text=DOCUMENTS)).read_bytes()[:-40])
    assert "no such files" in told(f"{url}/none.jsonl", bad_rows=bad_rows)
    assert f"{url}/empty.jsonl: empty file" in told(f"{url}/empty.jsonl", bad_rows=bad_rows)
    assert f"{url}/secret.jsonl: no access" in told(f"{url}/secret.jsonl", bad_rows=bad_rows)
    for name in ("cut.jsonl.gz", "cut.parquet", "cut.arrow"):
        assert told(f"{url}/{name}", bad_rows=bad_rows).startswith(f"{url}/{name}: ")
        assert told(f"{url}/{name}", bad_rows=bad_rows).endswith("fetch it again")
    assert "got an unknown scheme nonsense://" in told("nonsense://x.jsonl", bad_rows=bad_rows)


def test_a_source_by_url_is_another_one_once_its_content_changes(website):
    path = put(website.home / "x.jsonl", LINES)
    source = SourceConfig(path=f"{website.url}/x.jsonl")
    before = splits.identity(source)
    assert splits.identity(source) == before
    put(Path(path), LINES.replace(b"Guten", b"guten"))
    assert splits.identity(source) != before


def test_a_file_by_url_is_fetched_only_when_it_is_read(website):
    put(website.home / "x.txt", b"abc")
    source = SourceConfig(path=f"{website.url}/x.txt")
    splits.identity(source)
    assert not splits.is_tokens(source)
    assert website.asked
    assert not [asked for asked in website.asked if asked.startswith("GET")]
