"""Preparing a corpus: once, whole, the same to the byte however it was reached, and never half."""

import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from corpora import SMALL, config, content, documents, texts_of, write_lines

from manta.data.config import CacheConfig, DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.prepare import build, prepare
from manta.data.prepare.encode import Task, encode
from manta.data.prepare.process_pool import run_all
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import Home
from manta.data.shards.manifest import Prepared
from manta.data.sources.config import SourceConfig
from manta.data.sources.input_split import InputSplit
from manta.data.sources.splits import input_splits
from manta.data.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    """Twelve files of one source, so that work can stop between them."""
    folder = tmp_path_factory.mktemp("source")
    for part in range(12):
        write_lines(folder / f"{part:02d}.jsonl", documents(100, seed=part))
    return folder


@pytest.fixture(scope="module")
def undisturbed(lines, tmp_path_factory) -> Prepared:
    return prepare.prepare(config(tmp_path_factory.mktemp("corpora"), lines), SMALL)


def test_every_document_is_kept_once_and_none_on_both_sides(undisturbed):
    written = [text for part in range(12) for text in documents(100, seed=part)]
    train, validation = texts_of(undisturbed, "train"), texts_of(undisturbed, "validation")
    assert sorted(train + validation) == sorted(written)
    assert not set(train) & set(validation)
    assert 0.07 < len(validation) / len(written) < 0.13


def test_a_document_that_stands_in_two_sources_falls_on_one_side(tmp_path):
    texts = documents(300)
    (tmp_path / "b").mkdir()
    write_lines(tmp_path / "b" / "0.jsonl", texts[150:])
    write_lines(tmp_path / "b" / "1.jsonl", texts[:150][::-1])
    data = config(tmp_path / "corpora", write_lines(tmp_path / "a.jsonl", texts), tmp_path / "b")
    prepared = prepare.prepare(data, SMALL)
    assert len(prepared.corpora) == 2
    assert not set(texts_of(prepared, "train")) & set(texts_of(prepared, "validation"))


@pytest.mark.parametrize("workers", [2, 4])
def test_many_workers_write_the_same_bytes_as_one(lines, undisturbed, tmp_path, workers):
    prepared = prepare.prepare(config(tmp_path, lines, workers=workers), SMALL)
    assert content(prepared) == content(undisturbed)
    assert prepared.tokenizer.read_bytes() == undisturbed.tokenizer.read_bytes()
    assert prepared.fingerprint == undisturbed.fingerprint


def test_the_manifest_adds_up(undisturbed):
    home = Home(undisturbed.corpora[0], CacheConfig())
    made = manifest.load(home)
    assert made.encoder.startswith("tiktoken: same ids as tokenizers on")
    assert made.tokenizer == Tokenizer(undisturbed.tokenizer).fingerprint
    assert made.text_bytes == sum(len(text) for part in range(12) for text in documents(100, seed=part))
    tokens = np.concatenate([home.tokens(shard) for shard in made.validation.shards])
    assert made.validation.tokens == len(tokens)
    shares = np.bincount(tokens) / len(tokens)
    assert made.validation.unigram_entropy == pytest.approx(-sum(p * np.log(p) for p in shares if p))


def test_what_is_prepared_is_found_and_not_made_again(lines, undisturbed):
    directory = Path(undisturbed.corpora[0])
    data = config(directory.parent, lines)
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert prepare.find(data, SMALL) == undisturbed
    assert prepare.prepare(data, SMALL) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert Prepared.from_json(json.loads(json.dumps(undisturbed.to_json()))) == undisturbed


def test_other_settings_or_files_are_another_corpus(lines, undisturbed, tmp_path):
    directory = Path(undisturbed.corpora[0]).parent
    assert prepare.find(config(directory, lines, validation=0.2), SMALL) is None
    assert prepare.find(config(directory, lines), SMALL.model_copy(update={"vocabulary": 401})) is None
    assert prepare.find(config(directory, write_lines(tmp_path / "other.jsonl", ["x"])), SMALL) is None


