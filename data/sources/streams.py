"""Open files and URLs as streams, decompressed according to their suffix."""

import io
from collections.abc import Generator
from contextlib import contextmanager
from typing import BinaryIO, cast
from urllib.parse import urlsplit

from manta.data.errors import InputError, one_line
from manta.data.storage.store import open_store

COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}

_BUFFER = 1 << 20


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
    return (stem, dot + suffix) if stem else (name, "")


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
    with reading(path), open_store(path).open() as raw:
        if compression is None:
            yield raw
            return
        import pyarrow as pa

        decompressed = cast("io.RawIOBase", pa.input_stream(raw, compression=compression))
        with io.BufferedReader(decompressed, _BUFFER) as stream:
            yield stream


@contextmanager
def open_text(path: str) -> Generator[io.TextIOWrapper]:
    """Open a text file with its line ends unchanged. Bytes that are not UTF-8 become lone surrogates, so their position is known."""
    with open_bytes(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        yield text
