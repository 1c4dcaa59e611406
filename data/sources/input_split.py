"""The interface of all formats: an input split yields documents and bad rows, and one worker encodes it into one shard."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import xxhash

from manta.data.errors import InputError
from manta.data.source_config import LONGEST_DOCUMENT
from manta.data.sources.rows import Content, MixedKindsError, RowError, RowReader
from manta.data.storage.positions import Places


class Document(NamedTuple):
    content: Content
    """Text, or token ids if the row holds those; never empty."""
    position: int
    """Its position in the split's `places`; rises from document to document."""


class BadRow(NamedTuple):
    message: str
    """One line: file, line or row, and what is wrong."""


class InputSplit(Protocol):
    """A part of a source. It pickles, and yields its documents in one fixed order."""

    @property
    def name(self) -> str:
        """Its name in errors."""
        ...

    @property
    def size(self) -> int:
        """Bytes on disk, for the progress bar; 0 if unknown."""
        ...

    def documents(self) -> Iterator[Document | BadRow]:
        """Raises InputError for a file that cannot be read to its end, and for the first bad row unless bad rows are skipped."""
        ...

    @property
    def places(self) -> Places:
        """Its files, and what a position counts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How to read the files of a source."""

    reader: RowReader
    bad_rows: Literal["fail", "skip"] = "fail"
    ignore_undecodable: bool = False
    """Ignore text that is not UTF-8: the standard library's tests contain such files on purpose."""
    longest_document: int = LONGEST_DOCUMENT
    """Bytes of a line, or of the text or the token ids of a row."""

    def too_long(self) -> RowError:
        expected = f"at most {self.longest_document:,} bytes (data.longest_document)"
        return RowError(f"expected {expected}, got a longer document. Split it, or raise data.longest_document.")

    def check_length(self, content: Content) -> None:
        """Raise RowError if a document is too long."""
        size = content.nbytes if not isinstance(content, str) else len(content)
        if size * 4 > self.longest_document and (size if not isinstance(content, str) else len(content.encode())) > self.longest_document:
            raise self.too_long()

    def bad_row(self, location: str, error: RowError) -> BadRow:
        """Return what to yield for a bad row. Raises InputError unless bad rows are skipped."""
        message = f"{location}: {error}"
        if self.bad_rows == "fail" or isinstance(error, MixedKindsError):
            raise InputError(message) from None
        return BadRow(message)


def is_held_out(raw: "bytes | memoryview", share: float) -> bool:
    """Whether a document is for validation, by a hash of its bytes: equal documents are on the same side."""
    return xxhash.xxh3_64_intdigest(raw) < share * 2**64
