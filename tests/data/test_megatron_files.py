"""Megatron-LM's own code reads our shards, and we read and write Megatron's, byte for byte."""

import json
import os
import random
import runpy
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from token_file_writers import in_sequences, write_llmc, write_megatron, write_nanogpt, write_tokenizer

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.prepare.prepare import prepare
from manta.data.sampling.samples import Samples
from manta.data.shards.shard import ShardWriter, parse_index

END, T = 0, 16
DTYPES = {"uint16": np.uint16, "int32": np.int32}
CASES = [(dtype, sequences, ended) for dtype in DTYPES for sequences in (1, 3) for ended in (True, False)]
MEGATRON = "megatron-core>=0.16.1,<0.17"
# Runs where megatron-core is installed: writes the given documents, reads the given shards, and prints them as JSON.
MEGATRON_PROGRAM = """
import json, sys
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

request = json.load(sys.stdin)
for prefix, corpus in request["write"].items():
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(numpy, corpus["dtype"]))
    for number, document in enumerate(corpus["documents"]):
        if number % 2:
            builder.add_document([token for part in document for token in part], [len(part) for part in document])
            continue
        for part in document:
            builder.add_item(torch.tensor(part))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
shards = {}
for prefix in request["read"]:
    dataset = IndexedDataset(prefix)
    ends = dataset.document_indices.tolist()
    documents = [[int(token) for part in dataset[a:b] for token in part] for a, b in zip(ends, ends[1:])]
    shards[prefix] = {"dtype": dataset.index.dtype.__name__, "documents": documents}
print(json.dumps(shards))
"""
pytestmark = pytest.mark.timeout(900)  # packages may have to be installed


def documents(largest: int, *, ended: bool, count: int = 40) -> list[list[int]]:
    """Return short documents, one of a single id, and one with the largest id."""
    rng = random.Random(largest)
    short = [[rng.randint(END + 1, largest) for _ in range(rng.randint(1, 60))] for _ in range(count)] + [[1], [largest]]
    return [[*document, END] for document in short] if ended else short


def largest(dtype: str) -> int:
    return int(np.iinfo(DTYPES[dtype]).max)


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory) -> tuple[Path, dict]:
    """Return a folder with shards ours/DTYPE and theirs/DTYPE-SEQUENCES-ENDED, and what Megatron reads from ours."""
    environment = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "peers.py"))["environment"]
    try:
        python = environment("megatron", MEGATRON)
    except RuntimeError as error:
        pytest.skip(f"megatron-core can not be installed: {error}")
    folder = tmp_path_factory.mktemp("exchanged")
    (folder / "ours").mkdir()
    (folder / "theirs").mkdir()
    for dtype, kind in DTYPES.items():
        with ShardWriter(folder / "ours" / dtype, np.dtype(kind)) as writer:
            for document in documents(largest(dtype), ended=True):
                writer.extend(np.array(document), np.array([len(document)]), text_bytes=1)
            writer.commit()
    corpora = {name(*case): (case[0], case[1], documents(largest(case[0]), ended=case[2])) for case in CASES}
    corpora |= {split: ("uint16", 2, documents(256, ended=True)) for split in ("train", "held-out")}
    write = {
        str(folder / "theirs" / name_): {"dtype": dtype, "documents": [in_sequences(document, sequences) for document in contents]}
        for name_, (dtype, sequences, contents) in corpora.items()
    }
    request = {"read": [str(folder / "ours" / dtype) for dtype in DTYPES], "write": write}
    options = {"env": os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}, "timeout": 300}
    done = subprocess.run(
        [python, "-c", MEGATRON_PROGRAM], input=json.dumps(request), capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def name(dtype: str, sequences: int, ended: bool) -> str:
    return f"{dtype}-{sequences}-{ended}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_our_shards(exchanged, dtype):
    folder, shards = exchanged
    assert shards[str(folder / "ours" / dtype)] == {"dtype": dtype, "documents": documents(largest(dtype), ended=True)}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "sequences", "ended"), CASES)
def test_we_read_megatrons_shards(exchanged, dtype, sequences, ended):
    prefix = exchanged[0] / "theirs" / name(dtype, sequences, ended)
    index = parse_index(prefix.with_suffix(".idx").read_bytes(), str(prefix))
    assert index.dtype == DTYPES[dtype]
    assert len(index.lengths) > len(index.documents) - 1 or sequences == 1
    tokens = np.fromfile(prefix.with_suffix(".bin"), index.dtype)
    found = np.split(tokens, np.cumsum(index.document_lengths())[:-1])
    assert [document.tolist() for document in found] == documents(largest(dtype), ended=ended)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "sequences", "ended"), CASES)
def test_the_test_helper_writes_the_same_bytes_as_megatron(exchanged, tmp_path, dtype, sequences, ended):
    theirs = exchanged[0] / "theirs" / name(dtype, sequences, ended)
    write_megatron(tmp_path / "x", documents(largest(dtype), ended=ended), DTYPES[dtype], sequences=sequences)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / "x").with_suffix(suffix).read_bytes() == theirs.with_suffix(suffix).read_bytes()


@pytest.mark.slow
def test_a_run_reads_every_window_of_a_megatron_corpus(exchanged, tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    theirs = exchanged[0] / "theirs"
    source = {"path": str(theirs / "train.bin"), "validation": str(theirs / "held-out.bin"), "format": "megatron"}
    data = DataConfig(sources=(source,), sequence_length=T, directory=str(tmp_path / "corpora"), workers=1)
    tokens = TokenizerConfig(file=tmp_path / "tokenizer.json")
    samples = Samples(prepare(data, tokens), data, tokens, seed=3)
    stream = [token for document in documents(256, ended=True) for token in document]
    expected = [stream[at : at + T + 1] for at in range(0, len(stream) - T, T)]
    read = samples.train(np.arange(len(expected)))
    assert sorted(np.concatenate([read.tokens, read.targets[:, -1:]], axis=1).tolist()) == sorted(expected)


def test_a_nanogpt_file_ends_each_document_with_the_end_of_text(tmp_path):
    write_nanogpt(tmp_path / "train.bin", [[1, 2], [65535]], end_of_text=50256)
    assert (tmp_path / "train.bin").read_bytes() == struct.pack("<5H", 1, 2, 50256, 65535, 50256)


@pytest.mark.parametrize(
    ("model", "magic", "version", "kind", "end"), [("gpt-2", 20240520, 1, "H", 50256), ("llama-3", 20240801, 7, "I", 128000)]
)
def test_an_llmc_file_starts_each_document_with_the_end_of_text(tmp_path, model, magic, version, kind, end):
    write_llmc(tmp_path / "x.bin", [[1, 2], [60000]], end_of_text=end, model=model)
    written = (tmp_path / "x.bin").read_bytes()
    assert struct.unpack("<256i", written[:1024]) == (magic, version, 5, *[0] * 253)
    assert written[1024:] == struct.pack(f"<5{kind}", end, 1, 2, end, 60000)
