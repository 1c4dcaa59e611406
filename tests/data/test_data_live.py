"""Text that is tokenized while it is read: every document once an epoch over all ranks, and to be gone on with at any window."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, fields
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MANTA
from corpora import SMALL, documents, texts_of, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from runs import events, lines, losses, wait_for_step
from source_reading import write_arrow, write_file, write_parquet

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.live import live_sources
from manta.data.live.live_samples import Cursor, LiveSamples, open_samples
from manta.data.objectives.examples import IGNORED, Examples
from manta.data.prepare import prepare
from manta.data.sampling.samples import Samples
from manta.data.sampling.timeline import Timeline
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.backend import open_backend
from manta.trainer.checkpoint.manifest import Progress
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.config.training import ParallelConfig, TrainConfig
from manta.trainer.dataloader.loader import DataLoader
from manta.trainer.dist.layout import largest_layout

SHAPES = {
    "causal": {"sequence_length": 16},
    "separate": {"sequence_length": 16, "separate_documents": True},
    "masked": {"sequence_length": 16, "objective": "masked", "pairs": "none"},
    "swapped": {"sequence_length": 16, "objective": "masked", "pairs": "sentence_order"},
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> TokenizerConfig:
    """A tokenizer with all that an objective may ask for."""
    folder = tmp_path_factory.mktemp("tokenizer")
    data = config(folder, write_lines(folder / "a.jsonl", documents(200)), sequence_length=16, objective="masked", pairs="none")
    return TokenizerConfig(file=prepare.prepare(data, SMALL).tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three files of one source, one of them larger than the others, and another source."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "web").mkdir()
    for part, count in enumerate((20, 70, 20)):
        write_lines(folder / "web" / f"{part}.jsonl", documents(count, seed=part))
    write_lines(folder / "code.jsonl", documents(40, seed=9))
    return folder


def config(directory: Path, *sources: object, **more) -> DataConfig:
    settings = {"sequence_length": 2, "validation": 0.1, "workers": 1, "live": True, "directory": directory / "corpora"} | more
    return DataConfig(sources=tuple(source if isinstance(source, dict) else str(source) for source in sources), **settings)


def opened(data: DataConfig, tokens: TokenizerConfig, rank: int = 0, ranks: int = 1, *, seed: int = 7, held_out: int = 8) -> LiveSamples:
    prepared = prepare.find_prepared(data, tokens) or prepare.prepare(data, tokens)
    samples = open_samples(prepared, data, tokens, seed=seed, held_out=held_out, rank=rank, ranks=ranks)
    assert isinstance(samples, LiveSamples)
    return samples


def read(samples: LiveSamples, first: int, count: int) -> list[tuple[Cursor, Examples]]:
    """One sample after another, each with the cursor before it."""
    return [(samples.cursor, samples.train(np.array([number]))) for number in range(first, first + count)]


def window(examples: Examples) -> list[int]:
    """The text that a causal example was made of."""
    return [*examples.tokens[0].tolist(), int(examples.targets[0, -1])]


def texts_by_epoch(samples: LiveSamples, tokens: TokenizerConfig, epochs: int) -> list[list[str]]:
    """What a rank reads. Of windows of two tokens one begins in each document, so that cursors tell where an epoch does."""
    tokenizer = Tokenizer(tokens.file)
    stream: list[int] = []
    begins = [0]
    while len(begins) <= epochs:
        stream += window(samples.train(np.array([len(stream) // 2])))[:2]
        if samples.cursor.epoch == len(begins):
            begins.append(len(stream) - samples.cursor.token)
    return [documents_of(stream[begin:end], tokenizer) for begin, end in pairwise(begins)]


def documents_of(stream: list[int], tokenizer: Tokenizer) -> list[str]:
    ends = [at for at, token in enumerate(stream) if token == tokenizer.end_of_text]
    return [tokenizer.decode(stream[begin + 1 : end]) for begin, end in pairwise([-1, *ends])]


def same(a: Examples, b: Examples) -> bool:
    pairs = ((getattr(a, field.name), getattr(b, field.name)) for field in fields(Examples))
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("ranks", [3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2, 4))])
def test_every_document_is_read_once_an_epoch_over_all_ranks_and_none_that_is_held_out(folder, tokens, ranks):
    """Four files of several sizes: each rank reads documents of all of them."""
    data = config(folder, folder / "web", folder / "code.jsonl")
    by_rank = [texts_by_epoch(opened(data, tokens, rank, ranks), tokens, 3) for rank in range(ranks)]
    expected = sorted(texts_of(prepare.prepare(data.model_copy(update={"live": False}), tokens), "train"))
    for epoch in range(3):
        assert sorted(text for texts in by_rank for text in texts[epoch]) == expected
        shares = [len(texts[epoch]) for texts in by_rank]
        assert max(shares) < 1.3 * min(shares)
    orders = [[text for texts in by_rank for text in texts[epoch]] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_the_text_of_a_file_stands_in_its_own_order(folder, tokens):
    texts = documents(70, seed=1)
    read_in_order = texts_by_epoch(opened(config(folder, folder / "web" / "1.jsonl"), tokens), tokens, 1)[0]
    assert len(read_in_order) < len(texts)
    assert read_in_order == [text for text in texts if text in set(read_in_order)]


def test_ranks_take_whole_pieces_where_there_are_as_many_for_each_of_about_one_size(tmp_path, tokens):
    texts = [documents(20, seed=part) for part in range(4)]
    for part, of_part in enumerate(texts):
        write_lines(tmp_path / f"{part}.jsonl", of_part)
    data = config(tmp_path, *(tmp_path / f"{part}.jsonl" for part in range(4)))
    owner = {text: part for part, of_part in enumerate(texts) for text in of_part}
    two = [texts_by_epoch(opened(data, tokens, rank, 2), tokens, 2) for rank in range(2)]
    for epoch in range(2):
        first, second = ({owner[text] for text in texts[epoch]} for texts in two)
        assert len(first) == len(second) == 2
        assert first | second == set(range(4))
    three = [texts_by_epoch(opened(data, tokens, rank, 3), tokens, 1)[0] for rank in range(3)]
    assert all({owner[text] for text in of_rank} == set(range(4)) for of_rank in three)


def test_files_of_a_single_document_are_dealt_over_all_ranks(tmp_path, tokens):
    texts = documents(31)
    sources = [write_lines(tmp_path / f"{number}.jsonl", [text]) for number, text in enumerate(texts)]
    held_out = write_lines(tmp_path / "held.jsonl", documents(5, seed=1))
    data = config(tmp_path, *({"path": str(path), "validation": str(held_out)} for path in sources[:1]), *sources[1:])
    shares = [texts_by_epoch(opened(data, tokens, rank, 2, held_out=1), tokens, 1)[0] for rank in range(2)]
    assert min(map(len, shares)) >= 10
    assert not set(shares[0]) & set(shares[1])


def test_a_rank_that_no_document_falls_to_is_told(tmp_path, tokens):
    path = write_lines(tmp_path / "two.jsonl", documents(2))
    held_out = write_lines(tmp_path / "held.jsonl", documents(5, seed=1))
    data = config(tmp_path, {"path": str(path), "validation": str(held_out)})
    read(opened(data, tokens, 1, 2, held_out=1), 0, 500)
    with pytest.raises(InputError, match="got no document for data rank 2 in a whole epoch, wants one for each of 3 ranks"):
        read(opened(data, tokens, 2, 3, held_out=1), 0, 1)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    sizes=st.lists(st.lists(st.one_of(st.integers(1, 12), st.integers(100, 3000)), min_size=3, max_size=6), min_size=1, max_size=4),
    ranks=st.integers(1, 3),
    taken=st.integers(0, 120),
)
def test_a_rank_goes_on_from_any_cursor_with_the_very_samples(tmp_path_factory, tokens, shape, sizes, ranks, taken):
    """Of documents smaller and larger than samples, over the ends of epochs."""
    folder = tmp_path_factory.mktemp("any")
    letters = "".join(documents(20))
    for part, of_part in enumerate(sizes):
        write_lines(folder / f"{part}.jsonl", [letters[7 * part + size :][:size] for size in of_part])
    write_lines(folder / "held.jsonl.gz.txt", documents(9))
    data = config(folder, {"path": str(folder / "*.jsonl"), "validation": str(folder / "held.jsonl.gz.txt")}, **SHAPES[shape])
    for rank in range(ranks):
        finished_run = opened(data, tokens, rank, ranks, held_out=2)
        whole = read(finished_run, 0, taken + 25)
        for first in (taken, 0):
            anew = opened(data, tokens, rank, ranks, held_out=2)
            anew.seek(Cursor(**json.loads(json.dumps(asdict(whole[first][0])))))
            again = read(anew, first, 25)
            assert [cursor for cursor, _ in again] == [cursor for cursor, _ in whole[first : first + 25]]
            assert all(same(a, b) for (_, a), (_, b) in zip(again, whole[first : first + 25], strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_are_windows_of_the_text_end_to_end(folder, tokens, shape):
    """The same text is read whatever shape is cut of it; windows of two tokens tell it, too."""
    sources = folder / "web", folder / "code.jsonl"
    twos = read(opened(config(folder, *sources), tokens, 1, 3), 0, 1000)
    stream = [token for _, examples in twos for token in window(examples)[:2]]
    width, stride = {"causal": (17, 16), "separate": (17, 16), "masked": (14, 14), "swapped": (13, 13)}[shape]
    for number, (_, examples) in enumerate(read(opened(config(folder, *sources, **SHAPES[shape]), tokens, 1, 3), 0, 120)):
        expected = stream[number * stride :][:width]
        unmasked = np.where(examples.targets == IGNORED, examples.tokens, examples.targets)[0].tolist()
        match shape:
            case "causal":
                assert window(examples) == expected
            case "separate":
                assert examples.tokens[0].tolist() == expected[:-1]
            case "masked":
                assert unmasked[1:-1] == expected
            case _:  # two parts, in either order
                assert not Counter(expected) - Counter(unmasked)


def test_a_batch_is_the_samples_one_by_one(folder, tokens):
    data = config(folder, folder / "web", **SHAPES["masked"])
    one_by_one = [examples for _, examples in read(opened(data, tokens), 0, 12)]
    samples = opened(data, tokens)
    for first in (0, 4, 8):
        batch = samples.train(np.arange(first, first + 4))
        assert np.array_equal(batch.tokens, np.concatenate([examples.tokens for examples in one_by_one[first : first + 4]]))
    other = opened(data, tokens, seed=8)
    assert not np.array_equal(other.train(np.arange(4)).tokens, batch.tokens)


def test_the_order_in_which_ranks_read_never_changes(tmp_path, tokens):
    """Golden: whoever changes it changes every live run that is under way, and raises live_sources.VERSION."""
    for name, count in (("a", 5), ("b", 2), ("c", 4)):
        write_lines(tmp_path / f"{name}.jsonl", [f"{name}{number}" for number in range(count)])
    write_lines(tmp_path / "held.txt", documents(5))
    data = config(tmp_path, {"path": str(tmp_path / "*.jsonl"), "validation": str(tmp_path / "held.txt")})
    told = [[" ".join(texts) for texts in texts_by_epoch(opened(data, tokens, rank, 2, held_out=1), tokens, 2)] for rank in range(2)]
    assert live_sources.VERSION == 1
    assert told == [["a0 a2 a4 b1 c0 c2", "b0 a1 a3 c0 c2"], ["a1 a3 b0 c1 c3", "b1 a0 a2 a4 c1 c3"]]


def test_validation_is_what_a_prepared_corpus_holds_out_of_each_source_in_turn(folder, tokens):
    data = config(folder, folder / "web", folder / "code.jsonl", sequence_length=16)
    samples = opened(data, tokens, held_out=10**6)
    prepared = prepare.prepare(data.model_copy(update={"live": False}), tokens)
    indices = np.arange(samples.validation_windows)
    found = documents_of(samples.validation_text(indices).tokens[:, :-1].ravel().tolist(), Tokenizer(tokens.file))
    expected = texts_of(prepared, "validation")
    assert len(expected) - 1 <= len(found) <= len(expected)
    assert set(found) <= set(expected)
    code = [text in set(documents(40, seed=9)) for text in found]
    assert code[:4] == [False, True] * 2
    few = opened(data, tokens, 1, 2, seed=8, held_out=5)
    assert few.validation_windows == 5
    assert same(few.validation(indices[:5]), samples.validation(indices[:5]))
    shares = np.bincount(samples.validation_text(indices[:4]).tokens[:, 1:].ravel()) / 64
    assert samples.validation_unigram_entropy(indices[:4]) == pytest.approx(-sum(p * np.log(p) for p in shares[shares > 0]))
    assert samples.tokenizer_vocabulary == Samples(prepared, data, tokens, seed=0).tokenizer_vocabulary
    with pytest.raises(IndexError, match="expected indices below 5"):
        few.validation(np.array([5]))


def test_a_source_s_own_validation_is_all_held_out_and_nothing_else_of_it(tmp_path, tokens):
    texts, apart = documents(50), documents(9, seed=1)
    path, held_out = write_lines(tmp_path / "a.jsonl", texts), write_lines(tmp_path / "b.jsonl", apart)
    samples = opened(config(tmp_path, {"path": str(path), "validation": str(held_out)}), tokens, held_out=10**6)
    assert sorted(texts_by_epoch(samples, tokens, 1)[0]) == sorted(texts)
    stream = samples.validation_text(np.arange(samples.validation_windows)).tokens[:, :2].ravel()
    assert Tokenizer(tokens.file).decode(stream).startswith(apart[0] + "<|endoftext|>" + apart[1])


def test_too_little_to_hold_out_is_refused(tmp_path, tokens):
    data = config(tmp_path, write_lines(tmp_path / "a.jsonl", documents(20)), sequence_length=4096)
    with pytest.raises(InputError, match=r"data\.validation: \d+ tokens are held out; a sample of 4096 wants 4097: raise it from 0.1"):
        prepare.prepare(data, tokens)


def test_filters_and_templates_are_minded(tmp_path, tokens):
    texts = documents(80)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"title": str(number), "body": text}) + "\n" for number, text in enumerate(texts)))
    source = {"path": str(path), "template": "{title}: {body}", "filter": {"minimum_characters": 200, "not_matching": "^7"}}
    data = config(tmp_path, source)
    found = [text for rank in range(2) for text in texts_by_epoch(opened(data, tokens, rank, 2), tokens, 1)[0]]
    assert sorted(found) == sorted(texts_of(prepare.prepare(data.model_copy(update={"live": False}), tokens), "train"))
    assert all(len(text) >= 200 and not text.startswith("7") for text in found)


def test_malformed_rows_end_the_run_or_are_left_out_and_told(tmp_path, tokens, caplog):
    rows = [json.dumps({"text": text}) for text in documents(60)]
    for number in range(10, 60, 7):
        rows.insert(number, '{"text": 5}')
    path = write_file(tmp_path / "a.jsonl", "\n".join(rows).encode())
    held_out = write_lines(tmp_path / "held.jsonl", documents(9, seed=1))
    source = {"path": path, "validation": str(held_out)}
    with pytest.raises(InputError, match=r"a\.jsonl: line 11: field 'text': expected text, got int"):
        read(opened(config(tmp_path, source), tokens), 0, 5000)
    data = config(tmp_path, source, bad_rows="skip")
    found = [text for rank in range(2) for text in texts_by_epoch(opened(data, tokens, rank, 2), tokens, 1)[0]]
    assert sorted(found) == sorted(documents(60))
    told = [record.getMessage() for record in caplog.records]
    assert sum("1 so far" in line for line in told) == 2  # by each rank its own
    assert all("a.jsonl: line " in line for line in told)


def test_tables_and_datasets_are_read_live(tmp_path, tokens):
    texts = documents(60)
    write_parquet(tmp_path / "a.parquet", group=7, text=texts[:20])
    write_arrow(tmp_path / "b.arrow", batch=6, text=texts[20:40])
    (tmp_path / "hub").mkdir()
    for part in range(2):
        write_parquet(tmp_path / "hub" / f"{part}.parquet", text=texts[40 + 10 * part : 50 + 10 * part])
    held_out = write_lines(tmp_path / "held.jsonl", documents(9, seed=1))
    paths = [tmp_path / "a.parquet", tmp_path / "b.arrow", f"hf:{tmp_path / 'hub'}"]
    data = config(tmp_path, *({"path": str(path), "validation": str(held_out)} for path in paths))
    found = [texts_by_epoch(opened(data, tokens, rank, 2), tokens, 1)[0] for rank in range(2)]
    assert sorted(found[0] + found[1]) == sorted(texts)
    alone = config(tmp_path, {"path": f"hf:{tmp_path / 'hub'}", "validation": str(held_out)})
    stream = [set(texts_by_epoch(opened(alone, tokens, rank, 2), tokens, 1)[0]) for rank in range(2)]
    assert sorted(map(sorted, stream)) == sorted([sorted(texts[40:50]), sorted(texts[50:])])  # each rank streams shards of its own


def test_preparing_makes_the_tokenizer_alone(tmp_path, capsys):
    data = config(tmp_path, write_lines(tmp_path / "a.jsonl", documents(200)))
    assert prepare.find_prepared(data, SMALL) is None
    prepared = prepare.prepare(data, SMALL)
    assert prepared.corpora == ()
    assert "data.live: text is tokenized while it is read; only the tokenizer is prepared" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "corpora").iterdir() if path.is_dir()] == [prepared.tokenizer.parent.name]
    assert prepare.find_prepared(data, SMALL) == prepared == prepare.prepare(data, SMALL)
    trained = TokenizerConfig(**SMALL.model_dump() | {"file": prepared.tokenizer})
    assert prepare.prepare(data, trained).fingerprint == prepared.fingerprint


def test_another_corpus_or_tokenizer_is_another_one(tmp_path, tokens):
    path = write_lines(tmp_path / "a.jsonl", documents(200))
    data = config(tmp_path, path)
    prepared = prepare.prepare(data, tokens)
    open_anew = partial(open_samples, prepared, seed=0)
    open_anew(data, tokens)
    others = [
        config(tmp_path, path, validation=0.2),
        config(tmp_path, path, bad_rows="skip"),
        config(tmp_path, {"path": str(path), "filter": {"minimum_characters": 5}}),
        config(tmp_path, path, write_lines(tmp_path / "b.jsonl", documents(9))),
    ]
    for other in others:
        with pytest.raises(InputError, match="the corpus is another one than the run began with"):
            open_anew(other, tokens)
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match="the corpus is another one than the run began with"):
        open_anew(data, tokens)


def test_relative_paths_are_those_of_where_the_run_was_begun(tmp_path, tokens, monkeypatch):
    home = tmp_path / "a [b]*"
    (home / "text").mkdir(parents=True)
    write_lines(home / "text" / "x[1].jsonl", documents(100))
    monkeypatch.chdir(home)
    for path in ("text", "text/*.jsonl", "text/x[1].jsonl"):
        data = config(tmp_path, path)
        expected = [window(examples) for _, examples in read(opened(data, tokens), 0, 20)]
        placed = live_sources.with_absolute_paths(data)
        monkeypatch.chdir(tmp_path)
        assert [window(examples) for _, examples in read(opened(placed, tokens), 0, 20)] == expected
        monkeypatch.chdir(home)
    kept = ["stdlib:", "s3://bucket/x", "hf:name:config", "hf://datasets/x"]
    more = live_sources.with_absolute_paths(config(tmp_path, *kept, "hf:text:part", "file:///x/*.txt")).sources
    assert [source.path for source in more] == [*kept, f"hf:{home / 'text'}:part", "/x/*.txt"]


def test_token_ids_are_refused(tmp_path, tokens):
    write_file(tmp_path / "x.bin", b"\0\0" * 100)
    ids = write_file(tmp_path / "x.jsonl", b'{"text": [1, 2]}\n' * 9)
    for source in ({"path": str(tmp_path / "x.bin"), "format": "nanogpt"}, ids):
        for tokenizer in (tokens, SMALL):
            with pytest.raises(InputError) as caught:
                prepare.prepare(config(tmp_path, source), tokenizer)
            assert "got token ids beside data.live, wants text: ids need no tokenizing; leave data.live out" in str(caught.value)
    assert not (tmp_path / "corpora").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"sources": ({"path": "a", "filter": {"dedup": True}},)}, "sources: expected no filter dedup with live"),
        ({"sources": ({"path": "a", "epochs": 2},)}, "sources: expected no epochs 2 with live"),
        ({"packing": "best_fit"}, "packing: expected no value with live.* got best_fit"),
        ({"mixture": {"a": 1}}, "mixture: expected no value with live.* got one"),
        ({"objective": "masked"}, "pairs: expected no next_sentence with live"),
    ],
)
def test_what_wants_a_prepared_corpus_is_refused(more, told):
    with pytest.raises(ValidationError) as caught:
        DataConfig(**{"sources": ("a",), "sequence_length": 16, "live": True} | more)
    assert re.search(told, str(caught.value))


def test_a_reader_that_is_ahead_tells_where_each_step_began(folder, tokens):
    data = config(folder, folder / "web", sequence_length=16)
    timeline, layout = (
        Timeline(sequence_length=16, global_batch=12),
        largest_layout(TrainConfig(steps=6, global_batch=12, micro_batch=2), ParallelConfig(), 2),
    )
    expected = [cursor for cursor, _ in read(opened(data, tokens, 1, 2), 0, 37)][::6]
    assert len(set(expected)) == 7
    reader = DataLoader(opened(data, tokens, 1, 2), timeline, layout, rank=1, seed=7, steps=6, device=torch.device("cpu"))
    try:
        told = [reader.cursor(0)]
        for step in range(6):
            list(islice(reader.step(step), 3))
            told.append(reader.cursor(step + 1))
    finally:
        reader.close()
    assert told == expected


def test_a_checkpoint_tells_its_cursors(tmp_path):
    cursors = [asdict(Cursor(epoch=1, piece=2, document=3, token=rank)) for rank in range(2)]
    come = Progress(step=4, samples_consumed=8, optimizer_steps=4, cursors=cursors)
    where = open_backend(tmp_path)
    CheckpointWriter(where, identity={}, attempt=1).save({"master/x": TensorViews.from_whole(torch.ones(3))}, come)
    assert catalog.newest_valid(where).progress == come


# Whole runs

STEPS = 80
LIVE = (
    "data.live=true",
    "data.sources=[documents/*.txt]",
    f"train.steps={STEPS}",
    "checkpoint.every_steps=5",
    "evaluate.every_steps=15",
)  # not where it is stopped


def digests(workspace, run: str) -> list[int]:
    return [line["data/digest"] for line in lines(workspace, run)]


def evaluated(workspace, run: str) -> list[float]:
    return [line["eval/loss"] for line in lines(workspace, run) if "eval/loss" in line]


@pytest.fixture(scope="module")
def finished_run(workspace) -> str:
    done = workspace.train("live", *LIVE)
    assert "text is tokenized while it is read; only as many data ranks, 2, can go on with it" in done.stderr
    assert losses(workspace, "live")[-1] < losses(workspace, "live")[0] - 0.2
    assert len(set(digests(workspace, "live"))) == STEPS
    return "live"


@pytest.mark.slow
def test_a_live_run_is_killed_and_stopped_and_comes_back_to_the_same_samples_on_as_many_ranks(workspace, finished_run, tmp_path):
    run, on_cpu = "live again", os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with workspace.start("train", str(workspace.config_file), f"run.dir={run}", *LIVE, "cluster.hot_standby=true") as running:
        wait_for_step(workspace, run, 8, running)
        victim = next(event for event in events(workspace, run) if event["event"] == "attempt-started")["ranks"][1]["pid"]
        os.kill(victim, signal.SIGKILL)
        wait_for_step(workspace, run, 16, running)
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 75, running.stderr.read()
        running.communicate()
    assert [event["rank"] for event in events(workspace, run) if event["event"] == "rank-failed"] == [1]
    assert {line["attempt"] for line in lines(workspace, run)} == {1, 2}
    stopped = lines(workspace, run)[-1]["step"]
    assert stopped < STEPS

    saved = sorted((workspace.directory / run).glob("checkpoints/*/*"))
    told = "data.live: got 1 data rank, wants 2: so many have read its text, each a share of its own; start as many"
    refused = workspace.manta("resume", run, "cluster.ranks_per_node=1")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert told in refused.stderr
    alone = [sys.executable, "-P", "-m", "manta.trainer", str(workspace.directory / run)]  # as a supervisor with fewer ranks would
    by_hand = subprocess.run(alone, env=on_cpu, capture_output=True, text=True, timeout=120, check=False)
    assert by_hand.returncode == 2
    assert told in by_hand.stderr
    assert sorted((workspace.directory / run).glob("checkpoints/*/*")) == saved
    assert len(lines(workspace, run)) == stopped

    command = [MANTA, "resume", str(workspace.directory / run)]  # from elsewhere, where no source is
    done = subprocess.run(command, cwd=tmp_path, env=on_cpu, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(workspace, run) == losses(workspace, finished_run)  # bit by bit
    assert digests(workspace, run) == digests(workspace, finished_run)
    assert evaluated(workspace, run) == evaluated(workspace, finished_run)


@pytest.mark.slow
def test_a_live_run_over_another_corpus_is_refused(workspace, finished_run):
    changed = workspace.directory / "documents" / "argparse.txt"
    before = changed.stat()
    changed.write_text(changed.read_text() + "\n")
    try:
        refused = workspace.train(finished_run, *LIVE, f"train.steps={STEPS + 4}", code=2)
    finally:
        changed.write_text(changed.read_text()[:-1])
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "corpus fingerprint: got" in refused.stderr
    assert len(lines(workspace, finished_run)) == STEPS
