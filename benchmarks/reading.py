"""Cost of reading samples: manta's by number, compared with litdata and `datasets`, each in its own process, with a warm file cache.

python benchmarks/reading.py [--tokens 100000000] [--seconds 2] [--rounds 5]

All read the same tokens, each from its own format, as shuffled samples of 1,024 tokens and the next one. They return int64 arrays [K, 1024]
of tokens and targets, with the K that suits each best. Each first reads one epoch, which must contain every sample once. Then rounds
measure tokens per second of CPU time of the whole process, with all its threads. Exits with 1 if a goal is missed.

litdata iterates over a StreamingDataset with a TokensLoader, which on a local disk is three times as fast as indexing it. `datasets`
reads rows by number in its numpy format; "datasets by hand" takes its Arrow tables apart, which is as fast as it gets.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from peers import environment

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.prepare.prepare import prepare
from manta.data.sampling.samples import Samples
from manta.data.shards.shard import ShardWriter
from manta.data.tokenizer.train import train

T = 1024
GOAL = 150e6  # tokens per CPU-second
RATIOS = {"litdata": 1.3, "datasets": 2.0}  # of manta to each
LITDATA = "litdata>=0.2.76,<0.3"
END, VOCABULARY = 0, 257  # of a byte-level tokenizer without merges
CHUNK = 16 * 1024 * (T + 1)  # tokens per file, for manta and litdata
Batches = Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]  # tokens [K, T], targets [K, T]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    write: Callable[[Path], None]
    """Writes tokens.npy in its format."""
    read: Callable[[Path, int], Batches]
    """Yields epoch after epoch, in batches of K."""
    batch: int
    stride: int
    """Tokens from one sample to the next: T if neighbors share a token."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    litdata_python = environment("peers", LITDATA)
    tokens = make_tokens(options.tokens)
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "tokens.npy"), tokens)
        started = {name: start(name, folder, litdata_python if name == "litdata" else sys.executable) for name in CONTESTANTS}
        try:
            for name, process in started.items():
                if answer(process)["identity"] != identity(windows(tokens, CONTESTANTS[name].stride)):
                    print(f"{name}: an epoch does not contain each sample once")
                    return 1
            for _ in range(options.rounds):
                for name, process in started.items():
                    result = answer(process, options.seconds)
                    rates[name].append(result["tokens"] / result["seconds"])
        finally:
            for process in started.values():
                process.kill()
                process.wait()
    median = f"the median of {options.rounds} times {options.seconds:g} s"
    print(f"{len(tokens) // T:,} samples of {T:,} tokens; million tokens per CPU-second, {median}:")
    return report(rates)


def report(rates: dict[str, list[float]]) -> int:
    met = statistics.median(rates["manta"]) >= GOAL
    for name, found in rates.items():
        row = f"  {name:16} {statistics.median(found) / 1e6:7.1f}  ({min(found) / 1e6:.1f} to {max(found) / 1e6:.1f})"
        if name == "manta":
            print(f"{row}  goal {GOAL / 1e6:g}")
            continue
        ratio = statistics.median(our / their for our, their in zip(rates["manta"], found, strict=True))
        met &= ratio >= RATIOS.get(name, 0)
        print(f"{row}  manta is {ratio:.2f} times as fast" + (f", goal {RATIOS[name]:g}" if name in RATIOS else ""))
    print("met" if met else "missed")
    return 0 if met else 1


