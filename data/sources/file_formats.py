"""File formats by name and by suffix.

A format is a class of input splits with a constructor `from_files(files, options, split_bytes)`. To add one, extend Format,
DocumentSplit, FORMATS, SUFFIXES and `format` in data/source_config.py.
"""

from typing import Literal

from manta.data.source_config import SourceConfig
from manta.data.sources.tables import ArrowSplit, HuggingFaceSplit, ParquetSplit
from manta.data.sources.text_formats import JsonLinesSplit, TextSplit
from manta.data.storage.streams import compression_of, format_suffix

Format = Literal["text", "json", "parquet", "arrow", "tokens"]
DocumentSplit = TextSplit | JsonLinesSplit | ParquetSplit | ArrowSplit | HuggingFaceSplit

FORMATS: dict[Format, type[TextSplit] | type[JsonLinesSplit] | type[ParquetSplit] | type[ArrowSplit]] = {
    "text": TextSplit,
    "json": JsonLinesSplit,
    "parquet": ParquetSplit,
    "arrow": ArrowSplit,
}
TEXT = (".txt", ".text", ".md", ".rst", ".py", ".pyi", ".html", ".tex", ".c", ".h", ".cpp", ".rs", ".go", ".js", ".ts", ".java")
TOKENS = (".bin", ".idx")
SUFFIXES: dict[str, Format] = {
    **dict.fromkeys(TEXT, "text"),
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "json"),
    ".parquet": "parquet",
    ".arrow": "arrow",
    **dict.fromkeys(TOKENS, "tokens"),
}


def configured_format(source: SourceConfig) -> Format | None:
    """Return the format that the config sets for all files of a source, if any."""
    return "tokens" if source.format in ("megatron", "nanogpt", "llm.c") else source.format


def format_of(path: str, source: SourceConfig) -> Format | None:
    """Return the format of a file; None if it is unknown. Only text and JSON may be compressed."""
    suffix = format_suffix(path)
    found = configured_format(source) or SUFFIXES.get(suffix)
    if found == "tokens" and (suffix not in TOKENS or suffix not in path):  # .BIN: the index beside it could not be found
        return None
    return None if compression_of(path) is not None and found not in {"text", "json"} else found
