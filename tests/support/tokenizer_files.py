"""Tokenizers that tests make and alter, and texts that are hard to split."""

import json
import sysconfig
from pathlib import Path

import pytest

from manta.data.errors import InputError
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.data.tokenizer.train import train as train_tokenizer

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


def trained(folder: Path, texts: list[str] = TEXTS, vocabulary: int = 600, **more) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(train_tokenizer(texts, vocabulary=vocabulary, end_of_text=END, **more), encoding="utf-8")
    return path


def opened_fast(file: Path) -> Tokenizer:
    """With tiktoken, proven on all of these texts."""
    opened = Tokenizer(file)
    size = sum(len(text.encode()) for text in TEXTS + TRICKY)
    said = f"tiktoken: same ids as tokenizers on 41 documents, {size} bytes, of the corpus"
    assert opened.choose_encoder(TEXTS + TRICKY) == said
    return opened


def altered(file: Path, directory: Path, alter) -> Path:
    spec = json.loads(file.read_text())
    alter(spec)
    path = directory / "altered.json"
    path.write_text(json.dumps(spec))
    return path


def told(make) -> str:
    """The one line of the InputError that this ends with."""
    with pytest.raises(InputError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)
