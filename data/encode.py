"""The work of one process: a piece of a source becomes its train and its validation shard."""

import math
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import numpy as np
import xxhash

from manta.data.durable import write_atomically
from manta.data.formats import Piece
from manta.data.manifest import PieceRecord
from manta.data.order import Permutation
from manta.data.shards import ShardWriter, dtype_for
from manta.data.tokenizer import Encoder, Tokenizer

_BATCH = 1 << 20  # characters encoded at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One piece and all that decides what becomes of it."""

    piece: Piece
    index: int
    directory: Path
    tokenizer: Path
    end_of_text: str
    encoder: Encoder
    validation: float

    @property
    def stem(self) -> str:
        return f"piece-{self.index:05d}"

    @property
    def record(self) -> Path:
        return self.directory / f"{self.stem}.json"


def encode(task: Task) -> PieceRecord:
    """Write the piece's shards, and last its record, which says that they are whole."""
    tokenizer = _open_tokenizer(task.tokenizer, task.end_of_text, task.encoder)
    dtype = dtype_for(tokenizer.vocabulary)
    held_out = math.ceil(task.validation * 2**64)
    with (
        ShardWriter(task.directory / f"{task.stem}.train", dtype) as train,
        ShardWriter(task.directory / f"{task.stem}.validation", dtype) as validation,
    ):
        for texts in _batches(task.piece.documents()):
            for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
                raw = text.encode()
                # By its text, not its place: a document that stands twice falls on the same side twice.
                split = validation if xxhash.xxh3_64_intdigest(raw) < held_out else train
                split.append(np.append(ids, np.uint32(tokenizer.end_of_text)), len(raw))
        record = PieceRecord(train=train.commit(), validation=validation.commit())
    write_atomically(task.record, record.model_dump_json(indent=1).encode())
    return record


def sample(pieces: list[Piece], wanted: int) -> Iterator[str]:
    """About `wanted` bytes of text from all over: pieces in shuffled order, each giving its share of what is still wanted."""
    order = Permutation(len(pieces), key=0)(np.arange(len(pieces)))
    for left, index in zip(range(len(pieces), 0, -1), order, strict=True):
        share = math.ceil(wanted / left)
        for text in pieces[int(index)].documents():
            if share <= 0:
                break
            part = text[:share]
            yield part
            taken = len(part.encode())
            share, wanted = share - taken, wanted - taken
        if wanted <= 0:
            return


def start_worker(lifeline: Connection) -> None:
    """One thread a worker, and no worker left behind: it ends when the other end of its lifeline is closed, by will or by death."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the parent's to tell of
    Thread(target=_leave_with, args=(lifeline,), daemon=True).start()


def _leave_with(lifeline: Connection) -> None:
    lifeline.poll(None)
    os._exit(1)


@lru_cache(maxsize=1)
def _open_tokenizer(file: Path, end_of_text: str, encoder: Encoder) -> Tokenizer:
    return Tokenizer(file, end_of_text=end_of_text, encoder=encoder)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
