"""An S3 server on loopback, and a proxy in front of it that injects the faults of networks and disks.

The server is moto's, in a child process that ends with its parent. `environment` is what a client needs to reach it.
"""

import gc
import json
import random
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
HOP_BY_HOP = {"accept-encoding", "connection", "keep-alive", "transfer-encoding"}  # headers that are not forwarded


class ObjectStore:
    """One bucket. Tests that break or count responses use a Proxy's port instead of this one."""

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
        close_connections()

    def put(self, key: str, content: bytes) -> str:
        """Put an object, and return its URL."""
        self._request("PUT", f"/{BUCKET}/{key}", content)
        return url(key)

    def delete(self, key: str) -> None:
        self._request("DELETE", f"/{BUCKET}/{key}")

    def check_keys(self, *, on: bool) -> None:
        """Set whether requests need valid keys. There are none, so that all requests are refused then."""
        self._request("POST", "/moto-api/reset-auth", b"0" if on else json.dumps(float("inf")).encode())

    def _request(self, method: str, path: str, body: bytes | None = None) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {"Authorization": "AWS user:key"})  # required, and not checked
            response = connection.getresponse()
            content = response.read()
            assert response.status < 300, content
        finally:
            connection.close()


def close_connections() -> None:
    """Close connections to a server that has stopped or is no longer used: a forked child that collects them would wait for their loop."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    gc.collect()


def content(seed: str, size: int = 100_000) -> bytes:
    """Return random bytes for an object."""
    return random.Random(seed).randbytes(size)


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
    """What happens to the next `times` responses that contain byte `at` of an object; a refusal responds with status `at` instead."""

    kind: Literal["cut", "flip", "stall", "refuse"]
    at: int
    times: int


class Proxy:
    """Forwards requests and responses, counts GETs by object, and injects faults."""

    def __init__(self, port: int) -> None:
        self.reset()
        self._guard = threading.Lock()
        self.connections: set[socket] = set()
        handler = type("Handler", (_Handler,), {"server_port": port, "proxy": self})

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.environment = environment(self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def reset(self) -> None:
        self.gets: Counter[str] = Counter()
        self.requests = 0
        self.ranges: list[str | None] = []
        self.stalled = threading.Event()  # set once a response stalls
        self._resumed = threading.Event()
        self._faults: dict[str, list[Fault]] = {}
        self._hang_ups: list[Fault] = []
        self.hang_up_count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._resumed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        with self._guard:
            for connection in self.connections:
                connection.shutdown(SHUT_RDWR)

    def cut(self, key: str, *, at: int, times: int = 1) -> None:
        """End the connection before byte `at`, after the headers have announced all bytes."""
        self._faults.setdefault(key, []).append(Fault("cut", at, times))

    def flip(self, key: str, *, at: int, times: int = 1) -> None:
        """Flip a bit of byte `at`."""
        self._faults.setdefault(key, []).append(Fault("flip", at, times))

    def stall(self, key: str, *, at: int) -> None:
        """Stall the response before byte `at`, until resume()."""
        self._faults.setdefault(key, []).append(Fault("stall", at, 1))

    def refuse(self, key: str, *, status: int, times: int) -> None:
        """Respond with this status to any request for the object."""
        self._faults.setdefault(key, []).append(Fault("refuse", status, times))

    def hang_up(self, *, at: int, times: int) -> None:
        """End the connection after `at` bytes of an upload, for the next `times` uploads that are larger."""
        self._hang_ups = [Fault("cut", at, times)]

    def resume(self) -> None:
        self._resumed.set()

    def wait(self) -> None:
        self.stalled.set()
        self._resumed.wait(30)

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
        """Return the status to refuse a request for the object with."""
        return fault.at if (fault := self._due(key, {"refuse"}, range(1000))) else None

    def hangs_up(self, size: int) -> int | None:
        """Return the bytes of an upload of this size after which the connection ends."""
        with self._guard:
            for fault in self._hang_ups:
                if fault.times and size > fault.at:
                    fault.times -= 1
                    self.hang_up_count += 1
                    return fault.at
        return None

    def fault(self, key: str, positions: range) -> Fault | None:
        """Return the fault of a response with these bytes of the object."""
        return self._due(key, {"cut", "flip", "stall"}, positions)

    def _due(self, key: str, kinds: set[str], positions: range) -> Fault | None:
        with self._guard:
            for fault in self._faults.get(key, []):
                if fault.kind in kinds and fault.at in positions and fault.times:
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the client to acknowledge the headers
    server_port: int
    proxy: Proxy

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        pass

    def handle(self) -> None:
        with self.proxy.open(self.connection), suppress(ConnectionError):  # tests kill clients
            super().handle()

    def forward(self) -> None:
        key = unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}").lstrip("/")
        self.proxy.count(self.command, key, self.headers["Range"])
        size = int(self.headers["Content-Length"] or 0)
        if self.command == "PUT" and (at := self.proxy.hangs_up(size)) is not None:
            self.rfile.read(at)
            self.close_connection = True
            self.connection.shutdown(SHUT_RDWR)
            return
        body = self._body()
        if status := self.proxy.refusal(key):
            self._respond(status, [], b"<Error><Code>Refused</Code><Message>by the test</Message></Error>")
            return
        connection = HTTPConnection("127.0.0.1", self.server_port, timeout=20)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
        except ConnectionError:  # the server has stopped
            self.close_connection = True
            return
        finally:
            connection.close()
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP | {"date", "server"}]
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        positions = range(start, start + len(content) if self.command == "GET" and response.status < 300 else start)
        self._respond(response.status, headers, content, self.proxy.fault(key, positions), start)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815  the base class's names

    def _respond(self, status: int, headers: list[tuple[str, str]], content: bytes, fault: Fault | None = None, start: int = 0) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        at = fault.at - start if fault else 0
        match fault and fault.kind:
            case "cut":
                self.wfile.write(content[:at])
                self.close_connection = True
            case "flip":
                self.wfile.write(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            case "stall":
                self.wfile.write(content[:at])
                self.proxy.wait()
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
    print(server.server_port, flush=True)  # noqa: T201  the parent reads this
    sys.stdin.read()  # until the parent ends


if __name__ == "__main__":
    serve()
