"""An S3 server on loopback, and a proxy before it that breaks answers the way networks and disks do.

The server is moto's, a process of its own; it ends with the one that started it. Everything a client needs to reach it is in `environment`.
"""

import gc
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR, socket
from typing import Literal, Self
from urllib.parse import unquote, urlsplit

BUCKET = "corpus"
PASSING = {"accept-encoding", "connection", "keep-alive", "transfer-encoding"}  # between neighbours, not end to end


class ObjectStore:
    """One bucket. `port` is the server's own; a test that wants answers broken or counted goes through a Proxy instead."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", __file__]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.port = int(self._server.stdout.readline())
        self.environment = environment(self.port)
        self._request("PUT", f"/{BUCKET}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.kill()
        self._server.communicate()
        forget()

    def put(self, key: str, content: bytes) -> str:
        """The URL of an object with this content."""
        self._request("PUT", f"/{BUCKET}/{key}", content)
        return url(key)

    def delete(self, key: str) -> None:
        self._request("DELETE", f"/{BUCKET}/{key}")

    def check_keys(self, *, on: bool) -> None:
        """Whether requests want the keys of a user that may read; nobody has any, so that all are turned away."""
        self._request("POST", "/moto-api/reset-auth", b"0" if on else json.dumps(float("inf")).encode())

    def _request(self, method: str, path: str, body: bytes | None = None) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {"Authorization": "AWS nobody:nothing"})  # asked for, and not looked at
            answer = connection.getresponse()
            told = answer.read()
            assert answer.status < 300, told
        finally:
            connection.close()


def forget() -> None:
    """Close connections to a store that is gone, or that the environment names no longer; a forked child that collects them would wait
    for their loop.
    """
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    gc.collect()


def url(key: str) -> str:
    return f"s3://{BUCKET}/{key}"


def environment(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


@dataclass
class Fault:
    """What happens to the next `times` answers that carry byte `at` of an object, or where it refuses, have status `at` instead."""

    kind: Literal["cut", "flip", "stall", "refuse"]
    at: int
    times: int


class Proxy:
    """Hands requests to a server and its answers back; counts GETs by object, and breaks what it is told to break."""

    def __init__(self, port: int) -> None:
        self.reset()
        self._guard = threading.Lock()
        self.connections: set[socket] = set()
        proxy = self

        class Handler(_Handler):
            behind = port
            front = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.environment = environment(self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def reset(self) -> None:
        self.gets: Counter[str] = Counter()
        self.requests = 0
        self.ranges: list[str | None] = []
        self.stalled = threading.Event()  # an answer has come to its stall
        self._go = threading.Event()
        self._faults: dict[str, list[Fault]] = {}
        self._hang_ups: list[Fault] = []
        self.hung_up = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._go.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        with self._guard:
            for connection in self.connections:
                connection.shutdown(SHUT_RDWR)

    def cut(self, key: str, *, at: int, times: int = 1) -> None:
        """The connection ends before byte `at`, though the answer has promised all of them."""
        self._faults.setdefault(key, []).append(Fault("cut", at, times))

    def flip(self, key: str, *, at: int, times: int = 1) -> None:
        """Byte `at` arrives with a bit changed."""
        self._faults.setdefault(key, []).append(Fault("flip", at, times))

    def stall(self, key: str, *, at: int) -> None:
        """The answer stands still before byte `at`, until go()."""
        self._faults.setdefault(key, []).append(Fault("stall", at, 1))

    def refuse(self, key: str, *, status: int, times: int) -> None:
        """Any request for the object, whatever its method, is answered by this status."""
        self._faults.setdefault(key, []).append(Fault("refuse", status, times))

    def hang_up(self, *, at: int, times: int) -> None:
        """The connection ends once byte `at` of an upload has come; the next `times` uploads that are so large."""
        self._hang_ups = [Fault("cut", at, times)]

    def go(self) -> None:
        self._go.set()

    def wait(self) -> None:
        self.stalled.set()
        self._go.wait(30)

    @contextmanager
    def open(self, connection: socket) -> Generator[None]:
        with self._guard:
            self.connections.add(connection)
        yield
        with self._guard:
            self.connections.remove(connection)

    def count(self, method: str, key: str, ranged: str | None) -> None:
        with self._guard:
            self.requests += 1
            if method == "GET" and key:
                self.gets[key] += 1
                self.ranges.append(ranged)

    def refusal(self, key: str) -> int | None:
        """The status that a request for the object is to get instead of an answer."""
        return fault.at if (fault := self._due(key, {"refuse"}, range(1000))) else None

    def hangs_up(self, size: int) -> int | None:
        """After how many bytes of an upload of this size the connection is to end."""
        with self._guard:
            for fault in self._hang_ups:
                if fault.times and size > fault.at:
                    fault.times -= 1
                    self.hung_up += 1
                    return fault.at
        return None

    def fault(self, key: str, carried: range) -> Fault | None:
        """What is to happen to an answer that carries these bytes of the object."""
        return self._due(key, {"cut", "flip", "stall"}, carried)

    def _due(self, key: str, kinds: set[str], places: range) -> Fault | None:
        with self._guard:
            for fault in self._faults.get(key, []):
                if fault.kind in kinds and fault.at in places and fault.times:
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else what follows the headers waits 40 ms for the client's word that it has them
    behind: int
    front: Proxy

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  as the base names it
        pass

    def handle(self) -> None:
        with self.front.open(self.connection), suppress(ConnectionError):  # clients are killed in these tests
            super().handle()

    def forward(self) -> None:
        key = unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}").lstrip("/")
        self.front.count(self.command, key, self.headers["Range"])
        size = int(self.headers["Content-Length"] or 0)
        if self.command == "PUT" and (at := self.front.hangs_up(size)) is not None:
            self.rfile.read(at)
            self.close_connection = True
            self.connection.shutdown(SHUT_RDWR)
            return
        body = self._body()
        if status := self.front.refusal(key):
            self._answer(status, [], b"<Error><Code>Unwell</Code><Message>told to</Message></Error>")
            return
        connection = HTTPConnection("127.0.0.1", self.behind, timeout=20)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in PASSING:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
        except ConnectionError:  # no server behind: to the client, a connection that ends
            self.close_connection = True
            return
        finally:
            connection.close()
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in PASSING | {"date", "server"}]
        begin = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        carried = range(begin, begin + len(content) if self.command == "GET" and answer.status < 300 else begin)
        self._answer(answer.status, headers, content, self.front.fault(key, carried), begin)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815  as the base names them

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, fault: Fault | None = None, begin: int = 0) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        at = fault.at - begin if fault else 0
        match fault and fault.kind:
            case "cut":
                self.wfile.write(content[:at])
                self.close_connection = True
            case "flip":
                self.wfile.write(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            case "stall":
                self.wfile.write(content[:at])
                self.front.wait()
                self.wfile.write(content[at:])
            case _:
                self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        raise NotImplementedError("a chunked request")


def serve() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    WSGIRequestHandler.disable_nagle_algorithm = True
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)  # noqa: T201  whoever started it reads this
    sys.stdin.read()  # to its end: then nobody is there any more


if __name__ == "__main__":
    serve()
