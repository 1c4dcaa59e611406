"""What `manta data` tells of a corpus and of a step is true: counted by hand on small ones, and proven by what a real run logged."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from corpora import SMALL, config, documents, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from object_store import ObjectStore
from sample_cases import WAYS, config_of, open_way

from manta.data.config import CacheConfig, TokenizerConfig
from manta.data.objectives.examples import IGNORED
from manta.data.objectives.objective import window_shape
from manta.data.objectives.render import Speller
from manta.data.prepare import contamination, prepare
from manta.data.prepare.contamination import SPAN, find_contamination
from manta.data.prepare.dedup import find_duplicates
from manta.data.sampling.packing import best_fit
from manta.data.sampling.timeline import Timeline
from manta.data.sampling.windows import TokenStream, WindowShape
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import Home
from manta.data.shards.shard import ShardWriter
from manta.data.shards.statistics import Lengths, contents, documents_cut, stream_of, windows_by_stream
from manta.data.shards.verify import Damage, size, verify
from manta.launch.inspect.charts import visible
from manta.trainer.metrics import read_metrics

lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=60)


def put(folder: Path, *shards: list[list[int]], dtype: type = np.uint16) -> TokenStream:
    """A stream of these shards of documents."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for index, of_shard in enumerate(shards):
        with ShardWriter(folder / f"{index}", np.dtype(dtype)) as writer:
            for document in of_shard:
                writer.append(np.array(document), 0)
            made.append(writer.commit())
    return TokenStream(Home(str(folder), CacheConfig()), made)


def listen(_: int) -> None:
    pass


@settings(deadline=None)
@given(lengths)
def test_a_histogram_counts_each_document_and_token_once(some):
    drawn = Lengths.of(np.array(some)).by_octave()
    rows = zip(drawn.edges[:-1], drawn.edges[1:], drawn.documents, drawn.tokens, strict=True)
    for first, end, of_bin, tokens in rows:
        here = [length for length in some if first <= length < end]
        assert (len(here), sum(here), end) == (of_bin, tokens, 2 * first)
    assert drawn.documents.sum() == len(some)
    assert drawn.documents[0] * drawn.documents[-1] > 0


@settings(deadline=None)
@given(some=lengths, length=st.integers(2, 200), shared=st.integers(0, 1), begin=st.integers(0, 300))
def test_a_document_is_cut_where_it_lies_in_two_windows(some, length, shared, begin):
    inputs = np.repeat(np.arange(len(some)), some)
    windows = (begin + np.arange(len(inputs))) // length
    several = sum(len(set(windows[inputs == document].tolist())) > 1 for document in range(len(some)))
    assert documents_cut(np.array(some), WindowShape(width=length + shared, stride=length), begin=begin) == several


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("way", ["one", "masked, packed"])
def test_what_packing_makes_of_documents_is_what_samples_hold(tmp_path, way, apart):
    samples = open_way(sources_in(tmp_path), **WAYS[way] | ({"shuffle_shards": 2} if apart else {}))
    shape = WindowShape(width=17, stride=16) if way == "one" else WindowShape(width=14, stride=14)
    (draw,) = samples.sampler.sources
    found = [contents(stream.home, manifest.load(stream.home), shape, apart=apart) for stream in draw.streams]
    told = [one.cut if way == "one" else one.best_fit for one in found]
    assert sum(one.samples for one in told) == len(draw.dataset)
    if way != "one":
        documents_of = [stream.home.index(shard).document_lengths() for stream in draw.streams for shard in stream.shards]
        bins = [best_fit(lengths, shape.width, overlap=0) for lengths in documents_of]
        assert sum(one.padding for one in told) == sum(len(one) * shape.width - int(one.lengths.sum()) for one in bins)
        assert sum(one.cut for one in told) == sum(int((lengths > shape.width).sum()) for lengths in documents_of)


