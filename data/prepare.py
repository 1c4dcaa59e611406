"""Sources and a tokenizer become token shards, once: what is there already is found, what is missing is made.

    <directory>/tokenizer-<key>/tokenizer.json
    <directory>/<source>-<key>/piece-00000.{train,validation}.{bin,idx}  piece-00000.json  …  manifest.json

A key hashes all that decides a directory's content (names, sizes and times of the files, tokenizer, split, format), so a change of
any of them is another directory and never a mixture. A killed preparation goes on piece by piece; the result is the same to the byte,
on any number of workers. The directory may be a URL: then a piece is written on the node that made it, and uploaded.
"""

import os
import re
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from pydantic import ValidationError

from manta.data import corpus, foreign, live_sources, manifest, tokenizer
from manta.data.config import BYTES, DataConfig, TokenizerConfig
from manta.data.durable import TEMPORARY
from manta.data.encode import DUPLICATE, MALFORMED, Task, encode, hashes, sample
from manta.data.errors import InputError
from manta.data.examples import shape_of
from manta.data.foreign import take_over
from manta.data.formats import Piece
from manta.data.home import Home
from manta.data.live import LiveSamples
from manta.data.manifest import Manifest, PieceRecord, Prepared, Split, digest
from manta.data.packed import find_packings, pack
from manta.data.progress import progress, say
from manta.data.remote import is_remote, join
from manta.data.samples import Samples, entropy
from manta.data.source import SourceConfig
from manta.data.tokenizer_training import train
from manta.data.worker import T, Work, run_all

_PROOF_BYTES = 1_000_000  # text of a source on which a faster encoder must equal the reference
_TOKENIZER = "tokenizer.json"


def find(data: DataConfig, tokens: TokenizerConfig) -> Prepared | None:
    """What is prepared already, or None where anything is missing. Looks at names, sizes and times only.

    Raises InputError where a source or the tokenizer's file does not exist.
    """
    data = live_sources.placed(data) if data.live else data
    there = places(data, tokens)
    if there is None:
        return None
    home, homes = there
    if data.live:
        return live_sources.as_prepared(home.copy(_TOKENIZER), data, tokens)
    manifests = [found for corpus_home in homes if (found := _intact(corpus_home, contents=False))]
    if len(manifests) < len(homes):
        return None
    pairs = zip(homes, manifests, strict=True)
    if data.packing == "best_fit" and not all(find_packings(*pair, shape_of(data)) for pair in pairs):
        return None
    return _prepared(home, homes, manifests)


def places(data: DataConfig, tokens: TokenizerConfig) -> tuple[Home, list[Home]] | None:
    """Where the tokenizer lies, and where each source's corpus does or would, whole or not; None where there is no tokenizer yet."""
    home = _tokenizer_home(data, tokens)
    try:
        content = home.read(_TOKENIZER).decode()
    except FileNotFoundError:
        return None
    return home, [_corpus_home(data, source, tokens, tokenizer.fingerprint(content)) for source in data.sources]


def prepare(data: DataConfig, tokens: TokenizerConfig) -> Prepared:
    """Make what is missing and check every byte of what is there. Two at once are safe: the second waits, then finds the work done.

    Raises InputError for whatever is wrong with a source, with the tokenizer's file, or with so little text that no sample results.
    """
    if data.live:
        data = live_sources.placed(data)
        live_sources.refuse_ids(data)
    home = _tokenizer_home(data, tokens)
    _check_tokenizer(data, tokens)
    for source in data.sources:
        for one in (source, corpus.held_out(source)):
            if one is not None:
                corpus.files(one)  # what is missing is told before anything is written
    with _alone(data):
        try:
            content = home.read(_TOKENIZER).decode()
        except FileNotFoundError:
            content = _make_tokenizer(home, data, tokens)
        if data.live:
            return _live(home, data, tokens)
        homes = [_corpus_home(data, source, tokens, tokenizer.fingerprint(content)) for source in data.sources]
        manifests = [_make_corpus(*pair, data, tokens, home) for pair in zip(data.sources, homes, strict=True)]
        if data.packing == "best_fit":
            for corpus_home, made in zip(homes, manifests, strict=True):
                pack(corpus_home, made, shape_of(data))
    prepared = _prepared(home, homes, manifests)
    Samples(prepared, data, tokens, seed=0)  # raises where no sample results
    return prepared


