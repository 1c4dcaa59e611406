"""Sources and a tokenizer become token shards, once: what is there already is found, what is missing is made.

    <directory>/tokenizer-<key>/tokenizer.json
    <directory>/<source>-<key>/piece-00000.{train,validation}.{bin,idx}  piece-00000.json  …  manifest.json

A key hashes all that decides a directory's content (names, sizes and times of the files, tokenizer, split, format), so a change of
any of them is another directory and never a mixture. A killed preparation goes on piece by piece; the result is the same to the byte,
on any number of workers. The directory may be a URL: then a piece is written on the node that made it, and uploaded.
"""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from filelock import FileLock, Timeout

from manta.data.config import BYTES, DataConfig, TokenizerConfig
from manta.data.config_history import as_version_1, identifying_keys
from manta.data.errors import InputError
from manta.data.live import live_sources
from manta.data.live.live_samples import LiveSamples
from manta.data.objectives.objective import window_shape
from manta.data.prepare.build import intact, make_shards, make_whole
from manta.data.prepare.checks import check_sources
from manta.data.prepare.encode import record_file, sample
from manta.data.prepare.progress import say
from manta.data.sampling.packed_windows import find_packing, pack_corpus
from manta.data.sampling.samples import Samples
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import Home
from manta.data.shards.manifest import Manifest, Prepared, digest
from manta.data.sources.config import SourceConfig
from manta.data.sources.source import identity
from manta.data.sources.splits import input_splits
from manta.data.storage.location import absolute, join, local_path
from manta.data.tokenizer import tokenizer
from manta.data.tokenizer.train import train

_TOKENIZER = "tokenizer.json"


def find(data: DataConfig, tokens: TokenizerConfig) -> Prepared | None:
    """What is prepared already, or None where anything is missing. Looks at names, sizes and times only.

    Raises InputError where a source or the tokenizer's file does not exist.
    """
    if data.live:
        data = live_sources.with_absolute_paths(data)
    there = places(data, tokens)
    if there is None:
        return None
    home, homes = there
    if data.live:
        return live_sources.prepare_live(home.copy(_TOKENIZER), data, tokens)
    manifests = [found for corpus_home in homes if (found := intact(corpus_home, contents=False))]
    if len(manifests) < len(homes):
        return None
    pairs = zip(homes, manifests, strict=True)
    if data.packing == "best_fit" and not all(find_packing(*pair, window_shape(data)) for pair in pairs):
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
        data = live_sources.with_absolute_paths(data)
        live_sources.refuse_token_ids(data)
    home = _tokenizer_home(data, tokens)
    _check_tokenizer(data, tokens)
    check_sources(data, tokens)
    with _alone(data):
        content = _whole_tokenizer(home, tokens) or _make_tokenizer(home, data, tokens)
        if data.live:
            return _live(home, data, tokens)
        homes = [_corpus_home(data, source, tokens, tokenizer.fingerprint(content)) for source in data.sources]
        manifests = [_make_corpus(*pair, data, tokens, home) for pair in zip(data.sources, homes, strict=True)]
        if data.packing == "best_fit":
            for corpus_home, made in zip(homes, manifests, strict=True):
                pack_corpus(corpus_home, made, window_shape(data))
    prepared = _prepared(home, homes, manifests)
    Samples(prepared, data, tokens, seed=0)  # raises where no sample results
    return prepared


def _live(home: Home, data: DataConfig, tokens: TokenizerConfig) -> Prepared:
    """Of a corpus that is tokenized while it is read, only the tokenizer is made."""
    prepared = live_sources.prepare_live(home.copy(_TOKENIZER), data, tokens)
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
    special = {tokens.end_of_text, *_marks(data)}
    if tokens.vocabulary < BYTES + len(special):
        least = f"at least {BYTES + len(special)}: {BYTES} bytes and {' '.join(sorted(special))}"
        raise InputError(f"tokenizer.vocabulary: got {tokens.vocabulary}, wants {least}; raise it")