def sources_in(folder: Path) -> Path:
    (folder / "web").mkdir()
    for part in range(3):
        write_lines(folder / "web" / f"{part}.jsonl", documents(12, seed=part))
    write_lines(folder / "code.jsonl", documents(20, seed=9))
    return folder


def test_the_source_of_a_window_is_the_one_whose_text_it_is(tmp_path):
    folder = sources_in(tmp_path)
    for way in ({}, {"packing": "best_fit"}, {"shuffle_shards": 2}):
        (draw,) = open_way(folder, **way).sampler.sources
        texts = [np.concatenate([stream.map(shard) for shard in range(len(stream.shards))]).tobytes() for stream in draw.streams]
        read = draw.dataset.read(np.arange(len(draw.dataset)))
        for window in range(len(draw.dataset)):
            first = read.tokens[window] if read.documents is None else read.tokens[window][read.documents[window] == 0]
            assert first.astype(np.uint16).tobytes() in texts[stream_of(draw, window)]
        owners = [stream_of(draw, window) for window in range(len(draw.dataset))]
        assert windows_by_stream(draw).tolist() == np.bincount(owners, minlength=2).tolist()


def test_each_copy_of_a_document_but_the_first_is_a_duplicate(tmp_path):
    rng = np.random.default_rng(0)
    pool = [rng.integers(0, 50, rng.integers(1, 40)).tolist() for _ in range(30)]
    taken = [[pool[at] for at in rng.integers(0, 30, 60)] for _ in range(3)]
    train = [put(tmp_path / "a", taken[0][:20], taken[0][20:]), put(tmp_path / "b", taken[1], dtype=np.int32)]
    held_out = [put(tmp_path / "c", taken[2] + [[1, 2, 3]]), put(tmp_path / "d", [[7] * 90])]
    read = []
    found = find_duplicates(train, held_out, max_tokens=10**9, advance=read.append)
    times = Counter(map(tuple, taken[0] + taken[1]))
    new = len(set(map(tuple, taken[0])))
    assert found.documents == (60, 60)
    assert found.repeated == (60 - new, 60 - (len(times) - new))
    assert sum(found.repeated_tokens) == sum((count - 1) * len(document) for document, count in times.items())
    assert [one.count for one in found.most_frequent] == sorted(times.values(), reverse=True)[:5]
    assert all(times[tuple(one.tokens.tolist())] == one.count for one in found.most_frequent)
    assert found.validation_in_train == (sum(tuple(document) in times for document in taken[2]), 0)
    assert sum(read) == sum(int(stream.starts[-1]) for stream in (*train, *held_out))


