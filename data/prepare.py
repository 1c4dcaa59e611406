"""Sources and a tokenizer become token shards, once: what is there already is found, what is missing is made.

    <directory>/tokenizer-<key>/tokenizer.json
    <directory>/<source>-<key>/piece-00000.{train,validation}.{bin,idx}  piece-00000.json  …  manifest.json

A key hashes all that decides a directory's content (names, sizes and times of the files, tokenizer, split, format), so a change of
any of them is another directory and never a mixture. A killed preparation goes on piece by piece; the result is the same to the byte,
on any number of workers.
"""

import multiprocessing
import os
import re
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import numpy as np
from filelock import FileLock, Timeout
from pydantic import ValidationError

from manta.data import corpus, manifest, shards, tokenizer
from manta.data.config import BYTES, DataConfig, TokenizerConfig
from manta.data.durable import TEMPORARY, write_atomically
from manta.data.encode import Task, encode, sample, start_worker
from manta.data.errors import InputError
from manta.data.formats import Piece
from manta.data.manifest import Manifest, PieceRecord, Prepared, Split, digest
from manta.data.progress import progress, say
from manta.data.samples import Samples, entropy

_PROOF_BYTES = 1_000_000  # text of a source on which a faster encoder must equal the reference


def find(data: DataConfig, tokens: TokenizerConfig) -> Prepared | None:
    """What is prepared already, or None where anything is missing. Looks at names, sizes and times only.

    Raises InputError where a source or the tokenizer's file does not exist.
    """
    file = _tokenizer_file(data, tokens)
    if not file.exists():
        return None
    fingerprint = tokenizer.fingerprint(tokenizer.read(file))
    directories = [_corpus_directory(data, source.path, tokens, fingerprint) for source in data.sources]
    manifests = [found for directory in directories if (found := _intact(directory, contents=False))]
    return _prepared(file, directories, manifests) if len(manifests) == len(directories) else None


def prepare(data: DataConfig, tokens: TokenizerConfig) -> Prepared:
    """Make what is missing and check every byte of what is there. Two at once are safe: the second waits, then finds the work done.

    Raises InputError for whatever is wrong with a source, with the tokenizer's file, or with so little text that no sample results.
    """
    _tokenizer_file(data, tokens)
    _check_tokenizer(data, tokens)
    for source in data.sources:
        corpus.files(source.path)  # what is missing is told before anything is written
    with _alone(Path(data.directory)):
        file = _tokenizer_file(data, tokens)
        if not file.exists():
            _make_tokenizer(file, data, tokens)
        fingerprint = tokenizer.fingerprint(tokenizer.read(file))
        directories = [_corpus_directory(data, source.path, tokens, fingerprint) for source in data.sources]
        manifests = [
            _make_corpus(*pair, data, tokens, file) for pair in zip([source.path for source in data.sources], directories, strict=True)
        ]
    prepared = _prepared(file, directories, manifests)
    Samples(prepared, data, tokens, seed=0)  # raises where no sample results
    return prepared


def _check_tokenizer(data: DataConfig, tokens: TokenizerConfig) -> None:
    """Raises InputError where the tokenizer's file, or the size of the one to train, is of no use for the objective."""
    if tokens.file:
        given = tokenizer.Tokenizer(tokens.file, end_of_text=tokens.end_of_text)
        if data.objective == "masked":
            given.special_tokens()
        return
    special = {tokens.end_of_text, *_marks(data)}
    if tokens.vocabulary < BYTES + len(special):
        least = f"at least {BYTES + len(special)}: {BYTES} bytes and {' '.join(sorted(special))}"
        raise InputError(f"tokenizer.vocabulary: got {tokens.vocabulary}, wants {least}; raise it")


def _marks(data: DataConfig) -> tuple[str, ...]:
    """The special tokens that the objective asks of a tokenizer that is trained for it."""
    return tokenizer.MARKS if data.objective == "masked" else ()


def _make_tokenizer(file: Path, data: DataConfig, tokens: TokenizerConfig) -> None:
    if tokens.file:
        content = tokenizer.read(tokens.file)
    else:
        say(f"tokenizer: training {tokens.vocabulary} tokens on up to {tokens.train_bytes / 1e6:.1f} MB of text")
        pieces = [piece for source in data.sources for piece in corpus.pieces(source.path, data.text_field)]
        texts = sample(pieces, tokens.train_bytes)
        content = tokenizer.train(texts, vocabulary=tokens.vocabulary, end_of_text=tokens.end_of_text, marks=_marks(data))
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, content.encode())


