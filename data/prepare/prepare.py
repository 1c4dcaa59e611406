"""Prepare sources: train a tokenizer and write token shards, once. Existing outputs are reused.

    <directory>/tokenizer-<key>/tokenizer.json  tokenizer.xxh3
    <directory>/<source>-<key>/piece-00000.{train,validation}.{bin,idx,origins}  piece-00000.json  …  manifest.json

A key is a hash of everything that determines a directory's content (names, sizes and times of the files, tokenizer, split, format), so
any change leads to another directory. A killed preparation resumes at the first incomplete split. The bytes do not depend on kills or on
the number of workers. The directory may be a URL: then each shard is written on the node that encodes it, and uploaded.
"""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from filelock import FileLock, Timeout

from manta.data.config import BYTES, DataConfig, TokenizerConfig
from manta.data.config_history import as_version_1, identifying_keys
from manta.data.errors import AccessError, DataError, InputError, one_line
from manta.data.live import live_sources
from manta.data.live.live_samples import LiveSamples
from manta.data.objectives.objective import window_shape
from manta.data.prepare.build import build_shards, complete_corpus, write_manifest
from manta.data.prepare.encode import record_file
from manta.data.prepare.full_disk import disk_error
from manta.data.prepare.progress import progress, report
from manta.data.sampling.packed_windows import find_packing, pack_corpus
from manta.data.sampling.samples import Samples
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import FORMAT, Manifest, PreparedData, digest, joint_fingerprint
from manta.data.source_config import LONGEST_DOCUMENT, SourceConfig
from manta.data.sources.source import identity, select_files, source_files, validation_source
from manta.data.sources.splits import content_kind, input_splits, sample_text
from manta.data.storage.local import LocalStore
from manta.data.storage.location import absolute, join, local_path, resolve
from manta.data.storage.regular_file import make_own_directory
from manta.data.tokenizer.tokenizer import FIM_TOKENS, MASKING_TOKENS, Tokenizer, fingerprint, read_tokenizer
from manta.data.tokenizer.train import train

_TOKENIZER = "tokenizer.json"
_TOKENIZER_HASH = "tokenizer.xxh3"  # older corpora have none
_KIND_NAMES = {"text": "text", "ids": "token ids in a field", "shards": "token shards"}


def find_prepared(data: DataConfig, tokens: TokenizerConfig) -> PreparedData | None:
    """Return what is prepared already, or None if anything is missing. Checks names, sizes and times only.

    Raises InputError if a source or the tokenizer's file does not exist.
    """
    if data.live:
        data = live_sources.with_absolute_paths(data)
    found = find_directories(data, tokens)
    if found is None:
        return None
    tokenizer_directory, directories = found
    if data.live:
        return live_sources.prepare_live(tokenizer_directory.local_copy(_TOKENIZER), data, tokens)
    corpora = [corpus for directory in directories if (corpus := complete_corpus(directory, contents=False))]
    if len(corpora) < len(directories):
        return None
    if data.packing == "best_fit":
        shape = window_shape(data)
        if not all(find_packing(directory, corpus, shape) for directory, corpus in zip(directories, corpora, strict=True)):
            return None
    return _prepared(tokenizer_directory, directories, corpora)


def find_directories(data: DataConfig, tokens: TokenizerConfig) -> tuple[CorpusDirectory, list[CorpusDirectory]] | None:
    """Return the directory of the tokenizer and those of the corpora, which may not exist; None if there is no tokenizer yet."""
    tokenizer_directory = _tokenizer_directory(data, tokens)
    content = _read_tokenizer(tokenizer_directory)
    if content is None:
        return None
    return tokenizer_directory, [_corpus_directory(data, source, tokens, fingerprint(content)) for source in data.sources]


def prepare(data: DataConfig, tokens: TokenizerConfig) -> PreparedData:
    """Make what is missing, and check every byte of what exists. A second preparation at the same time waits for the first.

    Raises InputError for a bad source or tokenizer file, or if there is too little text for a sample; DataError if a process dies, or if
    the disk or the store fails.
    """
    try:
        return _prepare(data, tokens)
    except MemoryError:
        raise DataError("prepare: out of memory. Use fewer data.workers or smaller files; the same command resumes.") from None
    except OSError as error:
        raise disk_error(error, absolute(data.directory)) from None
    except BaseException as error:
        if "can't start new thread" not in str(error) and type(error).__name__ != "PanicException":  # of `tokenizers`, no Exception
            raise
        problem = f"expected to start threads and processes, got an error ({one_line(error)[:300]})"
        raise DataError(f"prepare: {problem}. Raise their limit (ulimit -u, or the container's); the same command resumes.") from None


