"""The corpus of a run: found or prepared, then checked before the run starts."""

from dataclasses import dataclass

from manta.data.errors import InputError
from manta.data.live.live_samples import open_samples
from manta.data.live.live_sources import prepare_live
from manta.data.prepare.prepare import find_prepared, prepare
from manta.data.sampling.samples import Samples
from manta.data.shards.manifest import PreparedData, is_complete
from manta.launch.config import RunConfig
from manta.trainer.run_directory import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCorpus:
    prepared: PreparedData
    tokenizer_vocabulary: int


def open_corpus(run_dir: RunDirectory, config: RunConfig) -> RunCorpus:
    """Return the corpus that the run reads, checked.

    A run that has trained keeps its corpus, even if the sources are gone. Otherwise, the corpus is found or prepared. With data.live,
    the sources themselves are read, so they must be there, unchanged.

    Raises InputError if the corpus is damaged, too small, or another one than the run has trained on.
    """
    used = run_dir.prepared() if run_dir.has_trained else None
    if used is not None and is_complete(used, config.data.cache):
        prepared = prepare_live(used.tokenizer, config.data, config.tokenizer) if config.data.live else used
    else:
        prepared = find_prepared(config.data, config.tokenizer) or prepare(config.data, config.tokenizer)
    if used is not None and used.fingerprint != prepared.fingerprint:
        remedy = "Restore the corpus that the run was started with, or use another run.dir."
        raise InputError(f"{run_dir.path}: corpus fingerprint: expected {used.fingerprint}, got {prepared.fingerprint}. {remedy}")
    samples = open_samples(prepared, config.data, config.tokenizer, seed=config.run.seed)  # raises InputError if a shard is damaged
    if isinstance(samples, Samples):
        _check_size(samples, config)
    config.model.embedding_rows(samples.tokenizer_vocabulary)  # raises InputError if the embedding is too small
    return RunCorpus(prepared=prepared, tokenizer_vocabulary=samples.tokenizer_vocabulary)


def _check_size(samples: Samples, config: RunConfig) -> None:
    """Raises InputError if a source would be read more often than it may, or if a step would read a sample twice."""
    samples.sampler.check_epochs(config.timeline().first_sample(config.train.steps))
    per_epoch = sum(len(source.dataset) for source in samples.sampler.sources)
    if (batch := max(config.train.batches)) > per_epoch:
        expected = f"at most the {per_epoch} samples of an epoch, so that no step reads a sample twice"
        raise InputError(f"train.global_batch: expected {expected}, got {batch}. Lower it, or add text.")
