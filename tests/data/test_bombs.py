"""Small files that unpack to more than memory holds: they are refused in a line, in little memory."""

import bz2
import gzip
import lzma
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

MIB = 1 << 20
READ = """
import resource, sys
import pyarrow, pyarrow.parquet
from manta.data.config import DataConfig
from manta.data.errors import InputError
from manta.data.sources.splits import input_splits
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = DataConfig(sources=sys.argv[1:2], sequence_length=8, longest_document=8 << 20)
try:
    print(sum(len(document.content) for split in input_splits(data.sources[0], data) for document in split.documents()))
except InputError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def repeated(compress, count: int) -> bytes:
    """Return `count` MiB of one line: archives of a MiB each, one after the other, which count as one."""
    return compress(b'{"text": "') + compress(b"a" * MIB) * count


def write_parquet(path: Path) -> None:
    """Write rows that all repeat one long value, which the file holds once."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 1024, pa.int32()), pa.array(["a" * 20 * MIB]))
    parquet.write_table(pa.table({"text": text}), path, compression="zstd", dictionary_pagesize_limit=1 << 30)


def write_arrow(path: Path) -> None:
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 1024, pa.int32()), pa.array(["a" * 20 * MIB]))
    table = pa.table({"text": text})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


BOMBS = {
    "x.jsonl.gz": lambda path: path.write_bytes(repeated(gzip.compress, 8192)),
    "x.jsonl.zst": lambda path: path.write_bytes(repeated(zstandard.compress, 8192)),
    "x.jsonl.bz2": lambda path: path.write_bytes(repeated(bz2.compress, 512)),
    "x.jsonl.xz": lambda path: path.write_bytes(repeated(lzma.compress, 512)),
    "x.parquet": write_parquet,
    "x.arrow": write_arrow,
}


@pytest.mark.parametrize(
    "name", [name if name in {"x.jsonl.gz", "x.parquet"} else pytest.param(name, marks=pytest.mark.slow) for name in BOMBS]
)
def test_a_bomb_is_refused_in_little_memory(tmp_path, name):
    BOMBS[name](tmp_path / name)
    assert (tmp_path / name).stat().st_size < 40 * MIB
    done = subprocess.run([sys.executable, "-c", READ, tmp_path / name], capture_output=True, text=True, timeout=60, check=True)
    message, mebibytes = done.stdout.splitlines()
    place = "row 1" if name in {"x.parquet", "x.arrow"} else "line 1"
    assert message.startswith(f"{tmp_path / name}: {place}: expected at most 8,388,608 bytes (data.longest_document), got a longer")
    assert int(mebibytes) < 150
