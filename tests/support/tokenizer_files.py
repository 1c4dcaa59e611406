"""Helpers for tests of tokenizers: train one, edit its file, open it with tiktoken; texts that are hard to split."""

import json
import sysconfig
from pathlib import Path

import pytest

from manta.data.errors import InputError
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.data.tokenizer.train import train

TEXTS = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:30]]
END = "<|endoftext|>"
TRICKY = [
    "",
    " ",
    "\n\n\n",
    "  x  ",
    "don't I'LL we've",
    "1234567 ½ ٣",
    "a<|endoftext|>b",
    "naïve 雪 🙂👩‍👩‍👧",
    "x \u2003\u3000 y",
    "\x00\x7f\u200b",
    "tab\t\tq ",
]


def train_file(path: Path, texts: list[str] = TEXTS, vocabulary: int = 600, **more) -> Path:
    """Train a tokenizer.json."""
    path.write_text(train(texts, **{"vocabulary": vocabulary, "end_of_text": END, **more}), encoding="utf-8")
    return path


def open_with_tiktoken(file: Path) -> Tokenizer:
    """Open a tokenizer that encodes with tiktoken, proven on all of these texts."""
    tokenizer = Tokenizer(file)
    size = sum(len(text.encode()) for text in TEXTS + TRICKY)
    choice = f"tiktoken: same ids as tokenizers on 41 documents, {size} bytes, of the corpus"
    assert tokenizer.choose_encoder(TEXTS + TRICKY) == choice
    return tokenizer


def edited(file: Path, directory: Path, edit) -> Path:
    """Return a copy of a tokenizer.json after `edit(spec)`."""
    spec = json.loads(file.read_text())
    edit(spec)
    path = directory / "edited.json"
    path.write_text(json.dumps(spec))
    return path


def error_of(action) -> str:
    """Return the one-line InputError that an action raises."""
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)