def _marks(data: DataConfig) -> tuple[str, ...]:
    """The special tokens that the objective asks of a tokenizer that is trained for it."""
    if data.objective == "masked":
        return tokenizer.MASKING_TOKENS
    return tokenizer.FIM_TOKENS if data.fill_in_the_middle else ()


def _whole_tokenizer(home: Home, tokens: TokenizerConfig) -> str | None:
    """The text of the tokenizer that an earlier preparation made; where that is damaged, it is said, and None."""
    try:
        content = home.read(_TOKENIZER)
    except FileNotFoundError:
        return None
    try:
        tokenizer.Tokenizer(home.copy(_TOKENIZER), end_of_text=tokens.end_of_text)
    except InputError as error:
        say(f"prepare: {error}; it has to be made again")
        return None
    return content.decode()


def _make_tokenizer(home: Home, data: DataConfig, tokens: TokenizerConfig) -> str:
    if tokens.file:
        content = tokenizer.read_tokenizer(tokens.file)
    else:
        say(f"tokenizer: training {tokens.vocabulary} tokens on up to {tokens.train_bytes / 1e6:.1f} MB of text")
        pieces = [(piece, source.filter) for source in data.sources for piece in input_splits(source, data)]
        content = train(
            sample(pieces, tokens.train_bytes),
            algorithm=tokens.algorithm,
            vocabulary=tokens.vocabulary,
            lowercase=tokens.lowercase,
            end_of_text=tokens.end_of_text,
            special_tokens=_marks(data),
        )
    home.store.create()
    home.write(_TOKENIZER, content.encode())
    return content


def _make_corpus(source: SourceConfig, home: Home, data: DataConfig, tokens: TokenizerConfig, tokenizer_home: Home) -> Manifest:
    if found := intact(home, contents=home.store.is_local):
        return found
    opened = tokenizer.Tokenizer(tokenizer_home.copy(_TOKENIZER), end_of_text=tokens.end_of_text)
    at = tokenizer_home.at(_TOKENIZER)
    choice, records = make_shards(source, home, data, opened, tokenizer_at=at, end_of_text=tokens.end_of_text)
    if _corpus_home(data, source, tokens, opened.fingerprint).root != home.root:
        for index in range(len(records)):  # else they would be taken for whole, should the file come back as it was
            home.delete(record_file(index))
        raise InputError(f"data.sources: {source.called!r}: a file changed while it was read; wants one that stands still: prepare again")
    return make_whole(source, home, data, opened, choice=choice, records=records)


def _tokenizer_home(data: DataConfig, tokens: TokenizerConfig) -> Home:
    if tokens.file:
        decides: list[object] = [tokenizer.fingerprint(tokenizer.read_tokenizer(tokens.file))]
    else:
        trained_on = [identity(source) for source in data.sources]
        how = as_version_1(identifying_keys(tokens, "tokenizer"), "tokenizer")
        del how["file"]
        decides = [trained_on, data.text_field, how, *_marks(data)]
    return Home(_below(data, f"tokenizer-{_key(decides)}"), data.cache)


def _corpus_home(data: DataConfig, source: SourceConfig, tokens: TokenizerConfig, fingerprint: str) -> Home:
    how = as_version_1(identifying_keys(source, "data.sources"), "data.sources")
    del how["name"], how["epochs"]
    decides: list[object] = [identity(source), how, fingerprint, tokens.end_of_text, data.validation, data.text_field, data.bad_rows]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", source.called).strip("-")[-40:].strip("-") or "corpus"
    return Home(_below(data, f"{slug}-{_key(decides)}"), data.cache)


def _below(data: DataConfig, name: str) -> str:
    return join(absolute(data.directory), name)


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
    directory = local_path(data.directory) or data.cache.directory.expanduser() / f"prepare-{digest(data.directory)[:12]}"
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
