"""Build the corpus of one source: the shards of all its splits, and then the manifest that completes it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import ValidationError
from rich.filesize import decimal

from manta.data.config import DataConfig
from manta.data.errors import AccessError, InputError
from manta.data.prepare.encode import DUPLICATE, MALFORMED, SplitTask, encode_split, hash_split, record_file
from manta.data.prepare.full_disk import disk_error, space_needed
from manta.data.prepare.pool import run_tasks
from manta.data.prepare.progress import progress, report
from manta.data.prepare.token_files import index_token_file, token_file_splits
from manta.data.sampling.samples import entropy
from manta.data.shards.corpus_directory import REMEDY, CorpusDirectory
from manta.data.shards.manifest import FORMAT, MANIFEST, CorpusSplit, Manifest, SplitRecord, content_fingerprint, load_manifest
from manta.data.shards.shard import Shard
from manta.data.source_config import SourceConfig
from manta.data.sources.input_split import InputSplit
from manta.data.sources.source import holds_token_files, validation_source
from manta.data.sources.splits import input_splits, sample_text
from manta.data.tokenizer.tokenizer import Tokenizer

_PROOF_BYTES = 1_000_000  # text of a source on which a faster encoder must equal the reference


def build_shards(
    source: SourceConfig, directory: CorpusDirectory, data: DataConfig, tokenizer: Tokenizer, *, tokenizer_file: str, end_of_text: str
) -> tuple[list[SplitRecord], str]:
    """Write the shards of all splits, except those that are complete. Return their records, and which library encoded, and why."""
    directory.store.delete(MANIFEST)
    directory.store.create()
    with progress(f"prepare {source.resolved_name}: planning"):
        tasks, encoder = _plan(source, directory, data, tokenizer, tokenizer_file=tokenizer_file, end_of_text=end_of_text)
        records = {task.index: record for task in tasks if (record := _complete_record(task, directory))}
    missing = [task for task in tasks if task.index not in records]
    if records and missing:
        report(f"prepare {source.resolved_name}: {len(records)} of {len(tasks)} splits are complete")
    if source.filter.dedup and missing:
        missing = [task for task in _mark_duplicates(source, tasks, data) if task.index not in records]
    work = index_token_file if holds_token_files(source) else encode_split
    try:
        records |= run_tasks(f"prepare {source.resolved_name}", work, missing, data)
    except OSError as error:
        raise disk_error(error, directory.root, *space_needed(directory, tasks)) from None
    directory.store.create()  # deletes the temporary files of workers that died with their node
    return [records[task.index] for task in tasks], encoder


def _plan(
    source: SourceConfig, directory: CorpusDirectory, data: DataConfig, tokenizer: Tokenizer, *, tokenizer_file: str, end_of_text: str
) -> tuple[list[SplitTask], str]:
    """Return a task for each input split, and which library encodes, and why."""
    validation, is_tokens = validation_source(source), holds_token_files(source)

    def splits(part: SourceConfig) -> Sequence[InputSplit]:
        return token_file_splits(part) if is_tokens else input_splits(part, data)

    shares = [(split, 0.0 if validation else data.validation) for split in splits(source)]
    shares += [(split, 1.0) for split in (splits(validation) if validation else ())]
    if is_tokens:
        encoder = "none: token ids, used in place"
    else:
        encoder = tokenizer.choose_encoder(list(sample_text([(split, source.filter) for split, _ in shares], _PROOF_BYTES)))
    tasks = [
        SplitTask(
            split=split,
            index=index,
            root=directory.root,
            cache=data.cache,
            tokenizer=tokenizer_file,
            end_of_text=end_of_text,
            encoder=tokenizer.encoder,
            validation=share,
            filter=source.filter,
        )
        for index, (split, share) in enumerate(shares)
    ]
    return tasks, encoder


def write_manifest(
    source: SourceConfig, directory: CorpusDirectory, data: DataConfig, tokenizer: Tokenizer, *, records: list[SplitRecord], encoder: str
) -> Manifest:
    """Write the manifest, which completes a corpus. Raises InputError if there are no documents."""
    train = tuple(record.train for record in records if record.train)
    validation = tuple(record.validation for record in records if record.validation)
    removed = sum((Counter(record.left_out) for record in records), Counter[str]())
    summary = f"; removed: {', '.join(f'{count:,} {reason}' for reason, count in sorted(removed.items()))}" if removed else ""
    key = f"data.sources: {source.resolved_name!r}"
    if source.validation and not validation:
        raise InputError(f"{key}: validation: expected documents in {source.validation!r}, got none{summary}. Add text.")
    if not train and not validation:
        raise InputError(f"{key}: expected documents, got none{summary}. Add text.")
    corpus = Manifest(
        format=FORMAT,
        source=source.resolved_name,
        path=source.path,
        held_out=source.validation or f"{data.validation:g}",
        tokenizer=tokenizer.fingerprint,
        vocabulary=tokenizer.vocabulary,
        encoder=encoder,
        text_bytes=sum(shard.text_bytes for shard in (*train, *validation)),
        left_out=dict(sorted(removed.items())),
        train=CorpusSplit.of(train),
        validation=CorpusSplit.of(validation, _unigram_entropy(directory, validation, tokenizer.vocabulary)),
        fingerprint=content_fingerprint(train, validation),
    ).sealed()
    directory.store.write(MANIFEST, corpus.model_dump_json(indent=1).encode())
    if removed[MALFORMED]:
        first = next(record.refused for record in records if record.refused)
        report(f"prepare: malformed rows skipped: {removed[MALFORMED]:,}, first {first}")
    report(
        f"prepared {source.resolved_name!r}: {corpus.train.tokens:,} train and {corpus.validation.tokens:,} validation tokens"
        f" of {decimal(corpus.text_bytes)} of text in {directory.root} ({encoder}){summary}"
    )
    return corpus


def complete_corpus(directory: CorpusDirectory, *, contents: bool) -> Manifest | None:
    """Return the manifest of a complete and undamaged corpus, else None. contents: check every byte, not only sizes."""
    if not directory.exists(MANIFEST):
        return None
    try:
        corpus = load_manifest(directory)
        if not (damage := corpus.problem(directory, contents=contents)):
            return corpus
    except AccessError:
        raise
    except InputError as error:
        damage = str(error).removesuffix(f". {REMEDY}")
    report(f"prepare: {damage}; it is made again")
    return None


def _complete_record(task: SplitTask, directory: CorpusDirectory) -> SplitRecord | None:
    """Return the record of a split with complete shards, checked by every byte on a disk, and by size in an object store."""
    try:
        record = SplitRecord.model_validate_json(directory.read(record_file(task.index)))
    except AccessError:
        raise
    except (FileNotFoundError, ValidationError, InputError):
        return None
    return None if record.problem(directory, contents=directory.store.is_local) else record


def _mark_duplicates(source: SourceConfig, tasks: list[SplitTask], data: DataConfig) -> list[SplitTask]:
    """Return the tasks with marks for documents that repeat an earlier one of the source. Takes 8 bytes of memory per document."""
    hashes = run_tasks(f"read {source.resolved_name} for {DUPLICATE}s", hash_split, tasks, data)
    parts = [hashes[task.index] for task in tasks]
    repeated = np.ones(sum(map(len, parts)), dtype=np.bool_)
    with progress(f"prepare {source.resolved_name}: comparing documents"):
        repeated[np.unique(np.concatenate(parts), return_index=True)[1]] = False
    marks = np.split(repeated, np.cumsum([len(part) for part in parts])[:-1])
    return [replace(task, duplicates=np.packbits(part).tobytes()) for task, part in zip(tasks, marks, strict=True)]


def _unigram_entropy(directory: CorpusDirectory, shards: Sequence[Shard], vocabulary: int) -> float | None:
    counts = (np.bincount(directory.tokens(shard), minlength=vocabulary) for shard in shards)
    with progress("prepare: counting validation tokens"):
        return entropy(sum(counts, start=np.zeros(vocabulary, dtype=np.int64))) if shards else None
