"""One source becomes a corpus: shards of all its pieces, by as many processes as there are, and then the manifest that makes them whole."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from pydantic import ValidationError

from manta.data.config import DataConfig
from manta.data.errors import InputError
from manta.data.prepare import token_files
from manta.data.prepare.encode import DUPLICATE, MALFORMED, Task, encode, hashes, sample
from manta.data.prepare.process_pool import T, Work, run_all
from manta.data.prepare.progress import progress, say
from manta.data.prepare.token_files import take_over
from manta.data.sampling.samples import entropy
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import Home
from manta.data.shards.manifest import Manifest, PieceRecord, Split
from manta.data.sources.config import SourceConfig
from manta.data.sources.input_split import InputSplit
from manta.data.sources.source import holds_token_files, validation_source
from manta.data.sources.splits import input_splits
from manta.data.tokenizer.tokenizer import Tokenizer

_PROOF_BYTES = 1_000_000  # text of a source on which a faster encoder must equal the reference


def make_shards(
    source: SourceConfig, home: Home, data: DataConfig, tokenizer: Tokenizer, *, tokenizer_at: str, end_of_text: str
) -> tuple[str, list[PieceRecord]]:
    """Which encoder was chosen and why, and the record of each piece, in order. Pieces that are whole are not made again."""
    home.delete(manifest.NAME)
    home.store.create()
    held_out = validation_source(source)
    shares = [(piece, 0.0 if held_out else data.validation) for piece in _pieces(source, data)]
    shares += [(piece, 1.0) for piece in (_pieces(held_out, data) if held_out else ())]
    if holds_token_files(source):
        choice = "none: token ids, read where they lie"
    else:
        choice = tokenizer.choose_encoder(list(sample([(piece, source.filter) for piece, _ in shares], _PROOF_BYTES)))
    tasks = [
        Task(
            piece=piece,
            index=index,
            root=home.root,
            cache=data.cache,
            tokenizer=tokenizer_at,
            end_of_text=end_of_text,
            encoder=tokenizer.encoder,
            held_out=share,
            filter=source.filter,
        )
        for index, (piece, share) in enumerate(shares)
    ]
    return choice, _encode_all(source, home, tasks, data)


def make_whole(
    source: SourceConfig, home: Home, data: DataConfig, tokenizer: Tokenizer, *, choice: str, records: Sequence[PieceRecord]
) -> Manifest:
    """Writes the manifest. Raises InputError where no document is left."""
    train = tuple(record.train for record in records if record.train)
    validation = tuple(record.validation for record in records if record.validation)
    left_out = sum((Counter(record.left_out) for record in records), Counter[str]())
    told = f"; left out: {', '.join(f'{count:,} {reason}' for reason, count in sorted(left_out.items()))}" if left_out else ""
    if source.validation and not validation:
        raise InputError(f"data.sources: {source.called!r}: validation: {source.validation!r} holds no documents; wants text{told}")
    if not train and not validation:
        raise InputError(f"data.sources: {source.called!r}: holds no documents; wants text{told}")
    made = Manifest(
        format=manifest.FORMAT,
        source=source.called,
        path=source.path,
        held_out=source.validation or f"{data.validation:g}",
        tokenizer=tokenizer.fingerprint,
        vocabulary=tokenizer.vocabulary,
        encoder=choice,
        text_bytes=sum(shard.text_bytes for shard in (*train, *validation)),
        left_out=dict(sorted(left_out.items())),
        train=Split.of(train),
        validation=Split.of(validation, _unigram_entropy(home, validation, tokenizer.vocabulary)),
        fingerprint=manifest.content_identity(train, validation),
    )
    home.write(manifest.NAME, made.model_dump_json(indent=1).encode())
    if left_out[MALFORMED]:
        say(f"prepare: {left_out[MALFORMED]:,} malformed rows were skipped, first {next(r.refused for r in records if r.refused)}")
    say(
        f"prepared {source.called!r}: {made.train.tokens:,} train and {made.validation.tokens:,} validation tokens"
        f" of {made.text_bytes / 1e6:.1f} MB text in {home.root} ({choice}){told}"
    )
    return made


def _pieces(source: SourceConfig, data: DataConfig) -> Sequence[InputSplit]:
    return token_files.token_files(source) if holds_token_files(source) else input_splits(source, data)


def intact(home: Home, *, contents: bool) -> Manifest | None:
    """The corpus's manifest, where there is one and what it says still holds; where it does not, that is said."""
    try:
        home.read(manifest.NAME)
    except FileNotFoundError:
        return None
    try:
        found = manifest.load(home)
        damage = found.problem(home, contents=contents)
    except InputError as error:
        found, damage = None, str(error)
    if damage:
        say(f"prepare: {damage}; it has to be made again")
        return None
    return found


