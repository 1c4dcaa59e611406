"""A gRPC client with or without Ray's token, written in HTTP/2 frames: Ray ships no gRPC library for Python."""

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
    """The server does not answer in HTTP/2."""


def status(address: tuple[str, int], method: str, *, timeout: float = 10.0, **metadata: str) -> int:
    """Call /service/method with an empty message; return the gRPC status of the answer."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "probe",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    headers |= metadata
    empty = bytes(5)  # not compressed, 0 bytes
    with socket.create_connection(address, timeout=timeout) as connection:
        connection.sendall(PREFACE + frame(SETTINGS) + frame(HEADERS, END_HEADERS, 1, packed(headers)) + frame(DATA, END_STREAM, 1, empty))
        answer = b""
        while not (match := re.search(rb"grpc-status([\x01\x02])(\d{1,2})", answer)):
            more = connection.recv(65536)
            answer += more
            if not more or answer.startswith(b"HTTP/1"):
                raise NotGrpcError(f"{address} answered {method} with {answer[:80]!r}")
    return int(match[2][: match[1][0]])


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def packed(headers: dict[str, str]) -> bytes:
    """Encode headers in HPACK's simplest form: each a literal, in no table."""
    texts = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert all(len(text) < 127 for pair in texts for text in pair)
    return b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in texts)


def methods() -> set[str]:
    """Return every gRPC method in Ray's programs, as /service/method."""
    package = Path(ray.__file__).parent
    names: set[str] = set()
    for program in ("core/src/ray/gcs/gcs_server", "core/src/ray/raylet/raylet", "_raylet.so"):
        with (package / program).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            names |= {name.decode() for name in re.findall(rb"/(?:ray\.rpc|grpc\.(?:health|channelz|reflection))[\w.]*/\w+(?=\0)", text)}
    return names
