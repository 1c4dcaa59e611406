"""Live samples: each document once per epoch over all ranks, and exact continuation from any window."""

import json
import os
import re
from collections import Counter
from dataclasses import asdict
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sample_cases import same_examples
from small_corpora import SMALL, documents, texts_of, write_lines
from source_reading import write_arrow, write_file, write_parquet

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.live import live_sources
from manta.data.live.live_samples import Cursor, LiveSamples, open_samples
from manta.data.objectives.examples import IGNORED, Examples
from manta.data.prepare import prepare
from manta.data.sampling.samples import Samples
from manta.data.sampling.step_samples import Timeline
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.manifest import Progress
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.config.sections import ParallelConfig, TrainConfig
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
    """A tokenizer with the special tokens of every objective."""
    folder = tmp_path_factory.mktemp("tokenizer")
    data = config(folder, write_lines(folder / "a.jsonl", documents(200)), sequence_length=16, objective="masked", pairs="none")
    return TokenizerConfig(file=prepare.prepare(data, SMALL).tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two sources: three files, one of them larger than the others, and one file."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "web").mkdir()
    for part, count in enumerate((20, 70, 20)):
        write_lines(folder / "web" / f"{part}.jsonl", documents(count, seed=part))
    write_lines(folder / "code.jsonl", documents(40, seed=9))
    return folder


def config(directory: Path, *sources: object, **more) -> DataConfig:
    settings = {"sequence_length": 2, "validation": 0.1, "workers": 1, "live": True, "directory": str(directory / "corpora")} | more
    return DataConfig(sources=tuple(source if isinstance(source, dict) else str(source) for source in sources), **settings)


def opened(data: DataConfig, tokens: TokenizerConfig, rank: int = 0, ranks: int = 1, *, seed: int = 7, held_out: int = 8) -> LiveSamples:
    prepared = prepare.find_prepared(data, tokens) or prepare.prepare(data, tokens)
    samples = open_samples(prepared, data, tokens, seed=seed, held_out=held_out, rank=rank, ranks=ranks)
    assert isinstance(samples, LiveSamples)
    return samples


def read(samples: LiveSamples, first: int, count: int) -> list[tuple[Cursor, Examples]]:
    """Read samples one by one, each with the cursor before it."""
    return [(samples.cursor, samples.train(np.array([number]))) for number in range(first, first + count)]


def window(examples: Examples) -> list[int]:
    """Return the window that a causal example was made of."""
    return [*examples.tokens[0].tolist(), int(examples.targets[0, -1])]


def texts_by_epoch(samples: LiveSamples, tokens: TokenizerConfig, epochs: int) -> list[list[str]]:
    """Return the texts that a rank reads. With windows of two tokens, one starts in each document, so cursors show where epochs start."""
    tokenizer = Tokenizer(tokens.file)
    stream: list[int] = []
    starts = [0]
    while len(starts) <= epochs:
        stream += window(samples.train(np.array([len(stream) // 2])))[:2]
        if samples.cursor.epoch == len(starts):
            starts.append(len(stream) - samples.cursor.token)
    return [documents_of(stream[start:end], tokenizer) for start, end in pairwise(starts)]


def documents_of(stream: list[int], tokenizer: Tokenizer) -> list[str]:
    ends = [at for at, token in enumerate(stream) if token == tokenizer.end_of_text]
    return [tokenizer.decode(stream[start + 1 : end]) for start, end in pairwise([-1, *ends])]


@pytest.mark.parametrize("ranks", [3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2, 4))])
def test_ranks_read_each_train_document_once_per_epoch(folder, tokens, ranks):
    """The four files have different sizes, so each rank reads documents of all of them."""
    data = config(folder, folder / "web", folder / "code.jsonl")
    by_rank = [texts_by_epoch(opened(data, tokens, rank, ranks), tokens, 3) for rank in range(ranks)]
    expected = sorted(texts_of(prepare.prepare(data.model_copy(update={"live": False}), tokens), "train"))
    for epoch in range(3):
        assert sorted(text for texts in by_rank for text in texts[epoch]) == expected
        shares = [len(texts[epoch]) for texts in by_rank]
        assert max(shares) < 1.3 * min(shares)
    orders = [[text for texts in by_rank for text in texts[epoch]] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_documents_keep_the_order_of_their_file(folder, tokens):
    texts = documents(70, seed=1)
    read_in_order = texts_by_epoch(opened(config(folder, folder / "web" / "1.jsonl"), tokens), tokens, 1)[0]
    assert len(read_in_order) < len(texts)
    assert read_in_order == [text for text in texts if text in set(read_in_order)]


def test_ranks_read_whole_splits_if_they_divide_evenly(tmp_path, tokens):
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


def test_single_document_files_are_spread_over_all_ranks(tmp_path, tokens):
    texts = documents(31)
    sources = [write_lines(tmp_path / f"{number}.jsonl", [text]) for number, text in enumerate(texts)]
    held_out = write_lines(tmp_path / "held.jsonl", documents(5, seed=1))
    data = config(tmp_path, *({"path": str(path), "validation": str(held_out)} for path in sources[:1]), *sources[1:])
    shares = [texts_by_epoch(opened(data, tokens, rank, 2, held_out=1), tokens, 1)[0] for rank in range(2)]
    assert min(map(len, shares)) >= 10
    assert not set(shares[0]) & set(shares[1])


def test_a_rank_without_documents_is_refused(tmp_path, tokens):
    path = write_lines(tmp_path / "two.jsonl", documents(2))
    held_out = write_lines(tmp_path / "held.jsonl", documents(5, seed=1))
    data = config(tmp_path, {"path": str(path), "validation": str(held_out)})
    read(opened(data, tokens, 1, 2, held_out=1), 0, 500)
    with pytest.raises(InputError, match="expected a document for each of 3 data ranks, got none for rank 2 in an epoch"):
        read(opened(data, tokens, 2, 3, held_out=1), 0, 1)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    sizes=st.lists(st.lists(st.one_of(st.integers(1, 12), st.integers(100, 3000)), min_size=3, max_size=6), min_size=1, max_size=4),
    ranks=st.integers(1, 3),
    taken=st.integers(0, 120),
)
def test_seek_continues_with_exactly_the_same_samples(tmp_path_factory, tokens, shape, sizes, ranks, taken):
    """With documents smaller and larger than samples, across epochs."""
    folder = tmp_path_factory.mktemp("any")
    letters = "".join(documents(20))
    for part, of_part in enumerate(sizes):
        write_lines(folder / f"{part}.jsonl", [letters[7 * part + size :][:size] for size in of_part])
    write_lines(folder / "held.jsonl.gz.txt", documents(9))
    data = config(folder, {"path": str(folder / "*.jsonl"), "validation": str(folder / "held.jsonl.gz.txt")}, **SHAPES[shape])
    for rank in range(ranks):
        uninterrupted = opened(data, tokens, rank, ranks, held_out=2)
        expected = read(uninterrupted, 0, taken + 25)
        for first in (taken, 0):
            resumed = opened(data, tokens, rank, ranks, held_out=2)
            resumed.seek(Cursor(**json.loads(json.dumps(asdict(expected[first][0])))))
            continued = read(resumed, first, 25)
            assert [cursor for cursor, _ in continued] == [cursor for cursor, _ in expected[first : first + 25]]
            assert all(same_examples(a, b) for (_, a), (_, b) in zip(continued, expected[first : first + 25], strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_are_consecutive_windows_of_the_text(folder, tokens, shape):
    """All objectives read the same text, which windows of two tokens show."""
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


def test_a_batch_equals_its_samples_one_by_one(folder, tokens):
    data = config(folder, folder / "web", **SHAPES["masked"])
    one_by_one = [examples for _, examples in read(opened(data, tokens), 0, 12)]
    samples = opened(data, tokens)
    for first in (0, 4, 8):
        batch = samples.train(np.arange(first, first + 4))
        assert np.array_equal(batch.tokens, np.concatenate([examples.tokens for examples in one_by_one[first : first + 4]]))
    other = opened(data, tokens, seed=8)
    assert not np.array_equal(other.train(np.arange(4)).tokens, batch.tokens)


def test_the_reading_order_is_frozen(tmp_path, tokens):
    """Golden: a change would change every started live run, and needs another live_sources.VERSION."""
    for name, count in (("a", 5), ("b", 2), ("c", 4)):
        write_lines(tmp_path / f"{name}.jsonl", [f"{name}{number}" for number in range(count)])
    write_lines(tmp_path / "held.txt", documents(5))
    data = config(tmp_path, {"path": str(tmp_path / "*.jsonl"), "validation": str(tmp_path / "held.txt")})
    order = [[" ".join(texts) for texts in texts_by_epoch(opened(data, tokens, rank, 2, held_out=1), tokens, 2)] for rank in range(2)]
    assert live_sources.VERSION == 1
    assert order == [["a0 a2 a4 b1 c0 c2", "b0 a1 a3 c0 c2"], ["a1 a3 b0 c1 c3", "b1 a0 a2 a4 c1 c3"]]


def test_validation_documents_are_those_of_a_prepared_corpus(folder, tokens):
    data = config(folder, folder / "web", folder / "code.jsonl", sequence_length=16)
    samples = opened(data, tokens, held_out=10**6)
    prepared = prepare.prepare(data.model_copy(update={"live": False}), tokens)
    indices = np.arange(samples.validation_windows)
    found = documents_of(samples.validation(indices).tokens.ravel().tolist(), Tokenizer(tokens.file))
    expected = texts_of(prepared, "validation")
    assert len(expected) - 1 <= len(found) <= len(expected)
    assert set(found) <= set(expected)
    code = [text in set(documents(40, seed=9)) for text in found]
    assert code[:4] == [False, True] * 2
    few = opened(data, tokens, 1, 2, seed=8, held_out=5)
    assert few.validation_windows == 5
    assert same_examples(few.validation(indices[:5]), samples.validation(indices[:5]))
    assert samples.tokenizer_vocabulary == Samples(prepared, data, tokens, seed=0).tokenizer_vocabulary
    with pytest.raises(IndexError, match="expected indices below 5"):
        few.validation(np.array([5]))


def test_a_source_with_its_own_validation_holds_out_only_that(tmp_path, tokens):
    texts, apart = documents(50), documents(9, seed=1)
    path, held_out = write_lines(tmp_path / "a.jsonl", texts), write_lines(tmp_path / "b.jsonl", apart)
    samples = opened(config(tmp_path, {"path": str(path), "validation": str(held_out)}), tokens, held_out=10**6)
    assert sorted(texts_by_epoch(samples, tokens, 1)[0]) == sorted(texts)
    stream = samples.validation(np.arange(samples.validation_windows)).tokens[:, :2].ravel()
    assert Tokenizer(tokens.file).decode(stream).startswith(apart[0] + "<|endoftext|>" + apart[1])


def test_too_little_validation_text_is_refused(tmp_path, tokens):
    data = config(tmp_path, write_lines(tmp_path / "a.jsonl", documents(20)), sequence_length=4096)
    with pytest.raises(
        InputError, match=r"data\.validation: expected at least 4097 for a sample of 4096, got \d+ validation tokens\. Raise it from 0.1"
    ):
        prepare.prepare(data, tokens)


def test_filters_and_templates_apply(tmp_path, tokens):
    texts = documents(80)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"title": str(number), "body": text}) + "\n" for number, text in enumerate(texts)))
    source = {"path": str(path), "template": "{title}: {body}", "filter": {"minimum_characters": 200, "not_matching": "^7"}}
    data = config(tmp_path, source)
    found = [text for rank in range(2) for text in texts_by_epoch(opened(data, tokens, rank, 2), tokens, 1)[0]]
    assert sorted(found) == sorted(texts_of(prepare.prepare(data.model_copy(update={"live": False}), tokens), "train"))
    assert all(len(text) >= 200 and not text.startswith("7") for text in found)


def test_bad_rows_fail_the_run_or_are_skipped_and_logged(tmp_path, tokens, caplog):
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
    messages = [record.getMessage() for record in caplog.records]
    assert sum("skipped 1 malformed" in message for message in messages) == 2, "one by each rank"
    assert all("a.jsonl: line " in message for message in messages)


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
    assert sorted(map(sorted, stream)) == sorted([sorted(texts[40:50]), sorted(texts[50:])])  # each rank streams its own shards


def test_prepare_makes_only_the_tokenizer(tmp_path, capsys):
    data = config(tmp_path, write_lines(tmp_path / "a.jsonl", documents(200)))
    assert prepare.find_prepared(data, SMALL) is None
    prepared = prepare.prepare(data, SMALL)
    assert prepared.corpora == ()
    assert "data.live: text is tokenized while it is read; only the tokenizer is prepared" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "corpora").iterdir() if path.is_dir()] == [prepared.tokenizer.parent.name]
    assert prepare.find_prepared(data, SMALL) == prepared == prepare.prepare(data, SMALL)
    trained = TokenizerConfig(**SMALL.model_dump() | {"file": prepared.tokenizer})
    assert prepare.prepare(data, trained).fingerprint == prepared.fingerprint