def _prepare(data: DataConfig, tokens: TokenizerConfig) -> PreparedData:
    with progress("prepare: reading the list of files"):
        if data.live:
            data = live_sources.with_absolute_paths(data)
            live_sources.refuse_token_ids(data)
        tokenizer_directory = _tokenizer_directory(data, tokens)
        if (path := local_path(data.directory)) is not None:
            LocalStore(path).check_writable("data.directory")
        _check_tokenizer(data, tokens)
        _check_sources(data, tokens)
    with _lock(data):
        content = _find_tokenizer(tokenizer_directory, tokens) or _make_tokenizer(tokenizer_directory, data, tokens)
        if data.live:
            prepared = live_sources.prepare_live(tokenizer_directory.local_copy(_TOKENIZER), data, tokens)
            LiveSamples(prepared, data, tokens, seed=0, held_out=1)  # raises InputError if there is no sample
            report(f"data.live: text is tokenized while it is read; only the tokenizer is prepared, in {tokenizer_directory.root}")
            return prepared
        directories = [_corpus_directory(data, source, tokens, fingerprint(content)) for source in data.sources]
        pairs = zip(data.sources, directories, strict=True)
        corpora = [_build(source, directory, data, tokens, tokenizer_directory) for source, directory in pairs]
        if data.packing == "best_fit":
            with progress("prepare: packing documents"):
                for directory, corpus in zip(directories, corpora, strict=True):
                    pack_corpus(directory, corpus, window_shape(data))
    with progress("prepare: opening the corpus"):
        prepared = _prepared(tokenizer_directory, directories, corpora)
        Samples(prepared, data, tokens, seed=0)  # raises InputError if there is no sample
    return prepared


def _check_sources(data: DataConfig, tokens: TokenizerConfig) -> None:
    """Raise InputError for a missing file, a validation path that does not fit, token ids without their tokenizer, or unused keys."""
    for source in data.sources:
        key = f"data.sources: {source.resolved_name!r}"
        files, notes = select_files(source)
        for note in notes:
            report(f"prepare: {source.resolved_name}: {note}")
        kind, validation = content_kind(source, data), validation_source(source)
        if kind != "text" and tokens.file is None:
            raise InputError(f"{key}: expected text, or the tokenizer that wrote its token ids, got token ids. Set tokenizer.file.")
        for name in ("filter", "template", "text_field") if kind == "shards" else ():
            if getattr(source, name) != SourceConfig.model_fields[name].default:
                raise InputError(f"{key}: expected no {name} for token shards, which have no text, got one. Remove it.")
        if validation is not None:
            if (other := content_kind(validation, data)) != kind:
                raise InputError(f"{key}: validation: expected {_KIND_NAMES[kind]} as in its path, got {_KIND_NAMES[other]}. Use one kind.")
            if shared := {resolve(file.path) for file in files} & {resolve(file.path) for file in source_files(validation)}:
                raise InputError(f"{key}: validation: expected other files than its path has, got {min(shared)} in both. Separate them.")


def _check_tokenizer(data: DataConfig, tokens: TokenizerConfig) -> None:
    """Raise InputError if the tokenizer, or the size of the one to train, does not fit the objective."""
    if tokens.file:
        tokenizer = Tokenizer(tokens.file, end_of_text=tokens.end_of_text)
        if data.objective == "masked":
            tokenizer.special_tokens(whole_words=data.whole_words)
        if data.fill_in_the_middle:
            tokenizer.fim_tokens()
        return
    special = {tokens.end_of_text, *_special_tokens(data)}
    if tokens.vocabulary < (least := BYTES + len(special)):
        problem = f"expected at least {least} ({BYTES} bytes and {' '.join(sorted(special))}), got {tokens.vocabulary}"
        raise InputError(f"tokenizer.vocabulary: {problem}. Raise it.")


def _special_tokens(data: DataConfig) -> tuple[str, ...]:
    """Return the special tokens that the objective needs from a tokenizer that is trained for it."""
    if data.objective == "masked":
        return MASKING_TOKENS
    return FIM_TOKENS if data.fill_in_the_middle else ()


def _find_tokenizer(directory: CorpusDirectory, tokens: TokenizerConfig) -> str | None:
    """Return the text of an existing tokenizer; None if there is none, or a damaged one."""
    try:
        content = _read_tokenizer(directory)
        if content is not None:
            Tokenizer(directory.local_copy(_TOKENIZER), end_of_text=tokens.end_of_text)
    except AccessError:
        raise
    except InputError as error:
        report(f"prepare: {error} It is built again.")
        return None
    return content


def _read_tokenizer(directory: CorpusDirectory) -> str | None:
    """Return the text of an existing tokenizer; None if there is none, or another than was written. Raises InputError if it is no file."""
    try:
        content = directory.read(_TOKENIZER).decode(errors="replace")
    except FileNotFoundError:
        return None
    try:
        written = directory.read(_TOKENIZER_HASH)
    except FileNotFoundError:
        return content
    if fingerprint(content).encode() != written:
        report(f"{directory.location(_TOKENIZER)}: damaged; its content has changed since it was written. It counts as missing.")
        return None
    return content