def make_tokens(count: int) -> NDArray[np.uint16]:
    """Return documents about as long as those of web text. Their tokens are whole samples for all, and one more for manta's last target."""
    whole, randomness = T * (T + 1), np.random.default_rng(0)
    tokens = randomness.integers(1, VOCABULARY, -(-count // whole) * whole + 1, dtype=np.uint16)
    ends = np.cumsum(randomness.lognormal(6.2, 1.1, len(tokens) // 100).astype(np.int64) + 2)
    tokens[ends[ends < len(tokens)]] = END
    return tokens


def windows(tokens: NDArray[Any], stride: int) -> NDArray[Any]:
    return np.lib.stride_tricks.sliding_window_view(tokens, T + 1)[::stride]


def identity(samples: NDArray[Any]) -> int:
    """Return a hash of samples [K, T + 1] that does not depend on their order."""
    return sum(xxhash.xxh3_64_intdigest(np.ascontiguousarray(sample, dtype=np.uint16)) for sample in samples) % 2**64


def start(name: str, folder: str, python: Path | str) -> subprocess.Popen[str]:
    environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LITDATA_DISABLE_VERSION_CHECK": "1"}
    command = [python, __file__]
    written = subprocess.run([*command, "write", name, folder], env=environ, capture_output=True, text=True, check=False)
    if written.returncode:
        sys.exit(f"{name}: cannot write its corpus:\n{written.stderr}")
    return subprocess.Popen([*command, "read", name, folder], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str], seconds: float | None = None) -> dict[str, Any]:
    if seconds is not None:
        print(seconds, file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{process.args} ended with {process.wait()}")
    return json.loads(line)


def serve(name: str, folder: Path) -> None:
    """Print the identity of one epoch, and then the result of each measurement that is requested on stdin."""
    contestant = CONTESTANTS[name]
    batches = contestant.read(folder, contestant.batch)
    remaining = (np.load(folder / "tokens.npy", mmap_mode="r").size - 1) // contestant.stride
    found = 0
    while remaining > 0:
        tokens, targets = next(batches)
        found += identity(np.concatenate([tokens, targets[:, -1:]], axis=1))
        remaining -= len(tokens)
        assert remaining >= 0, "a batch crosses the end of an epoch"
        assert tokens.dtype == targets.dtype == np.int64
        assert np.array_equal(tokens[:, 1:], targets[:, :-1])
    print(json.dumps({"identity": found % 2**64}), flush=True)
    for line in sys.stdin:
        read, end, spent = 0, time.perf_counter() + float(line), time.process_time()
        while time.perf_counter() < end:
            read += next(batches)[0].size
        print(json.dumps({"tokens": read, "seconds": time.process_time() - spent}), flush=True)


def write_manta(folder: Path) -> None:
    """Write shards in Megatron's format."""
    tokens = np.load(folder / "tokens.npy")
    for at in range(0, len(tokens), CHUNK):
        write_shard(folder / "train" / f"{at // CHUNK:03d}", tokens[at : at + CHUNK])
    write_shard(folder / "held-out" / "000", tokens[:CHUNK])
    (folder / "tokenizer.json").write_text(train([], vocabulary=VOCABULARY, end_of_text="<|endoftext|>"))
    open_prepared(folder)


def write_shard(prefix: Path, tokens: NDArray[np.uint16]) -> None:
    prefix.parent.mkdir(exist_ok=True)
    ends = np.flatnonzero(tokens[:-1] == END) + 1
    with ShardWriter(prefix, tokens.dtype) as writer:
        for document in np.split(tokens, ends):
            writer.extend(document, np.array([len(document)]), text_bytes=0)
        writer.commit()


def open_prepared(folder: Path) -> Samples:
    source = {"path": str(folder / "train"), "validation": str(folder / "held-out"), "format": "megatron"}
    data = DataConfig(sources=(source,), sequence_length=T, directory=str(folder / "prepared"), workers=1)
    tokens = TokenizerConfig(file=folder / "tokenizer.json")
    return Samples(prepare(data, tokens), data, tokens, seed=0)


def read_manta(folder: Path, batch: int) -> Batches:
    samples, first = open_prepared(folder), 0
    while True:
        for numbers in in_batches(np.arange(first, first + count(folder, T)), batch):
            examples = samples.train(numbers)
            yield examples.tokens, examples.targets
        first += count(folder, T)


def write_litdata(folder: Path) -> None:
    import litdata

    parts = [(str(folder / "tokens.npy"), count(folder, T + 1) * (T + 1))]
    litdata.optimize(
        rows_for_litdata,
        parts,
        str(folder / "litdata"),
        chunk_size=CHUNK,
        item_loader=litdata.TokensLoader(),
        num_workers=1,
        mode="overwrite",
    )


def rows_for_litdata(part: tuple[str, int]) -> Iterator[Any]:
    """Yield whole samples, so that no file ends within one. TokensLoader does not keep the ends of documents."""
    import torch

    file, end = part
    tokens = np.load(file)
    for first in range(0, end, 16 * (T + 1)):
        yield torch.from_numpy(tokens[first : min(first + 16 * (T + 1), end)])


def read_litdata(folder: Path, batch: int) -> Batches:
    import torch
    from litdata import StreamingDataset, TokensLoader

    dataset = StreamingDataset(str(folder / "litdata"), item_loader=TokensLoader(block_size=T + 1), shuffle=True)
    while True:
        rows: list[torch.Tensor] = []
        for row in dataset:
            rows.append(row)
            if len(rows) == batch:
                yield split(torch.stack(rows).long().numpy())
                rows = []
        if rows:
            yield split(torch.stack(rows).long().numpy())


def write_datasets(folder: Path) -> None:
    import datasets
    import pyarrow as pa

    if (folder / "datasets").exists():  # two contestants share it
        return
    ids = np.load(folder / "tokens.npy")[: count(folder, T + 1) * (T + 1)]
    rows = pa.FixedSizeListArray.from_arrays(pa.array(ids), T + 1)  # the narrowest type and a fixed length are its fastest
    datasets.Dataset(pa.table({"input_ids": rows})).save_to_disk(str(folder / "datasets"))


def read_datasets(folder: Path, batch: int) -> Batches:
    import datasets

    dataset = datasets.load_from_disk(str(folder / "datasets")).with_format("numpy")
    for rows in shuffled(folder, batch):
        yield split(dataset[rows]["input_ids"].astype(np.int64))


def read_arrow(folder: Path, batch: int) -> Batches:
    import datasets

    dataset = datasets.load_from_disk(str(folder / "datasets")).with_format("arrow")
    for rows in shuffled(folder, batch):
        ids = dataset[rows]["input_ids"].combine_chunks().flatten().to_numpy()
        yield split(ids.astype(np.int64).reshape(len(rows), T + 1))


def shuffled(folder: Path, batch: int) -> Iterator[NDArray[np.int64]]:
    """Yield shuffled row numbers, epoch after epoch."""
    randomness = np.random.default_rng(0)
    while True:
        yield from in_batches(randomness.permutation(count(folder, T + 1)), batch)


def in_batches(numbers: NDArray[np.int64], batch: int) -> Iterator[NDArray[np.int64]]:
    return (numbers[at : at + batch] for at in range(0, len(numbers), batch))


def count(folder: Path, stride: int) -> int:
    """Return the number of samples in an epoch."""
    return (np.load(folder / "tokens.npy", mmap_mode="r").size - 1) // stride


def split(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return ids[:, :-1], ids[:, 1:]


CONTESTANTS = {
    "manta": Contestant(write=write_manta, read=read_manta, batch=256, stride=T),
    "litdata": Contestant(write=write_litdata, read=read_litdata, batch=64, stride=T + 1),
    "datasets": Contestant(write=write_datasets, read=read_datasets, batch=256, stride=T + 1),
    "datasets by hand": Contestant(write=write_datasets, read=read_arrow, batch=256, stride=T + 1),
}

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", name, folder]:
            CONTESTANTS[name].write(Path(folder))
        case ["read", name, folder]:
            serve(name, Path(folder))
        case _:
            sys.exit(main())