def test_a_changed_corpus_or_option_is_refused(tmp_path, tokens):
    path = write_lines(tmp_path / "a.jsonl", documents(200))
    data = config(tmp_path, path)
    prepared = prepare.prepare(data, tokens)
    reopen = partial(open_samples, prepared, seed=0)
    reopen(data, tokens)
    others = [
        config(tmp_path, path, validation=0.2),
        config(tmp_path, path, bad_rows="skip"),
        config(tmp_path, {"path": str(path), "filter": {"minimum_characters": 5}}),
        config(tmp_path, path, write_lines(tmp_path / "b.jsonl", documents(9))),
    ]
    for other in others:
        with pytest.raises(InputError, match=r"expected fingerprint .* of the text that the run started with"):
            reopen(other, tokens)
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match=r"expected fingerprint .* of the text that the run started with"):
        reopen(data, tokens)


def test_relative_paths_resolve_where_the_run_was_started(tmp_path, tokens, monkeypatch):
    start = tmp_path / "a [b]*"
    (start / "text").mkdir(parents=True)
    write_lines(start / "text" / "x[1].jsonl", documents(100))
    monkeypatch.chdir(start)
    for path in ("text", "text/*.jsonl", "text/x[1].jsonl"):
        data = config(tmp_path, path)
        expected = [window(examples) for _, examples in read(opened(data, tokens), 0, 20)]
        absolute = live_sources.with_absolute_paths(data)
        monkeypatch.chdir(tmp_path)
        assert [window(examples) for _, examples in read(opened(absolute, tokens), 0, 20)] == expected
        monkeypatch.chdir(start)
    kept = ["stdlib:", "s3://bucket/x", "hf:name:config", "hf://datasets/x"]
    sources = live_sources.with_absolute_paths(config(tmp_path, *kept, "hf:text:part", "file:///x/*.txt")).sources
    assert [source.path for source in sources] == [*kept, f"hf:{start / 'text'}:part", "/x/*.txt"]