def _make_tokenizer(directory: CorpusDirectory, data: DataConfig, tokens: TokenizerConfig) -> str:
    if tokens.file:
        content = read_tokenizer(tokens.file)
    else:
        report(f"tokenizer: training {tokens.vocabulary} tokens on up to {tokens.train_bytes / 1e6:.1f} MB of text")
        with progress("tokenizer: reading the list of files"):
            splits = [(split, source.filter) for source in data.sources for split in input_splits(source, data)]
        with progress("tokenizer: training"):
            content = train(
                sample_text(splits, tokens.train_bytes),
                algorithm=tokens.algorithm,
                vocabulary=tokens.vocabulary,
                lowercase=tokens.lowercase,
                end_of_text=tokens.end_of_text,
                special_tokens=_special_tokens(data),
            )
    directory.store.create()
    directory.store.write(_TOKENIZER_HASH, fingerprint(content).encode())
    directory.store.write(_TOKENIZER, content.encode())
    size = Tokenizer(directory.local_copy(_TOKENIZER), end_of_text=tokens.end_of_text).vocabulary
    if not tokens.file and size < tokens.vocabulary:
        report(f"tokenizer: {size} tokens; the text has no more than these")
    return content


def _build(
    source: SourceConfig, directory: CorpusDirectory, data: DataConfig, tokens: TokenizerConfig, tokenizer_directory: CorpusDirectory
) -> Manifest:
    with progress(f"prepare {source.resolved_name}: verifying what exists"):
        corpus = complete_corpus(directory, contents=directory.store.is_local)
    if corpus is not None:
        return corpus
    tokenizer = Tokenizer(tokenizer_directory.local_copy(_TOKENIZER), end_of_text=tokens.end_of_text)
    file = tokenizer_directory.location(_TOKENIZER)
    records, encoder = build_shards(source, directory, data, tokenizer, tokenizer_file=file, end_of_text=tokens.end_of_text)
    if _corpus_directory(data, source, tokens, tokenizer.fingerprint).root != directory.root:
        for index in range(len(records)):  # else they would count as complete if the file is restored
            directory.store.delete(record_file(index))
        problem = "expected files that do not change, got one that changed while it was read"
        raise InputError(f"data.sources: {source.resolved_name!r}: {problem}. Prepare again.")
    return write_manifest(source, directory, data, tokenizer, records=records, encoder=encoder)


def _tokenizer_directory(data: DataConfig, tokens: TokenizerConfig) -> CorpusDirectory:
    if tokens.file:
        return _directory(data, "tokenizer", [fingerprint(read_tokenizer(tokens.file))])
    config = as_version_1(identifying_keys(tokens, "tokenizer"), "tokenizer")
    del config["file"]
    trained_on = [identity(source) for source in data.sources]
    return _directory(data, "tokenizer", [trained_on, data.text_field, config, *_special_tokens(data)])


def _corpus_directory(data: DataConfig, source: SourceConfig, tokens: TokenizerConfig, tokenizer: str) -> CorpusDirectory:
    config = as_version_1(identifying_keys(source, "data.sources"), "data.sources")
    del config["name"], config["epochs"]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", source.resolved_name).strip("-")[-40:].strip("-") or "corpus"
    content = [identity(source), config, tokenizer, tokens.end_of_text, data.validation, data.text_field, data.bad_rows]
    if data.bad_rows == "skip" and data.longest_document != LONGEST_DOCUMENT:
        content.append(data.longest_document)
    return _directory(data, slug, content)


def _directory(data: DataConfig, name: str, content: Sequence[object]) -> CorpusDirectory:
    """Return the directory that is named by a hash of what determines its content."""
    key = digest([FORMAT, *content])[:12]
    return CorpusDirectory(join(absolute(data.directory), f"{name}-{key}"), data.cache)


def _prepared(tokenizer_directory: CorpusDirectory, directories: Sequence[CorpusDirectory], corpora: Sequence[Manifest]) -> PreparedData:
    return PreparedData(
        tokenizer=tokenizer_directory.local_copy(_TOKENIZER),
        corpora=tuple(directory.root for directory in directories),
        fingerprint=joint_fingerprint(tuple(corpora)),
    )


@contextmanager
def _lock(data: DataConfig) -> Generator[None]:
    """Allow one preparation at a time in a directory; of a URL, one per node: two write the same bytes."""
    local = local_path(data.directory)
    directory = local or data.cache.directory.expanduser() / f"prepare-{digest(data.directory)[:12]}"
    try:
        if local:
            directory.mkdir(parents=True, exist_ok=True)
        else:
            make_own_directory(directory)
        lock = FileLock(directory / "prepare.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"prepare: waiting for another preparation in {data.directory}")
            with progress("prepare: waiting"):
                lock.acquire()
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        problem = f"expected a directory that can be written, got {error.filename or directory} ({error.strerror})"
        raise InputError(f"data.directory: {problem}. Choose another.") from None
    try:
        yield
    finally:
        lock.release()