def test_of_a_large_corpus_all_documents_of_some_lengths_are_compared(tmp_path):
    rng = np.random.default_rng(1)
    pool = [rng.integers(0, 50, length).tolist() for length in range(1, 200)]
    taken = [pool[at] for at in rng.integers(0, 199, 800)]
    tokens = sum(map(len, taken))
    found = find_duplicates([put(tmp_path, taken)], [], max_tokens=tokens // 4, advance=listen)
    assert 0.1 * tokens < found.tokens[0] < 0.4 * tokens
    compared = {len(one.tokens) for one in found.most_frequent}
    times = Counter(len(document) for document in taken)  # a length is one document's
    assert [one.count for one in found.most_frequent] == [times[len(one.tokens)] for one in found.most_frequent]
    assert len(compared) == 5
    assert found.repeated[0] / found.documents[0] == pytest.approx(1 - 199 / 800, abs=0.1)


@pytest.mark.parametrize("chunk", [64, 1 << 16])
def test_validation_tokens_in_spans_that_train_has_are_found(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(contamination, "_CHUNK", chunk)
    rng = np.random.default_rng(2)
    text = rng.integers(1, 4, 3000)  # of three ids: spans of 50 come by chance never, short ones always
    held_out = rng.integers(1, 4, 2000)
    for place, length in ((0, 49), (100, 50), (300, 51), (500, 120), (800, 49), (1700, 300)):
        begin = int(rng.integers(0, 2600))
        held_out[place : place + length] = text[begin : begin + length]
    spans = {text[at : at + SPAN].tobytes() for at in range(len(text) - SPAN + 1)}
    covered = np.zeros(len(held_out), dtype=bool)
    for at in range(len(held_out) - SPAN + 1):
        if held_out[at : at + SPAN].tobytes() in spans:
            covered[at : at + SPAN] = True
    expected = int(covered.sum())
    assert 521 <= expected < 640
    cut = [text[:700].tolist()], [text[700:].tolist()]  # a span may not reach over the end of a shard
    found = find_contamination(
        [put(tmp_path / "whole", [text.tolist()])], [put(tmp_path / "held", [held_out.tolist()])], max_tokens=10**9, advance=listen
    )
    assert (found.found, found.searched_for, found.searched) == ((expected,), (2000,), 3000)
    apart = find_contamination(
        [put(tmp_path / "cut", *cut)], [put(tmp_path / "held", [held_out.tolist()])], max_tokens=10**9, advance=listen
    )
    assert apart.found[0] <= expected
    none = find_contamination(
        [put(tmp_path / "short", [[1, 2]])], [put(tmp_path / "held", [held_out.tolist()])], max_tokens=10**9, advance=listen
    )
    assert none.found == (0,)


def test_text_that_is_all_alike_is_found_too(tmp_path):
    alike = [put(tmp_path / "a", [[5] * 400]), put(tmp_path / "b", [[5] * 30, [6] * 10])]
    held_out = [put(tmp_path / "c", [[5] * 70 + [9]]), put(tmp_path / "d", [[6] * 20])]
    assert find_contamination(alike, held_out, max_tokens=10**9, advance=listen).found == (70, 0)


@pytest.mark.parametrize("way", WAYS)
def test_each_token_of_a_sample_is_spelled_once(tmp_path, way):
    folder = sources_in(tmp_path)
    samples = open_way(folder, **WAYS[way])
    apart = open_way(folder, **WAYS[way] | {"separate_documents": True})
    file = prepare.find_prepared(config_of(folder, **WAYS[way]), SMALL).tokenizer
    is_masked = WAYS[way].get("objective") == "masked"
    speller = Speller(file, end_of_text="<|endoftext|>", masked=is_masked)
    examples, other = (one.train(np.arange(40)) for one in (samples, apart))
    for at, row in enumerate(speller.rows(examples, other)):
        spelled = speller(row)
        tokens, targets = examples.tokens[at], examples.targets[at]
        beyond = not is_masked and targets[-1] != IGNORED
        assert sum(passage.tokens for passage in spelled.passages) + spelled.padding == len(tokens) + beyond
        pieces = [piece for passage in spelled.passages for piece in passage.pieces]
        asked = [piece for piece in pieces if piece.kind in {"hidden", "replaced", "kept"}]
        assert len(asked) == is_masked * (targets != IGNORED).sum()
        decode = speller._tokenizer.decode
        assert [piece.wanted.strip() for piece in asked] == [decode([one]).strip() for one in targets[targets != IGNORED]][: len(asked)]
        if not is_masked:
            real = [*tokens[: len(tokens) - spelled.padding].tolist(), *targets[-1:][: int(beyond)].tolist()]
            assert "".join(passage.text for passage in spelled.passages) == decode(real)
            assert all(passage.pieces[-1].text == "<|endoftext|>" for passage in spelled.passages[:-1]) or "packed" in way


def look(prepared, data) -> list[Damage]:
    corpora = [(home := Home(root, CacheConfig()), manifest.load(home)) for root in prepared.corpora]
    read = []
    found = verify(corpora, window_shape(data), tell=read.append)
    if not found:
        assert sum(read) == size(corpora, window_shape(data))[1]
    return found


def test_how_a_corpus_is_packed_is_verified_too_and_can_be_mended(tmp_path):
    data = config(tmp_path / "corpora", write_lines(tmp_path / "some.jsonl", documents(80)), packing="best_fit")
    prepared = prepare.prepare(data, SMALL)
    assert look(prepared, data) == []
    (packing,) = Path(prepared.corpora[0]).glob("piece-00000.train.packing-*.bin")
    content = bytearray(packing.read_bytes())
    content[100] ^= 1
    packing.write_bytes(content)
    (found,) = look(prepared, data)
    assert found.path == str(packing)
    packing.unlink()
    (found,) = look(prepared, data)
    assert (found.path, found.got) == (str(packing), "no such file")
    assert look(prepare.prepare(data, SMALL), data) == []


@pytest.mark.parametrize("change", [3, 1030])
def test_a_file_of_several_shards_is_read_once(tmp_path, change):
    """One of llm.c's, with a header before the ids: train and validation lie in it."""
    prepared = prepare.prepare(config(tmp_path / "corpora", write_lines(tmp_path / "some.jsonl", documents(80))), SMALL)
    home = Home(prepared.corpora[0], CacheConfig())
    ids = np.concatenate([home.tokens(shard) for shard in manifest.load(home).train.shards])
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    file = tmp_path / "theirs.bin"
    file.write_bytes(header.tobytes() + ids.tobytes())
    data, tokens = config(tmp_path / "corpora", file), TokenizerConfig(file=prepared.tokenizer)
    theirs = prepare.prepare(data, tokens)
    assert look(theirs, data) == []
    content = bytearray(file.read_bytes())
    content[change] ^= 1
    file.write_bytes(content)
    (found,) = look(theirs, data)
    assert (found.path, found.got[:5]) == (str(file), "xxh3 ")


def test_ids_and_counts_that_do_not_fit_are_found_though_hashes_do(tmp_path):
    data = config(tmp_path / "corpora", write_lines(tmp_path / "some.jsonl", documents(80)))
    prepared = prepare.prepare(data, SMALL)
    home = Home(prepared.corpora[0], CacheConfig())
    corpus = manifest.load(home)
    (shard,) = corpus.train.shards
    (small,) = verify([(home, corpus.model_copy(update={"vocabulary": 100}))], window_shape(data), tell=listen)[:1]
    assert (small.path, small.wanted) == (home.at(shard.file), "ids below 100")
    fewer = shard.model_copy(update={"documents": shard.documents - 1})
    other = corpus.model_copy(update={"train": corpus.train.model_copy(update={"shards": (fewer,)})})
    counts, index = verify([(home, other)], window_shape(data), tell=listen)
    assert (counts.path, counts.wanted) == (home.at("manifest.json"), f"{shard.documents - 1:,}, the sum of its shards")
    assert (index.path, index.got) == (home.at(shard.index), f"{shard.documents:,} documents")


def test_no_text_moves_the_cursor_of_a_terminal():
    assert visible("a\x1b[2J\tb\r\n\x7f\x9b1m é") == "a␛[2J\tb␍\n␡�1m é"


# The commands, on a corpus of two sources that a real run was trained on.

SOURCES = "data.sources={early: 'documents/[a-d]*.txt', late: {path: 'documents/[e-h]*.txt', epochs: 1}}"
MIXED = "data.mixture=[{weights: {early: 0.75, late: 0.25}}, {from_tokens: 768, weights: {late: 1}}]"
GROWING = ("data.curriculum=[{sequence_length: 16}, {from_tokens: 256, sequence_length: 32}]", "data.skip=[[5, 9], [30, 32]]")
RAMP = "train.batch_ramp=[{global_batch: 4}, {from_tokens: 512, global_batch: 8}]"
CONFIG = (SOURCES, MIXED, *GROWING, RAMP, "train.micro_batch=2")
STEPS = 9


@pytest.fixture(scope="module")
def run(workspace) -> str:
    workspace.train("looked at", *CONFIG, f"train.steps={STEPS}")
    return "looked at"


@pytest.fixture(scope="module")
def masked(workspace) -> str:
    of_bert = ("model.preset=bert-tiny", "model.kv_heads=null", "data.objective=masked", "tokenizer.algorithm=wordpiece")
    workspace.train("of bert", *of_bert, "train.steps=2", "cluster.ranks_per_node=1")
    return "of bert"


def told(workspace, *arguments: str, code: int = 0) -> dict:
    done = workspace.manta("data", *arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def told_step(workspace, run: str, step: int, *more: str, code: int = 0) -> dict:
    return told(workspace, "sample-at", run, str(step), *more, code=code)


@pytest.fixture(scope="module")
def steps(workspace, run) -> list[dict]:
    """What `sample-at` tells of each step."""
    with ThreadPoolExecutor(2) as both:
        return list(both.map(lambda step: told_step(workspace, run, step), range(1, STEPS + 1)))


def corpora(workspace, run: str) -> list[tuple[Home, manifest.Manifest]]:
    homes = [Home(root, CacheConfig()) for root in told(workspace, "verify", run)["corpora"]]
    return [(home, manifest.load(home)) for home in homes]


def test_inspect_tells_what_the_manifests_and_shards_hold(workspace, run, tmp_path):
    found = told(workspace, "inspect", run, "--png", str(tmp_path / "pictures"))
    for source, (_, corpus) in zip(found["sources"], corpora(workspace, run), strict=True):
        assert source["source"] == corpus.source
        assert [source[key] for key in ("documents", "tokens", "text_bytes")] == [
            corpus.train.documents,
            corpus.train.tokens,
            corpus.train.text_bytes,
        ]
        assert source["validation"]["tokens"] == corpus.validation.tokens
        assert sum(row["documents"] for row in source["lengths"]) == corpus.train.documents
    assert sum(source["share"] for source in found["sources"]) == pytest.approx(1)
    assert found["duplicates"]["documents_compared"] == found["all"]["documents"]
    assert found["overlap"]["train_tokens_searched"] == found["all"]["tokens"]
    assert found["steps_per_epoch"] is None
    for path in found["png"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
        assert Path(path).stat().st_size > 10_000
    printed = workspace.manta("data", "inspect", run)
    assert printed.returncode == 0
    assert "early" in printed.stdout
    assert f"{found['packing']['best_fit']['samples']:,}" in printed.stdout
    assert "duplicates:" in printed.stdout
    quick = told(workspace, "inspect", str(workspace.config_file), "data.sequence_length=64", "--read", "0")
    assert quick["packing"]["sequence_length"] == 64
    assert "duplicates" not in quick


def test_verify_reads_all_of_it(workspace, run):
    found = told(workspace, "verify", run)
    assert found["damaged"] == []
    shards = [path for root in found["corpora"] for suffix in ("bin", "idx") for path in Path(root).glob(f"*.{suffix}")]
    assert (found["files"], found["bytes"]) == (len(shards), sum(path.stat().st_size for path in shards))
    assert "each id below 512" in workspace.manta("data", "verify", str(workspace.config_file), *CONFIG).stdout


@pytest.mark.parametrize("of", [pytest.param("file", marks=pytest.mark.slow), "run"])
def test_verify_tells_of_all_that_is_damaged(workspace, run, of):
    shutil.copytree(workspace.directory / "corpora", workspace.directory / f"damaged {of}")
    where = (str(workspace.config_file), f"data.directory=damaged {of}", *CONFIG)
    if of == "run":
        copy = workspace.directory / "on what is damaged"
        shutil.copytree(workspace.directory / run, copy, ignore=shutil.ignore_patterns("checkpoints"))
        begun = (copy / "manifest.json").read_text()
        (copy / "manifest.json").write_text(begun.replace("/corpora/", "/damaged run/"))
        where = (copy.name,)
    early, late = map(Path, told(workspace, "verify", *where)["corpora"])
    flipped, short, gone = early / "piece-00000.train.bin", early / "piece-00000.train.idx", late / "piece-00000.validation.bin"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    short.write_bytes(short.read_bytes()[:-8])
    gone.unlink()
    expected = [str(flipped), str(short), str(gone)]
    if of == "run":
        (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
        expected.insert(0, str(copy / "tokenizer.json"))
    done = workspace.manta("data", "verify", *where)
    lines = [line for line in done.stderr.splitlines() if line.startswith("manta: ")]
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line.split(": got ")[0].removeprefix("manta: ") for line in lines] == expected
    assert "got xxh3 " in lines[0]
    assert f"got {short.stat().st_size:,} bytes, wants {short.stat().st_size + 8:,}; make it again: manta prepare " in lines[-2]
    assert "got no such file" in lines[-1]
    assert [f"manta: {line}" for line in told(workspace, "verify", *where, code=2)["damaged"]] == lines
    if of == "file":
        assert workspace.manta("prepare", *where).returncode == 0
        assert told(workspace, "verify", *where)["damaged"] == []


@pytest.mark.slow
def test_a_corpus_in_an_object_store_is_looked_at_where_it_lies(workspace, tmp_path):
    prepared, cache = (str(workspace.config_file), "data.directory=s3://corpus/corpora"), tmp_path / "cache"
    where = (*prepared, f"data.cache.directory={cache}")
    with ObjectStore() as store:
        assert (
            workspace.manta("prepare", *prepared, f"data.cache.directory={tmp_path / 'of the preparation'}", **store.environment).returncode
            == 0
        )
        quick = workspace.manta("data", "inspect", *where, "--read", "0", "--json", **store.environment)
        assert json.loads(quick.stdout)["all"]["documents"] > 50
        assert not list(cache.rglob("*.bin")), "tokens were fetched, and nobody asked for them"
        whole = json.loads(workspace.manta("data", "inspect", *where, "--json", **store.environment).stdout)
        assert whole["overlap"]["train_tokens_searched"] == whole["all"]["tokens"]
        verified = json.loads(workspace.manta("data", "verify", *where, "--json", **store.environment).stdout)
        assert verified["damaged"] == []
        shard = f"{verified['corpora'][0]}/piece-00000.validation.bin"
        store.put(shard.removeprefix("s3://corpus/"), b"\0" * 2 * whole["all"]["validation"]["tokens"])
        damaged = workspace.manta("data", "verify", *where, **store.environment)
        assert damaged.returncode == 2
        assert f"manta: {shard}: got xxh3 " in damaged.stderr


def test_mixture_tells_what_each_source_gives_by_when(workspace, run, steps):
    found = told(workspace, "mixture", run)
    begins = {row["step"]: row["begins"] for row in found["rows"] if row["begins"]}
    assert begins == {2: ["length 32"], 4: ["batch 8"], 5: ["stage 2"]}
    whole = Timeline(sequence_length=32, global_batch=8, ramp=[(0, 4), (512, 8)])
    read = {step: [sample for told in steps[:step] for sample in told["samples"]] for step in range(STEPS + 1)}
    for row in found["rows"]:
        assert row["tokens"] == whole.tokens(row["step"])
        assert sum(of["tokens"] for of in row["sources"].values()) == row["tokens"]
        by_source = Counter(sample["source"] for sample in read[row["step"]])
        assert {name: of["tokens"] for name, of in row["sources"].items()} == {name: 32 * by_source[name] for name in row["sources"]}
    assert [row["sources"]["late"]["share"] for row in found["rows"]] == [0.25 if row["step"] < 5 else 1 for row in found["rows"]]
    assert found["warnings"] == []
    printed = workspace.manta("data", "mixture", run).stdout
    assert "stage 2" in printed
    assert "100 %" in printed


@pytest.mark.slow
def test_mixture_warns_of_the_step_at_which_a_source_is_read_too_often(workspace, run, tmp_path):
    far = told(workspace, "mixture", run, "--steps", "20000", "--png", str(tmp_path))
    (warning,) = far["warnings"]
    assert (warning["source"], warning["kind"], warning["in_run"]) == ("late", "cap", False)
    steps = [
        told(workspace, "mixture", run, "--steps", str(warning["step"] + more))["rows"][-1]["sources"]["late"]["epochs"] for more in (-1, 0)
    ]
    assert steps[0] <= 1 < steps[1]
    assert (
        f"late: read more than its epochs 1 from step {warning['step']:,} on"
        in workspace.manta("data", "mixture", run, "--steps", "20000").stdout
    )
    assert (tmp_path / "mixture.png").read_bytes().startswith(b"\x89PNG")
    pooled = told(workspace, "mixture", str(workspace.config_file), SOURCES, "--steps", "20000")
    assert {warning["kind"] for warning in pooled["warnings"]} == {"cap", "again"}
    sizes = [source["samples"] for source in pooled["sources"]]
    assert [of["share"] for of in pooled["rows"][0]["sources"].values()] == [size / sum(sizes) for size in sizes]


def test_sample_at_shows_what_the_run_was_trained_on(workspace, run, steps):
    lines = read_metrics(workspace.directory / run / "metrics.jsonl")
    numbers: list[int] = []
    assert [line["step"] for line in lines] == [found["step"] for found in steps]
    for line, found in zip(lines, steps, strict=True):
        assert found["digest"] == {"computed": line["data/digest"], "logged": line["data/digest"], "matches": True}
        assert (found["global_batch"], found["sequence_length"]) == (line["global_batch"], line["sequence_length"])
        assert [sample["slot"] for sample in found["samples"]] == list(range(line["global_batch"]))
        assert [sample["rank"] for sample in found["samples"]] == [slot // 2 % 2 for slot in range(line["global_batch"])]
        assert [sample["turn"] for sample in found["samples"]] == [slot // 4 for slot in range(line["global_batch"])]
        assert all(len(sample["sequences"]) == 32 // line["sequence_length"] for sample in found["samples"])
        numbers += [sample["sample"] for sample in found["samples"]]
    left = [number for number in range(numbers[-1] + 1) if number not in {5, 6, 7, 8, 30, 31}]
    assert numbers == left, "those that are skipped are not read, and no other is missing"
    texts = {
        name: "".join(path.read_text() for path in (workspace.directory / "documents").glob(f"{names}*.txt"))
        for name, names in NAMES.items()
    }
    for sample in steps[-1]["samples"]:
        for document in sample["sequences"][0]["documents"]:
            assert document["text"].removesuffix("<|endoftext|>").strip("�") in texts[sample["source"]]


NAMES = {"early": "[a-d]", "late": "[e-h]"}


@pytest.mark.slow
def test_sample_at_deals_a_step_out_over_any_ranks(workspace, run, steps):
    whole = steps[7]
    for ranks in (1, 2):
        dealt = [told_step(workspace, run, 8, "--ranks", str(ranks), "--rank", str(rank))["samples"] for rank in range(ranks)]
        assert sorted((sample["slot"], sample["sample"]) for of_rank in dealt for sample in of_rank) == [
            (sample["slot"], sample["sample"]) for sample in whole["samples"]
        ]
    (only,) = told_step(workspace, run, 8, "--slot", "3")["samples"]
    assert only == whole["samples"][3]
    printed = workspace.manta("data", "sample-at", run, "8", "--slot", "3", "--full").stdout
    assert "as the run logged it: this is what was trained on" in printed
    assert f"sample {only['sample']:,} · {only['source']} · epoch 1" in printed
    shown = "".join(line[6:] for line in printed.splitlines() if "┃" in line)
    assert "".join(only["sequences"][0]["documents"][0]["text"].split("\n")) in shown


def test_another_digest_than_the_logged_one_is_told_loudly(workspace, run):
    copy = workspace.directory / "another digest"
    shutil.copytree(workspace.directory / run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    metrics = copy / "metrics.jsonl"
    lines = read_metrics(metrics)
    lines[2]["data/digest"] ^= 1
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines[:5]))
    done = workspace.manta("data", "sample-at", copy.name, "3")
    assert done.returncode == 1
    assert "THIS IS NOT WHAT WAS TRAINED ON" in done.stdout
    assert told_step(workspace, copy.name, 3, code=1)["digest"]["matches"] is False
    assert workspace.manta("data", "sample-at", copy.name, "2").returncode == 0
    assert told_step(workspace, copy.name, 7)["digest"]["logged"] is None


@pytest.mark.slow
def test_sample_at_shows_what_was_hidden(workspace, masked):
    found = told_step(workspace, masked, 2)
    assert found["digest"]["matches"] is True
    for sample in found["samples"]:
        (sequence,) = sample["sequences"]
        assert sequence["pair"] in {"B follows A", "B is from elsewhere"}
        pieces = [piece for document in sequence["documents"] for piece in document["pieces"]]
        assert [piece["text"] for piece in pieces if piece["kind"] == "special" and "[" in piece["text"]] == ["[CLS]", "[SEP]", "[SEP]"]
        assert sum("wanted" in piece for piece in pieces) == round(0.15 * 29)
    assert "⟦[MASK]→" in workspace.manta("data", "sample-at", masked, "2").stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["inspect", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["inspect", "FILE", "tokenizer.vocabulary=333"], "its corpus is not prepared; run: manta prepare 'run file.yaml'"),
        (["inspect", "documents"], "documents: got no config.yaml, wants a run directory"),
        (["inspect", "FILE", "data.live=true"], "data.live: got true"),
        (["inspect", "FILE", "--png", "run file.yaml/below"], "--png: got run file.yaml/below (Not a directory), wants a directory"),
        (["verify", "FILE", "tokenizer.vocabulary=333"], "its corpus is not prepared; run: manta prepare 'run file.yaml'"),
        (["mixture", "FILE", "data.mixture=[{weights: {web: 1}}]"], "mixture: expected names of sources, got 'web'"),
        (["sample-at", "FILE", "1"], "run file.yaml: got no directory, wants a run directory"),
        (["sample-at", "RUN", "0"], "STEP: got 0, wants 1 to 9"),
        (["sample-at", "RUN", "10"], "STEP: got 10, wants 1 to 9"),
        (["sample-at", "RUN", "1", "--slot", "4"], "--slot: got 4, wants 0 to 3: step 1 has 4 samples"),
        (["sample-at", "RUN", "9", "--rank", "2"], "--rank: got 2, wants 0 to 1"),
        (
            ["sample-at", "RUN", "9", "--ranks", "3"],
            "--ranks: got 3, wants a divisor of train.global_batch / train.micro_batch 2; use 1 or 2",
        ),
    ],
)
def test_bad_input_is_told_in_a_line(workspace, run, arguments, told):
    named = {"FILE": workspace.config_file.name, "RUN": run}
    done = workspace.manta("data", *(named.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("manta: ")
    assert told in line


@pytest.mark.parametrize("command", [["inspect", "RUN"], ["verify", "RUN"], ["mixture", "RUN"], ["sample-at", "RUN", "2"]])
def test_no_command_waits_for_torch(workspace, run, command):
    heavy = "{'torch', 'ray', 'deepspeed', 'datasets', 'matplotlib', 'pyarrow'}"
    script = f"""
import sys
from manta.launch.cli import main
sys.argv = ["manta", "data", *{[run if word == "RUN" else word for word in command]}]
try:
    main()
except SystemExit as left:
    assert not left.code, left.code
sys.stderr.write('imported: ' + ' '.join({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], cwd=workspace.directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "imported: "
    assert f"For example: manta data {command[0]} " in workspace.manta("data", command[0], "--help").stdout