def test_token_ids_are_refused(tmp_path, tokens):
    write_file(tmp_path / "x.bin", b"\0\0" * 100)
    ids = write_file(tmp_path / "x.jsonl", b'{"text": [1, 2]}\n' * 9)
    for source in ({"path": str(tmp_path / "x.bin"), "format": "nanogpt"}, ids):
        for tokenizer in (tokens, SMALL):
            with pytest.raises(InputError) as caught:
                prepare.prepare(config(tmp_path, source), tokenizer)
            assert "expected text with data.live, got token ids. Remove data.live." in str(caught.value)
    assert not (tmp_path / "corpora").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ({"path": "a", "filter": {"dedup": True}},)}, "sources: expected no filter dedup with live"),
        ({"sources": ({"path": "a", "epochs": 2},)}, "sources: expected no epochs 2 with live"),
        ({"packing": "best_fit"}, "packing: expected no value with live.* got best_fit"),
        ({"mixture": {"a": 1}}, "mixture: expected no value with live.* got one"),
        ({"objective": "masked"}, "pairs: expected no next_sentence with live"),
    ],
)
def test_options_that_need_a_prepared_corpus_are_refused(options, message):
    with pytest.raises(ValidationError) as caught:
        DataConfig(**{"sources": ("a",), "sequence_length": 16, "live": True} | options)
    assert re.search(message, str(caught.value))


