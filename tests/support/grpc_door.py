"""A gRPC call by a client that may lack Ray's token, in HTTP/2 frames of its own: Ray comes without a gRPC library for Python."""

import mmap
import re
import socket
import struct
from pathlib import Path

import ray

OK, UNIMPLEMENTED, UNAUTHENTICATED = 0, 12, 16
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4


class NotGrpcError(ConnectionError):
    """Whoever listens there does not answer in HTTP/2."""


def status(address: tuple[str, int], method: str, *, timeout: float = 10.0, **metadata: str) -> int:
    """Calls /service/method with an empty message. Gives the gRPC status of the answer."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "door",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    headers |= metadata
    empty = bytes(5)  # not compressed, no bytes long
    with socket.create_connection(address, timeout=timeout) as door:
        door.sendall(PREFACE + frame(SETTINGS) + frame(HEADERS, END_HEADERS, 1, packed(headers)) + frame(DATA, END_STREAM, 1, empty))
        got = b""
        while not (found := re.search(rb"grpc-status([\x01\x02])(\d{1,2})", got)):
            more = door.recv(65536)
            got += more
            if not more or got.startswith(b"HTTP/1"):
                raise NotGrpcError(f"{address} answered {method} with {got[:80]!r}")
    return int(found[2][: found[1][0]])


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def packed(headers: dict[str, str]) -> bytes:
    """HPACK's plainest form: each header a literal, in no table."""
    texts = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert all(len(text) < 127 for pair in texts for text in pair)
    return b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in texts)


def methods() -> set[str]:
    """Every gRPC method that Ray's programs know, as /service/method."""
    home = Path(ray.__file__).parent
    found: set[str] = set()
    for program in ("core/src/ray/gcs/gcs_server", "core/src/ray/raylet/raylet", "_raylet.so"):
        with (home / program).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            found |= {name.decode() for name in re.findall(rb"/(?:ray\.rpc|grpc\.(?:health|channelz|reflection))[\w.]*/\w+(?=\0)", text)}
    return found
