"""Resolve FILE or RUN to a config and the corpus that it reads."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from manta.data.errors import InputError
from manta.data.prepare import prepare
from manta.data.sampling.samples import Samples
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import PreparedData
from manta.launch.config import RunConfig, find_run, load
from manta.trainer.run_directory import RunDirectory


class DataTarget(NamedTuple):
    config: RunConfig
    run: RunDirectory | None
    """If a run was named."""
    typed: str
    """Arguments of `manta prepare` for its corpus: FILE [KEY=VALUE]..."""

    @property
    def run_corpus(self) -> PreparedData | None:
        """The corpus that the run started with."""
        return None if self.run is None or not self.run.manifest_file.exists() else self.run.prepared()

    def prepared(self) -> PreparedData:
        """Return the corpus, packed or not. Raises InputError if it is not prepared."""
        unpacked = self.config.data.model_copy(update={"packing": "cut"})
        found = self.run_corpus or prepare.find_prepared(unpacked, self.config.tokenizer)
        if found is None:
            raise InputError(self._not_prepared)
        return found

    def paths(self) -> tuple[Path, list[CorpusDirectory], str | None]:
        """Return the tokenizer's path, the corpus directories, damaged or not, and the fingerprint that a run expects.

        Raises InputError if nothing is prepared.
        """
        if (corpus := self.run_corpus) is not None:
            return corpus.tokenizer, [CorpusDirectory(root, self.config.data.cache) for root in corpus.corpora], corpus.fingerprint
        found = prepare.find_directories(self.config.data, self.config.tokenizer)
        if found is None:
            raise InputError(self._not_prepared)
        return found[0].local_copy("tokenizer.json"), found[1], None

    def samples(self, **changes: object) -> Samples:
        """changes: of the `data` section."""
        data = self.config.data.model_copy(update=changes)
        return Samples(self.prepared(), data, self.config.tokenizer, seed=self.config.run.seed)

    @property
    def _not_prepared(self) -> str:
        return f"{self.typed}: expected a prepared corpus, got none. Run: manta prepare {self.typed}"


def resolve(path: Path, overrides: Sequence[str]) -> DataTarget:
    """Return the target of FILE or RUN. Raises InputError if the config is wrong, or its data is never prepared."""
    is_run = os.path.isdir(path) or (os.path.islink(path) and not os.path.exists(path))  # noqa: PTH110, PTH112, PTH114  they never raise
    run = find_run(path) if is_run else None
    file = path if run is None else run.config_file
    config = load(file, overrides)
    if config.data.live:
        raise InputError("data.live: expected a prepared corpus to inspect, got true. Set data.live=false, and run `manta prepare`.")
    if run is not None and overrides and _corpus_keys(load(file)) != _corpus_keys(config):
        run = None
    return DataTarget(config=config, run=run, typed=shlex.join([str(file), *overrides]))


def _corpus_keys(config: RunConfig) -> list[object]:
    """Return the part of a config that selects the corpus which a run reads."""
    keys = ("directory", "text_field", "validation", "bad_rows")
    sources = [source.model_dump(exclude={"name", "epochs"}) for source in config.data.sources]
    return [sources, config.tokenizer, *(getattr(config.data, key) for key in keys)]