def test_the_data_loader_reports_the_cursor_of_each_step(folder, tokens):
    data = config(folder, folder / "web", sequence_length=16)
    timeline, layout = (
        Timeline(sequence_length=16, global_batch=12),
        largest_layout(TrainConfig(steps=6, global_batch=12, micro_batch=2), ParallelConfig(), 2),
    )
    expected = [cursor for cursor, _ in read(opened(data, tokens, 1, 2), 0, 37)][::6]
    assert len(set(expected)) == 7
    loader = DataLoader(opened(data, tokens, 1, 2), timeline, layout, rank=1, seed=7, steps=6, device=torch.device("cpu"))
    try:
        cursors = [loader.cursor(0)]
        for step in range(6):
            list(islice(loader.step(step), 3))
            cursors.append(loader.cursor(step + 1))
    finally:
        loader.close()
    assert cursors == expected


def test_a_checkpoint_stores_cursors(tmp_path):
    cursors = [asdict(Cursor(epoch=1, piece=2, document=3, token=rank)) for rank in range(2)]
    progress = Progress(step=4, samples_consumed=8, optimizer_steps=4, cursors=cursors)
    backend = open_backend(tmp_path)
    CheckpointWriter(backend, identity={}, attempt=1).save({"master/x": TensorViews.from_whole(torch.ones(3))}, progress)
    assert catalog.newest_valid(backend).progress == progress
