"""Helpers for tests of worker pools: tasks for one input split, and splits that hang or kill their reader."""

import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

from small_corpora import config

from manta.data.config import CacheConfig
from manta.data.prepare.encode import SplitTask
from manta.data.shards.manifest import PreparedData
from manta.data.source_config import SourceConfig
from manta.data.sources.input_split import InputSplit
from manta.data.sources.splits import input_splits


@dataclass(frozen=True)
class HangingSplit:
    """A split that keeps a worker process busy forever."""

    split: InputSplit
    size: int = 1

    def documents(self):
        if multiprocessing.parent_process():
            time.sleep(600)
        yield from self.split.documents()


@dataclass(frozen=True)
class DeadlySplit:
    """A split that kills its reader at document 38, by a signal or by exiting."""

    split: InputSplit
    signal: int | None
    size: int = 1

    @property
    def name(self):
        return self.split.name

    @property
    def places(self):
        return self.split.places

    def documents(self):
        for number, document in enumerate(self.split.documents(), start=1):
            yield document
            if number == 38:
                os._exit(3) if self.signal is None else os.kill(os.getpid(), self.signal)


def first_split(path: Path) -> InputSplit:
    return input_splits(SourceConfig(path=str(path)), config(path.parent, path))[0]


def task_of(split: InputSplit, prepared: PreparedData, directory: Path, index: int = 0) -> SplitTask:
    return SplitTask(
        split=split,
        index=index,
        root=str(directory),
        cache=CacheConfig(),
        tokenizer=str(prepared.tokenizer),
        end_of_text="<|endoftext|>",
        encoder="tokenizers",
        validation=0.1,
    )
