"""Texts that were generated with the checkpoints of a run: samples.jsonl in its directory has a line for each. Imports no torch."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manta.cluster.line_file import LineFile
from manta.cluster.protocol import open_regular, read_lines

__all__ = ["GeneratedText", "append_texts", "parse_text", "read_texts"]

MOST_TEXTS = 20  # the newest, that a reader gets
LONGEST = 20_000  # characters
MAX_BYTES = 1 << 24  # read from the end of the file: more than MOST_TEXTS lines take, if each character is an escape
KEYS = {"step": int, "seed": int, "prompt": str, "text": str}


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedText:
    step: int  # of the checkpoint
    seed: int  # of the sampling
    prompt: str
    text: str  # the prompt and what follows it

    def to_json(self) -> bytes:
        return json.dumps(asdict(self) | {"prompt": self.prompt[:LONGEST], "text": self.text[-LONGEST:]}).encode()


def parse_text(line: bytes) -> GeneratedText:
    """Return the text of a line. Raises ValueError if it has none."""
    content: Any = json.loads(line)
    if not isinstance(content, dict) or not all(type(content.get(key)) is kind for key, kind in KEYS.items()):
        raise ValueError("expected a generated text, with step, seed, prompt and text")
    if not 0 <= content["step"] < 1 << 63:
        raise ValueError(f"step: expected a number of steps, got {content['step']}")
    return GeneratedText(**{key: content[key] for key in KEYS})


def read_texts(file: Path) -> list[GeneratedText]:
    """Return the newest texts, at most MOST_TEXTS, in the order of the file. Damaged lines are skipped. Raises OSError."""
    try:
        with open_regular(file) as stream:
            start = max(0, stream.seek(0, 2) - MAX_BYTES)
            stream.seek(start)
            if start:
                stream.readline(MAX_BYTES)  # the end of a line
            return list(read_lines(stream, parse_text, path=file, start=stream.tell()))[-MOST_TEXTS:]
    except FileNotFoundError:
        return []


def append_texts(file: Path, texts: Iterable[GeneratedText]) -> str | None:
    """Append the texts that the file does not have. Returns why some could not be written, for the user."""
    known = {text.to_json() for text in read_texts(file)}
    lines = LineFile(file)
    try:
        for text in texts:
            if (line := text.to_json()) not in known:
                lines.write(line)
        return lines.problem()
    finally:
        lines.close()
