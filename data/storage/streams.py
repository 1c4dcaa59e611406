"""Open files and URLs as streams, decompressed according to their suffix."""

import bz2
import io
import lzma
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from manta.data.errors import InputError, one_line
from manta.data.storage.store import open_store

COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}

_BUFFER = 1 << 20
_XZ_MEMORY = 1 << 30  # bytes: `xz -9` needs 65 MB to decompress, a hostile file could ask for 4 GB


def format_suffix(path: str) -> str:
    """Return the suffix that names a file's format, without that of its compression."""
    stem, suffix = _split_suffix(path)
    return _split_suffix(stem)[1] if suffix in COMPRESSION else suffix


def compression_of(path: str) -> str | None:
    return COMPRESSION.get(_split_suffix(path)[1])


def _split_suffix(path: str) -> tuple[str, str]:
    """Split the last name of a path, or of a URL without its query. A corpus may have a million files: pathlib is too slow."""
    name = (urlsplit(path).path if path.startswith(("http://", "https://")) else path).rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    return (stem, dot + suffix.lower()) if stem else (name, "")


@contextmanager
def reading(path: str, *errors: type[Exception]) -> Generator[None]:
    """Raise InputError for an OSError or one of these errors: the file cannot be read, or not to its end."""
    try:
        yield
    except PermissionError as error:
        raise InputError(f"{path}: expected read access, got {type(error).__name__}: {one_line(error)}. Change its permissions.") from None
    except InputError:
        raise
    except (OSError, *errors) as error:
        problem = f"expected a readable file, got {type(error).__name__}: {one_line(error)}; it may be truncated or damaged"
        raise InputError(f"{path}: {problem}. Download it again.") from None


@contextmanager
def open_bytes(path: str) -> Generator[BinaryIO]:
    """Open a file or URL. Raises InputError if it cannot be read, now or later.

    pyarrow's decompressors, unlike zstandard's, reject a truncated file, whatever its compression.
    """
    compression = compression_of(path)
    with reading(path, lzma.LZMAError), open_store(path).open() as raw:
        if compression is None:
            yield raw
            return
        import pyarrow as pa

        new = _DECOMPRESSORS.get(compression)
        decompressed = _Decompressed(raw, new) if new else cast("io.RawIOBase", pa.input_stream(raw, compression=compression))
        with reading(path, pa.ArrowException), io.BufferedReader(decompressed, _BUFFER) as stream:
            yield stream


@contextmanager
def open_text(path: str) -> Generator[io.TextIOWrapper]:
    """Open a text file with its line ends unchanged. Bytes that are not UTF-8 become lone surrogates, so their position is known."""
    with open_bytes(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        yield text


def _new_xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


_DECOMPRESSORS = {"bz2": bz2.BZ2Decompressor, "xz": _new_xz}


class _Decompressed(io.RawIOBase):
    """Decompresses streams one after the other, as `xz` and `bzip2` do: between those of xz may be padding.

    lzma.open ignores what follows padding, and pyarrow refuses an empty stream of bzip2.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._raw, self._new, self._input = raw, new, b""
        self._stream: bz2.BZ2Decompressor | lzma.LZMADecompressor | None = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if not self._input and (self._stream is None or self._stream.needs_input):
                self._input = self._raw.read(_BUFFER)
                if not self._input and self._stream is None:
                    return 0
                if not self._input:
                    raise OSError("Truncated compressed stream")
            if self._stream is None:
                self._input = self._input.lstrip(b"\0") if self._new is _new_xz else self._input
                self._stream = self._new() if self._input else None
                continue
            part = self._stream.decompress(self._input, len(buffer))
            self._input = b""
            if self._stream.eof:
                self._input, self._stream = self._stream.unused_data, None
            if part:
                buffer[: len(part)] = part
                return len(part)