@pytest.mark.parametrize(
    ("keys", "tokenizer", "corpus"),
    [
        ({}, "tokenizer-066dfdfbc07e", "x-jsonl-2b7912a74023"),
        ({"dedup": True, "not_matching": "number 7"}, "tokenizer-5ebd7f3d395f", "x-jsonl-0981ab6cb003"),
    ],
)
def test_directory_names_are_those_of_earlier_versions(tmp_path, monkeypatch, keys, tokenizer, corpus):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("x.jsonl"), [f"some words number {i}" for i in range(50)])
    os.utime("x.jsonl", ns=(0, 10**18))
    source = {"path": "x.jsonl", "filter": keys}
    data = DataConfig(sources=(source,), sequence_length=8, validation=0.2, workers=1)
    prepared = prepare.prepare(data, TokenizerConfig(vocabulary=300))
    assert prepared.tokenizer.parent.name == tokenizer
    assert Path(prepared.corpora[0]).name == corpus


def test_a_tokenizer_file_is_taken_as_it_is(lines, undisturbed, tmp_path):
    given = TokenizerConfig(file=undisturbed.tokenizer)
    prepared = prepare.prepare(config(tmp_path, lines), given)
    assert prepared.tokenizer.read_bytes() == undisturbed.tokenizer.read_bytes()
    assert prepared.fingerprint == undisturbed.fingerprint
    assert prepare.find(config(tmp_path, lines), given) == prepared


def test_a_damaged_corpus_is_mended_by_preparing_again(lines, undisturbed, tmp_path):
    data = config(tmp_path, lines)
    made = prepare.prepare(data, SMALL)
    directory, whole = Path(made.corpora[0]), content(made)
    for damage in (
        lambda: os.truncate(directory / "piece-00003.train.bin", 100),
        lambda: (directory / "piece-00004.train.idx").write_bytes(whole["piece-00004.train.idx"][:-1] + b"\1"),
        (directory / "piece-00005.validation.bin").unlink,
        lambda: (directory / "manifest.json").write_text("{}"),
        lambda: (directory / "manifest.json").write_bytes(whole["manifest.json"][:-9]),
    ):
        damage()
        assert prepare.prepare(data, SMALL) == made
        assert made.fingerprint == undisturbed.fingerprint
        assert content(made) == whole


def test_a_damaged_packing_or_tokenizer_is_mended_by_preparing_again(lines, tmp_path):
    data = config(tmp_path, lines, packing="best_fit")
    made = prepare.prepare(data, SMALL)
    whole, packed = content(made), Path(made.corpora[0]) / "piece-00003.train.packing-1-17-16.bin"
    for damage in (
        packed.unlink,
        lambda: os.truncate(packed, 100),
        lambda: packed.write_bytes(b"\1" + whole[packed.name][1:]),
        lambda: (packed.parent / "manifest.json").write_bytes(b"\xff\xfe"),
    ):
        damage()
        assert prepare.prepare(data, SMALL) == made
        assert content(made) == whole
    written = made.tokenizer.read_bytes()
    made.tokenizer.write_bytes(written[:1000])
    assert prepare.prepare(data, SMALL) == made
    assert made.tokenizer.read_bytes() == written
    packed.unlink()
    assert prepare.find(data, SMALL) is None


@dataclass(frozen=True)
class Stalling:
    """A piece that keeps its worker busy for ever."""

    piece: InputSplit
    size: int = 1

    def documents(self):
        if multiprocessing.parent_process():
            time.sleep(600)
        yield from self.piece.documents()


def prepare_and_die(directory: str, lines: str, rename: str) -> None:
    """Prepare; be killed at the given rename, with what was to be renamed written."""
    replace, left = Path.replace, [int(rename)]

    def count(path: Path, target: Path) -> Path:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = count
    prepare.prepare(config(Path(directory), lines), SMALL)


def prepare_and_stall(directory: str, lines: str) -> None:
    build.input_splits = lambda *args: [*input_splits(*args)[:-1], Stalling(input_splits(*args)[-1])]
    prepare.prepare(config(Path(directory), lines, workers=2), SMALL)


def prepare_alone(directory: str, lines: str) -> None:
    prepare.prepare(config(Path(directory), lines), SMALL)


def prepare_with_two(directory: str, lines: str) -> None:
    prepare.prepare(config(Path(directory), lines, workers=2), SMALL)


def start(function: Callable[..., None], *args: object) -> subprocess.Popen[bytes]:
    program = f"import sys, test_data_prepare; test_data_prepare.{function.__name__}(*sys.argv[1:])"
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stderr=subprocess.DEVNULL)


def records(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.glob("*/piece-*.json")}


