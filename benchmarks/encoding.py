"""Cost of tokenizing text to disk: `manta prepare` on one core, compared with datasets.map and tokenizers.

python benchmarks/encoding.py [--rounds 2] [--vocabularies 4096 32768]

The text is `stdlib:`, about 30 MB, and the tokenizer is trained before. The result is MB of text per second of CPU time (user and system,
child processes included) after imports. manta finds, reads, splits, encodes, writes and hashes the files, and proves its encoder;
datasets.map reads documents from an Arrow file and writes its cache file. Each round runs both, each in a new process; their ids must be
the same. Exits with 1 if a goal is missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.prepare.prepare import prepare
from manta.data.shards.manifest import PreparedData

GOAL, RATIO = 10.0, 3.5  # MB per CPU-second, and the ratio to datasets.map
END_OF_TEXT = "<|endoftext|>"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 32768])
    options = parser.parse_args()
    missed = 0
    for vocabulary in options.vocabularies:
        with tempfile.TemporaryDirectory() as folder:
            missed += compare(Path(folder), vocabulary, options.rounds)
    return 1 if missed else 0


def compare(folder: Path, vocabulary: int, rounds: int) -> int:
    """Return the number of missed goals."""
    tokenizer = write_texts(folder, vocabulary)
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "datasets": []}
    for round_ in range(rounds):
        for name, runs in results.items():
            runs.append(in_a_process(name, folder, str(folder / f"{name}-{round_}"), tokenizer))
    ids = {(run["tokens"], run["sum"]) for runs in results.values() for run in runs}
    if len(ids) > 1:
        print(f"vocabulary {vocabulary}: the ids differ in number or sum: {ids}")
        return 1
    rates = {name: [run["megabytes"] / run["seconds"] for run in runs] for name, runs in results.items()}
    ratio = statistics.median(our / their for our, their in zip(rates["ours"], rates["datasets"], strict=True))
    ours, theirs = (statistics.median(rate) for rate in rates.values())
    met = ours >= GOAL and ratio >= RATIO
    print(
        f"vocabulary {vocabulary:6}: manta {ours:5.2f} MB per CPU-second, datasets.map {theirs:5.2f}: {ratio:.2f} times as fast"
        f" ({'met' if met else 'missed'}: goal {GOAL:g} and {RATIO:g} times)"
    )
    return 0 if met else 1


def write_texts(folder: Path, vocabulary: int) -> Path:
    """Write the documents that manta makes of the text, for datasets.map to encode. Return the tokenizer's file."""
    import datasets
    import tokenizers

    data = DataConfig(sources=("stdlib:",), sequence_length=1024, directory=str(folder / "trained"))
    prepared = prepare(data, TokenizerConfig(vocabulary=vocabulary, end_of_text=END_OF_TEXT))
    tokenizer = tokenizers.Tokenizer.from_file(str(prepared.tokenizer))
    end = tokenizer.token_to_id(END_OF_TEXT)
    shards = (tokens_of(path) for path in shard_files(prepared))
    documents = [part[:-1] for tokens in shards for part in np.split(tokens, np.flatnonzero(tokens == end)[:-1] + 1)]
    texts = tokenizer.decode_batch([document.tolist() for document in documents], skip_special_tokens=False)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "texts"))
    return prepared.tokenizer


def in_a_process(name: str, folder: Path, target: str, tokenizer: Path) -> dict[str, Any]:
    environ = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, name, str(folder), target, str(tokenizer)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def ours(_folder: Path, target: Path, tokenizer: Path) -> dict[str, Any]:
    import tiktoken  # noqa: F401  what prepare would import
    import tokenizers  # noqa: F401

    data = DataConfig(sources=("stdlib:",), sequence_length=1024, directory=str(target), workers=1)
    start = cpu_seconds()
    prepared = prepare(data, TokenizerConfig(file=tokenizer, end_of_text=END_OF_TEXT))
    seconds = cpu_seconds() - start
    manifest = json.loads(Path(prepared.corpora[0], "manifest.json").read_bytes())
    documents = manifest["train"]["documents"] + manifest["validation"]["documents"]
    tokens = [tokens_of(path) for path in shard_files(prepared)]
    end = tokens[0][-1]
    count, total = sum(map(len, tokens)) - documents, sum(int(shard.sum(dtype=np.int64)) for shard in tokens) - documents * int(end)
    return {"seconds": seconds, "megabytes": manifest["text_bytes"] / 1e6, "tokens": count, "sum": total}


def datasets_map(folder: Path, target: Path, tokenizer: Path) -> dict[str, Any]:
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    texts = datasets.load_from_disk(str(folder / "texts"))
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    encoder.encode_special_tokens = True  # the name of a special token in a document is text

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [encoding.ids for encoding in encoder.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    target.mkdir()
    kept = {"load_from_cache_file": False, "cache_file_name": str(target / "encoded.arrow")}
    start = cpu_seconds()
    encoded = texts.map(encode, batched=True, remove_columns=["text"], **kept)
    seconds = cpu_seconds() - start
    column = encoded.with_format("arrow")[:]["input_ids"].combine_chunks().flatten().to_numpy()
    megabytes = sum(len(text.encode()) for text in texts["text"]) / 1e6
    return {"seconds": seconds, "megabytes": megabytes, "tokens": len(column), "sum": int(column.sum(dtype=np.int64))}


def cpu_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def shard_files(prepared: PreparedData) -> list[Path]:
    return [path for folder in prepared.corpora for path in sorted(Path(folder).glob("*.bin"))]


def tokens_of(path: Path) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.fromfile(path, dtype=np.uint16)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ours", *paths]:
            print(json.dumps(ours(*map(Path, paths))))
        case ["datasets", *paths]:
            print(json.dumps(datasets_map(*map(Path, paths))))
        case _:
            sys.exit(main())