def _make_corpus(source: str, directory: Path, data: DataConfig, tokens: TokenizerConfig, file: Path) -> Manifest:
    if found := _intact(directory, contents=True):
        return found
    (directory / manifest.NAME).unlink(missing_ok=True)
    pieces = corpus.pieces(source, data.text_field)
    opened = tokenizer.Tokenizer(file, end_of_text=tokens.end_of_text)
    choice = opened.choose_encoder(list(sample(pieces, _PROOF_BYTES)))
    directory.mkdir(exist_ok=True)
    for leftover in directory.glob(f".*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)
    tasks = [
        Task(
            piece=piece,
            index=index,
            directory=directory,
            tokenizer=file,
            end_of_text=tokens.end_of_text,
            encoder=opened.encoder,
            validation=data.validation,
        )
        for index, piece in enumerate(pieces)
    ]
    records = _encode_all(source, tasks, data.workers)
    if _corpus_directory(data, source, tokens, opened.fingerprint) != directory:
        raise InputError(f"data.sources: {source!r}: a file changed while it was read; wants one that stands still: prepare again")
    train = tuple(record.train for record in records if record.train)
    validation = tuple(record.validation for record in records if record.validation)
    if not train and not validation:
        raise InputError(f"data.sources: {source!r}: holds no documents; wants text")
    made = Manifest(
        format=manifest.FORMAT,
        source=source,
        text_field=data.text_field,
        validation_share=data.validation,
        tokenizer=opened.fingerprint,
        vocabulary=opened.vocabulary,
        encoder=choice,
        text_bytes=sum(shard.text_bytes for shard in (*train, *validation)),
        train=Split.of(train),
        validation=Split.of(validation, _unigram_entropy(directory, validation, opened.vocabulary)),
        fingerprint=manifest.content_identity(train, validation),
    )
    write_atomically(directory / manifest.NAME, made.model_dump_json(indent=1).encode())
    say(
        f"prepared {source!r}: {made.train.tokens:,} train and {made.validation.tokens:,} validation tokens"
        f" of {made.text_bytes / 1e6:.1f} MB text in {directory} ({choice})"
    )
    return made


def _intact(directory: Path, *, contents: bool) -> Manifest | None:
    """The corpus's manifest, where there is one and what it says still holds; where it does not, that is said."""
    if not (directory / manifest.NAME).exists():
        return None
    try:
        found = manifest.load(directory)
        damage = found.problem(directory, contents=contents)
    except InputError as error:
        found, damage = None, str(error)
    if damage:
        say(f"prepare: {damage}; it has to be made again")
        return None
    return found


def _encode_all(source: str, tasks: list[Task], workers: int | None) -> list[PieceRecord]:
    """The records of all pieces, in order; those that are whole on disk are not made again."""
    records = {task.index: record for task in tasks if (record := _finished(task))}
    missing = [task for task in tasks if task.index not in records]
    if records and missing:
        say(f"prepare {source} has {len(records)} of {len(tasks)} pieces from before")
    with progress(f"prepare {source}", sum(_weight(task.piece) for task in missing)) as advance:
        for task, record in _encode_each(missing, workers or _cores()):
            records[task.index] = record
            advance(_weight(task.piece))
    return [records[task.index] for task in tasks]


def _encode_each(tasks: list[Task], workers: int) -> Iterator[tuple[Task, PieceRecord]]:
    """Each task and its record, as they come. The first error of any ends all."""
    if min(workers, len(tasks)) <= 1:
        yield from ((task, encode(task)) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    theirs, ours = cast("tuple[Connection, Connection]", context.Pipe(duplex=False))
    with theirs, ours, ProcessPoolExecutor(min(workers, len(tasks)), context, start_worker, (theirs,)) as pool:
        waiting: dict[Future[PieceRecord], Task] = {pool.submit(encode, task): task for task in tasks}
        try:
            for future in as_completed(list(waiting)):
                yield waiting[future], future.result()
                del waiting[future]
        except BrokenProcessPool:
            suspects = "; ".join(task.piece.name for task in islice(waiting.values(), workers))
            raise RuntimeError(f"a process died (killed, or out of memory) while it encoded one of: {suspects}; run again") from None
        except BaseException:
            ours.close()  # the others may be in the midst of hours of work that nobody wants any more
            raise


def _finished(task: Task) -> PieceRecord | None:
    """What an earlier preparation finished of this piece, where every byte of it is still there."""
    try:
        record = PieceRecord.model_validate_json(task.record.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return None if any(shards.problem(task.directory, shard, contents=True) for shard in record.shards()) else record


def _unigram_entropy(directory: Path, parts: tuple[shards.Shard, ...], vocabulary: int) -> float | None:
    if not parts:
        return None
    counts = np.zeros(vocabulary, dtype=np.int64)
    for shard in parts:
        counts += np.bincount(shards.map_tokens(directory / shard.file, shards.dtype_for(vocabulary)), minlength=vocabulary)
    return entropy(counts)


def _tokenizer_file(data: DataConfig, tokens: TokenizerConfig) -> Path:
    if tokens.file:
        decides: list[object] = [tokenizer.fingerprint(tokenizer.read(tokens.file))]
    else:
        trained_on = [corpus.identity(source.path) for source in data.sources]
        decides = [trained_on, data.text_field, tokens.vocabulary, tokens.train_bytes, tokens.end_of_text, *_marks(data)]
    return Path(data.directory).absolute() / f"tokenizer-{_key(decides)}" / "tokenizer.json"


def _corpus_directory(data: DataConfig, source: str, tokens: TokenizerConfig, fingerprint: str) -> Path:
    key = _key([corpus.identity(source), fingerprint, tokens.end_of_text, data.validation, data.text_field])
    slug = re.sub(r"[^A-Za-z0-9]+", "-", source).strip("-")[-40:].strip("-") or "corpus"
    return Path(data.directory).absolute() / f"{slug}-{key}"


def _key(decides: list[object]) -> str:
    return digest([manifest.FORMAT, *decides])[:12]


def _prepared(file: Path, directories: list[Path], manifests: list[Manifest]) -> Prepared:
    return Prepared(tokenizer=file, corpora=tuple(directories), fingerprint=manifest.joint_fingerprint(tuple(manifests)))


@contextmanager
def _alone(directory: Path) -> Generator[None]:
    """One preparation at a time in a directory; the lock dies with its holder."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / "prepare.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another preparation works in {directory}; waiting for it")
            lock.acquire()
    except OSError as error:
        raise InputError(f"data.directory: {directory}: {error.strerror}; wants a directory that can be written") from None
    try:
        yield
    finally:
        lock.release()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _weight(piece: Piece) -> int:
    return piece.size or 1