@pytest.mark.parametrize("rename", [1, 4, 6, 33, 62])
def test_a_preparation_killed_at_any_file_goes_on_to_the_same_bytes(lines, undisturbed, tmp_path, rename):
    """Renames: 1 the tokenizer; then five a piece, two of each shard and its record, up to 61; 62 the manifest."""
    assert start(prepare_and_die, tmp_path, lines, rename).wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("*/manifest.json"))
    assert prepare.find(config(tmp_path, lines), SMALL) is None
    finished = records(tmp_path)
    assert len(finished) == max(0, rename - 2) // 5
    prepared = prepare.prepare(config(tmp_path, lines), SMALL)
    assert content(prepared) == content(undisturbed)
    assert finished.items() <= records(tmp_path).items()


@pytest.mark.slow
def test_a_preparation_killed_at_twenty_random_moments_ends_in_the_same_bytes(lines, undisturbed, tmp_path):
    """Each is begun anew, killed once at some moment between its start and its end, and run again; on one worker and on two."""
    begun = time.monotonic()
    assert start(prepare_alone, tmp_path / "whole", lines).wait() == 0
    whole, moments = time.monotonic() - begun, random.Random(20)
    killed = 0
    for number in range(20):
        directory = tmp_path / str(number)
        process = start(prepare_alone if number % 2 else prepare_with_two, directory, lines)
        time.sleep(moments.uniform(0.3, 1.0) * whole)  # before that Python still loads
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL)
        assert content(prepare.prepare(config(directory, lines), SMALL)) == content(undisturbed)
    assert killed >= 10


def test_a_killed_preparation_leaves_no_worker_and_goes_on_to_the_same_bytes(lines, undisturbed, tmp_path):
    process = start(prepare_and_stall, tmp_path, lines)
    while len(records(tmp_path)) < 11:
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not list(tmp_path.glob("*/manifest.json"))
    prepared = prepare.prepare(config(tmp_path, lines), SMALL)
    assert content(prepared) == content(undisturbed)


def test_two_preparations_at_once_agree(lines, undisturbed, tmp_path):
    processes = [start(prepare_alone, tmp_path, lines) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert content(prepare.find(config(tmp_path, lines), SMALL)) == content(undisturbed)


@dataclass(frozen=True)
class Deadly:
    """A piece whose reader dies at its 38th document, of a signal or by leaving."""

    piece: InputSplit
    how: int | None
    size: int = 1

    @property
    def name(self):
        return self.piece.name

    def location(self, position):
        return self.piece.location(position)

    def documents(self):
        for number, document in enumerate(self.piece.documents(), start=1):
            yield document
            if number == 38:
                os._exit(3) if self.how is None else os.kill(os.getpid(), self.how)


def task(piece: InputSplit, prepared: Prepared, directory: Path, index: int = 0) -> Task:
    return Task(
        piece=piece,
        index=index,
        root=str(directory),
        cache=CacheConfig(),
        tokenizer=str(prepared.tokenizer),
        end_of_text="<|endoftext|>",
        encoder="tokenizers",
        held_out=0.1,
    )


def piece_of(path: Path, **more) -> InputSplit:
    return input_splits(SourceConfig(path=str(path)), config(path.parent, path, **more))[0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, None])
def test_a_worker_that_dies_ends_the_preparation_and_file_and_line_are_told(lines, undisturbed, tmp_path, how):
    died = "exit code 3" if how is None else signal.Signals(how).name
    deadly, whole = Deadly(piece_of(lines / "03.jsonl"), how), piece_of(lines / "04.jsonl")
    with pytest.raises(RuntimeError, match=rf"near {lines}/03\.jsonl: line 38: a process died of it \({died}"):
        list(run_all(encode, [task(deadly, undisturbed, tmp_path), task(whole, undisturbed, tmp_path, 1)], workers=2))
    assert not list(tmp_path.glob("piece-00000*"))
    assert not multiprocessing.active_children()