def _live(home: Home, data: DataConfig, tokens: TokenizerConfig) -> Prepared:
    """Of a corpus that is tokenized while it is read, only the tokenizer is made."""
    prepared = live_sources.as_prepared(home.copy(_TOKENIZER), data, tokens)
    LiveSamples(prepared, data, tokens, seed=0, held_out=1)  # raises where no sample results
    say(f"data.live: text is tokenized while it is read; only the tokenizer is prepared, in {home.root}")
    return prepared


def _check_tokenizer(data: DataConfig, tokens: TokenizerConfig) -> None:
    """Raises InputError where the tokenizer's file, or the size of the one to train, is of no use for the objective."""
    if tokens.file:
        given = tokenizer.Tokenizer(tokens.file, end_of_text=tokens.end_of_text)
        if data.objective == "masked":
            given.special_tokens(whole_words=data.whole_words)
        if data.fill_in_the_middle:
            given.fim_tokens()
        return
    for source in data.sources:
        if corpus.is_tokens(source):
            raise InputError(f"data.sources: {source.called!r}: holds token ids; wants the tokenizer that wrote them: set tokenizer.file")
    special = {tokens.end_of_text, *_marks(data)}
    if tokens.vocabulary < BYTES + len(special):
        least = f"at least {BYTES + len(special)}: {BYTES} bytes and {' '.join(sorted(special))}"
        raise InputError(f"tokenizer.vocabulary: got {tokens.vocabulary}, wants {least}; raise it")


def _marks(data: DataConfig) -> tuple[str, ...]:
    """The special tokens that the objective asks of a tokenizer that is trained for it."""
    if data.objective == "masked":
        return tokenizer.MARKS
    return tokenizer.FIM_MARKS if data.fill_in_the_middle else ()


def _make_tokenizer(home: Home, data: DataConfig, tokens: TokenizerConfig) -> str:
    if tokens.file:
        content = tokenizer.read(tokens.file)
    else:
        say(f"tokenizer: training {tokens.vocabulary} tokens on up to {tokens.train_bytes / 1e6:.1f} MB of text")
        pieces = [piece for source in data.sources for piece in corpus.pieces(source, data)]
        content = train(
            sample(pieces, tokens.train_bytes),
            algorithm=tokens.algorithm,
            vocabulary=tokens.vocabulary,
            lowercase=tokens.lowercase,
            end_of_text=tokens.end_of_text,
            marks=_marks(data),
        )
    if not is_remote(home.root):
        Path(home.root).mkdir(exist_ok=True)
    home.write(_TOKENIZER, content.encode())
    return content


