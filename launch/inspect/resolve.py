"""FILE or RUN: whose data a person asks about, and where it lies."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manta.data.errors import InputError
from manta.data.prepare import prepare
from manta.data.sampling.samples import Samples
from manta.data.shards.corpus_directory import Home
from manta.data.shards.manifest import Prepared
from manta.launch import config as configs
from manta.launch.config import RunConfig, resume_config
from manta.trainer.run_directory import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    config: RunConfig
    home: RunDirectory | None
    """Where a run was named."""
    typed: str
    """What makes its corpus anew, as a person can type it: FILE [KEY=VALUE]..."""

    @property
    def begun(self) -> Prepared | None:
        """What a run reads."""
        return None if self.home is None or not self.home.manifest_file.exists() else self.home.prepared()

    def prepared(self) -> Prepared:
        """Raises InputError where the corpus is not prepared; how it is packed does not matter here."""
        cut = self.config.data.model_copy(update={"packing": "cut"})
        found = self.begun or prepare.find_prepared(cut, self.config.tokenizer)
        if found is None:
            raise InputError(self._not_prepared)
        return found

    def places(self) -> tuple[Path, list[Home], str | None]:
        """Where the tokenizer and the corpora lie, damaged or not; and of a run, the fingerprint of what it was begun with.

        Raises InputError where nothing is prepared.
        """
        if self.begun is not None:
            return self.begun.tokenizer, [Home(root, self.config.data.cache) for root in self.begun.corpora], self.begun.fingerprint
        found = prepare.find_directories(self.config.data, self.config.tokenizer)
        if found is None:
            raise InputError(self._not_prepared)
        return found[0].copy("tokenizer.json"), found[1], None

    def samples(self) -> Samples:
        return Samples(self.prepared(), self.config.data, self.config.tokenizer, seed=self.config.run.seed)

    @property
    def _not_prepared(self) -> str:
        return f"{self.typed}: its corpus is not prepared; run: manta prepare {self.typed}"


def opened(where: Path, overrides: Sequence[str]) -> Opened:
    """Raises InputError where the config is wrong, or tells of data that nobody prepares."""
    file = resume_config(where) if where.is_dir() else where
    config = configs.load(file, overrides)
    if config.data.live:
        raise InputError("data.live: got true, and text that is tokenized while it is read is not at hand before; wants a prepared corpus")
    home = RunDirectory(where.absolute()) if where.is_dir() else None
    if home is not None and overrides and _other_corpus(configs.load(file), config):
        home = None
    return Opened(config=config, home=home, typed=shlex.join([str(file), *overrides]))


def _other_corpus(begun: RunConfig, now: RunConfig) -> bool:
    """Whether what is laid over a run's config asks for other tokens than the run reads."""
    keys = ("directory", "text_field", "validation", "bad_rows")
    same_sources = [source.model_dump(exclude={"name", "epochs"}) for source in begun.data.sources] == [
        source.model_dump(exclude={"name", "epochs"}) for source in now.data.sources
    ]
    return not same_sources or begun.tokenizer != now.tokenizer or any(getattr(begun.data, key) != getattr(now.data, key) for key in keys)