class TwoPartError(Exception):
    """Pickles, and can not be made again from what it pickles."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def fail_in_two_parts(task, tell):
    tell(3)
    if task.index:
        raise TwoPartError("one", "two")


def test_an_error_that_does_not_travel_is_told_in_words(lines, undisturbed, tmp_path):
    tasks = [task(piece_of(lines / "03.jsonl"), undisturbed, tmp_path, index) for index in range(6)]
    with pytest.raises(RuntimeError, match="TwoPartError: one and two") as caught:
        list(run_all(fail_in_two_parts, tasks, workers=2))
    assert "fail_in_two_parts" in caught.value.__notes__[0]


def test_an_error_does_not_wait_for_the_others(undisturbed, tmp_path):
    lines = write_lines(tmp_path / "x.jsonl", ["x"])
    with lines.open("a") as stream:
        stream.write("{}")
    bad = piece_of(lines)
    with pytest.raises(InputError, match=r"line 2: expected a field 'text'"):
        list(run_all(encode, [task(piece, undisturbed, tmp_path) for piece in (Stalling(bad), bad)], workers=2))


@pytest.mark.parametrize("workers", [1, 2])
def test_one_bad_line_fails_the_whole_and_leaves_no_manifest(tmp_path, monkeypatch, workers):
    folder = tmp_path / "source"
    folder.mkdir()
    for part in range(4):
        write_lines(folder / f"{part}.jsonl", documents(100, seed=part))
    with (folder / "2.jsonl").open("a") as stream:
        stream.write('{"text": "cut sho')
    data, tokens = config(tmp_path / "corpora", folder, workers=workers), SMALL.model_copy(update={"train_bytes": 10_000})
    monkeypatch.setattr(build, "_PROOF_BYTES", 10_000)  # the bad line is met by a worker, not by the sample
    with pytest.raises(InputError) as caught:
        prepare.prepare(data, tokens)
    assert str(caught.value).startswith(f"{folder}/2.jsonl: line 101: expected one JSON object per line, got malformed JSON")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("corpora/*/manifest.json"))


def test_a_bad_source_is_told_before_anything_is_written(tmp_path):
    good = write_lines(tmp_path / "good.jsonl", documents(20))
    with pytest.raises(InputError, match="no such files"):
        prepare.prepare(config(tmp_path / "corpora", good, tmp_path / "none.jsonl"), SMALL)
    with pytest.raises(InputError, match=r"none\.json: expected a readable tokenizer\.json"):
        prepare.prepare(config(tmp_path / "corpora", good), TokenizerConfig(file=tmp_path / "none.json"))
    assert not (tmp_path / "corpora").exists()


def test_a_source_without_documents_is_told(tmp_path):
    blank = tmp_path / "blank.jsonl.gz"
    blank.write_bytes(gzip.compress(b"\n\n"))
    with pytest.raises(InputError, match="holds no documents"):
        prepare.prepare(config(tmp_path / "corpora", blank), SMALL)
    assert not list(tmp_path.glob("corpora/*/manifest.json"))


def test_a_directory_that_can_not_be_written_is_told(tmp_path):
    good = write_lines(tmp_path / "good.jsonl", documents(20))
    with pytest.raises(InputError, match=r"data\.directory: .*good\.jsonl"):
        prepare.prepare(config(good, good), SMALL)


def test_a_corpus_too_small_is_told_with_the_remedy(tmp_path):
    good = write_lines(tmp_path / "good.jsonl", documents(20))
    with pytest.raises(InputError, match=r"data\.sequence_length: expected at least 100001 for a sample of 100000, got \d+ train tokens"):
        prepare.prepare(config(tmp_path / "corpora", good, sequence_length=100_000), SMALL)
    with pytest.raises(InputError, match=r"data\.validation: .* got 0 validation tokens\. Raise data\.validation from 0\.0001 to 0\.\d"):
        prepare.prepare(config(tmp_path / "corpora", good, sequence_length=300, validation=0.0001), SMALL)


def test_a_source_that_changes_under_the_reader_is_refused(tmp_path, monkeypatch):
    good = write_lines(tmp_path / "good.jsonl", documents(20))
    monkeypatch.setattr(build, "encode", lambda task, tell: (write_lines(good, documents(21)), encode(task, tell))[1])
    before = good.stat()
    with pytest.raises(InputError, match="changed while it was read"):
        prepare.prepare(config(tmp_path / "corpora", good), SMALL)
    assert not list(tmp_path.glob("corpora/*/manifest.json"))
    monkeypatch.undo()
    write_lines(good, documents(20))  # it comes back as it was, as from a snapshot: nothing of the other is taken for it
    os.utime(good, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = prepare.prepare(config(tmp_path / "corpora", good), SMALL)
    assert again.fingerprint == prepare.prepare(config(tmp_path / "clean", good), SMALL).fingerprint