def _make_corpus(source: SourceConfig, home: Home, data: DataConfig, tokens: TokenizerConfig, tokenizer_home: Home) -> Manifest:
    if found := _intact(home, contents=not is_remote(home.root)):
        return found
    home.delete(manifest.NAME)
    if not is_remote(home.root):
        Path(home.root).mkdir(exist_ok=True)
        for leftover in Path(home.root).glob(f".*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)
    opened = tokenizer.Tokenizer(tokenizer_home.copy(_TOKENIZER), end_of_text=tokens.end_of_text)
    held_out = corpus.held_out(source)
    parts = [(_pieces(source, data), 0.0 if held_out else data.validation), (_pieces(held_out, data), 1.0) if held_out else ([], 1.0)]
    if corpus.is_tokens(source):
        choice = "none: token ids, read where they lie"
    else:
        choice = opened.choose_encoder(list(sample([piece for pieces, _ in parts for piece in pieces], _PROOF_BYTES)))
    tasks = [
        Task(
            piece=piece,
            index=index,
            root=home.root,
            cache=data.cache,
            tokenizer=tokenizer_home.at(_TOKENIZER),
            end_of_text=tokens.end_of_text,
            encoder=opened.encoder,
            held_out=share,
            filter=source.filter,
        )
        for index, (piece, share) in enumerate((piece, share) for pieces, share in parts for piece in pieces)
    ]
    records = _encode_all(source, tasks, data)
    if _corpus_home(data, source, tokens, opened.fingerprint).root != home.root:
        raise InputError(f"data.sources: {source.called!r}: a file changed while it was read; wants one that stands still: prepare again")
    train = tuple(record.train for record in records if record.train)
    validation = tuple(record.validation for record in records if record.validation)
    left_out = sum((Counter(record.left_out) for record in records), Counter[str]())
    told = f"; left out: {', '.join(f'{count:,} {reason}' for reason, count in sorted(left_out.items()))}" if left_out else ""
    if not train and not validation:
        raise InputError(f"data.sources: {source.called!r}: holds no documents; wants text{told}")
    made = Manifest(
        format=manifest.FORMAT,
        source=source.called,
        path=source.path,
        held_out=source.validation or f"{data.validation:g}",
        tokenizer=opened.fingerprint,
        vocabulary=opened.vocabulary,
        encoder=choice,
        text_bytes=sum(shard.text_bytes for shard in (*train, *validation)),
        left_out=dict(sorted(left_out.items())),
        train=Split.of(train),
        validation=Split.of(validation, _unigram_entropy(home, validation, opened.vocabulary)),
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


def _pieces(source: SourceConfig, data: DataConfig) -> Sequence[Piece]:
    return foreign.token_files(source) if corpus.is_tokens(source) else corpus.pieces(source, data)


def _intact(home: Home, *, contents: bool) -> Manifest | None:
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


def _encode_all(source: SourceConfig, tasks: list[Task], data: DataConfig) -> list[PieceRecord]:
    """The records of all pieces, in order; those that are whole on disk are not made again."""
    home = Home(tasks[0].root, data.cache) if tasks else None
    records = {task.index: record for task in tasks if home and (record := _finished(task, home))}
    missing = [task for task in tasks if task.index not in records]
    if records and missing:
        say(f"prepare {source.called} has {len(records)} of {len(tasks)} pieces from before")
    if source.filter.unique and missing:
        marked = {task.index: task for task in _without_duplicates(source, tasks, data)}
        missing = [marked[task.index] for task in missing]
    work = take_over if corpus.is_tokens(source) else encode
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
    if data.ray is not None:
        from manta.data.fleet import run_on_ray  # Ray: seconds to import

        return run_on_ray(work, tasks, data.ray)
    return run_all(work, tasks, data.workers or _cores())


def _finished(task: Task, home: Home) -> PieceRecord | None:
    """What an earlier preparation finished of this piece, where every byte of it is still there; of what is remote, the sizes."""
    try:
        record = PieceRecord.model_validate_json(home.read(task.record))
    except (FileNotFoundError, ValidationError):
        return None
    contents = not is_remote(task.root)
    return None if any(home.problem(shard, contents=contents) for shard in record.shards()) else record


def _unigram_entropy(home: Home, parts: Sequence[manifest.Shard], vocabulary: int) -> float | None:
    if not parts:
        return None
    counts = np.zeros(vocabulary, dtype=np.int64)
    for shard in parts:
        counts += np.bincount(home.tokens(shard), minlength=vocabulary)
    return entropy(counts)


def _tokenizer_home(data: DataConfig, tokens: TokenizerConfig) -> Home:
    if tokens.file:
        decides: list[object] = [tokenizer.fingerprint(tokenizer.read(tokens.file))]
    else:
        trained_on = [corpus.identity(source) for source in data.sources]
        decides = [trained_on, data.text_field, tokens.model_dump(mode="json", exclude={"file"}), *_marks(data)]
    return Home(_below(data, f"tokenizer-{_key(decides)}"), data.cache)


def _corpus_home(data: DataConfig, source: SourceConfig, tokens: TokenizerConfig, fingerprint: str) -> Home:
    how = source.model_dump(mode="json", exclude={"name", "epochs"})
    decides: list[object] = [corpus.identity(source), how, fingerprint, tokens.end_of_text, data.validation, data.text_field, data.bad_rows]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", source.called).strip("-")[-40:].strip("-") or "corpus"
    return Home(_below(data, f"{slug}-{_key(decides)}"), data.cache)


def _below(data: DataConfig, name: str) -> str:
    return join(data.directory, name) if is_remote(data.directory) else str(Path(data.directory).absolute() / name)


def _key(decides: list[object]) -> str:
    return digest([manifest.FORMAT, *decides])[:12]


def _prepared(tokenizer_home: Home, homes: Sequence[Home], manifests: Sequence[Manifest]) -> Prepared:
    return Prepared(
        tokenizer=tokenizer_home.copy(_TOKENIZER),
        corpora=tuple(home.root for home in homes),
        fingerprint=manifest.joint_fingerprint(tuple(manifests)),
    )


@contextmanager
def _alone(data: DataConfig) -> Generator[None]:
    """One preparation at a time in a directory; the lock dies with its holder. Of a remote one, on this node: two write the same."""
    if is_remote(data.directory):
        directory = data.cache.directory.expanduser() / f"prepare-{digest(data.directory)[:12]}"
    else:
        directory = Path(data.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / "prepare.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another preparation works in {data.directory}; waiting for it")
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