def _encode_all(source: SourceConfig, home: Home, tasks: list[Task], data: DataConfig) -> list[PieceRecord]:
    """The records of all pieces, in order; those that are whole on disk are not made again."""
    records = {task.index: record for task in tasks if (record := _finished(task, home))}
    missing = [task for task in tasks if task.index not in records]
    if records and missing:
        say(f"prepare {source.called} has {len(records)} of {len(tasks)} pieces from before")
    if source.filter.dedup and missing:
        marked = {task.index: task for task in _without_duplicates(source, tasks, data)}
        missing = [marked[task.index] for task in missing]
    work = take_over if holds_token_files(source) else encode
    with progress(f"prepare {source.called}", sum(_weight(task.piece) for task in missing)) as advance:
        for task, record in _run(work, missing, data):
            records[task.index] = record
            advance(_weight(task.piece))
    return [records[task.index] for task in tasks]


def _without_duplicates(source: SourceConfig, tasks: list[Task], data: DataConfig) -> Iterator[Task]:
    """Each task with its documents marked that stand before, in it or in a piece before it. Takes 8 bytes of memory a document."""
    found: dict[int, np.ndarray[tuple[int], np.dtype[np.uint64]]] = {}
    with progress(f"read {source.called} for {DUPLICATE}s", sum(_weight(task.piece) for task in tasks)) as advance:
        for task, these in _run(hashes, tasks, data):
            found[task.index] = these
            advance(_weight(task.piece))
    everything = np.concatenate([found[task.index] for task in tasks])
    first = np.unique(everything, return_index=True)[1]
    again = np.ones(len(everything), dtype=np.bool_)
    again[first] = False
    begin = 0
    for task in tasks:
        end = begin + len(found[task.index])
        yield replace(task, duplicates=np.packbits(again[begin:end]).tobytes())
        begin = end


def _run(work: Work[T], tasks: Sequence[Task], data: DataConfig) -> Iterator[tuple[Task, T]]:
    if data.ray_address is not None:
        from manta.data.prepare.ray_pool import run_on_ray  # Ray: seconds to import

        return run_on_ray(work, tasks, data.ray_address)
    return run_all(work, tasks, data.workers or _cores())


def _finished(task: Task, home: Home) -> PieceRecord | None:
    """What an earlier preparation finished of this piece, where every byte of it is still there; of what is remote, the sizes."""
    try:
        record = PieceRecord.model_validate_json(home.read(task.record))
    except (FileNotFoundError, ValidationError):
        return None
    return None if any(home.problem(shard, contents=home.store.is_local) for shard in record.shards()) else record


def _unigram_entropy(home: Home, parts: Sequence[manifest.Shard], vocabulary: int) -> float | None:
    if not parts:
        return None
    counts = np.zeros(vocabulary, dtype=np.int64)
    for shard in parts:
        counts += np.bincount(home.tokens(shard), minlength=vocabulary)
    return entropy(counts)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _weight(piece: InputSplit) -> int:
    return piece.size or 1
