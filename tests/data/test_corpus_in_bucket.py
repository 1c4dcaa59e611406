"""A corpus prepared into a bucket, and read by several processes of a node, with faults and with a small cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from object_store import BUCKET, ObjectStore, Proxy
from small_corpora import SMALL, config, documents, write_lines
from small_disk import small_disk

from manta.data.config import CacheConfig, DataConfig
from manta.data.errors import InputError
from manta.data.objectives.objective import window_shape
from manta.data.prepare import prepare
from manta.data.prepare.verify import verify
from manta.data.sampling.samples import Samples
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.storage.store import open_store

READ = """
import json, sys
import numpy as np
import xxhash
from manta.data.config import DataConfig, TokenizerConfig
from manta.data.prepare.prepare import find_prepared
from manta.data.sampling.samples import Samples
data, tokens = (kind.model_validate_json(text) for kind, text in zip((DataConfig, TokenizerConfig), sys.argv[1:3]))
rank, ranks, batch = map(int, sys.argv[3:])
samples = Samples(find_prepared(data, tokens), data, tokens, seed=3)
total = len(samples.sampler.sources[0].dataset)
digests = [xxhash.xxh3_64_hexdigest(samples.train(np.arange(at + rank, min(at + batch, 2 * total), ranks)).tokens.tobytes())
        for at in range(0, 2 * total, batch)]
print(json.dumps(digests))
"""
URL = f"s3://{BUCKET}/prepared"


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for part in range(8):
        write_lines(folder / f"{part}.jsonl", documents(60, seed=part))
    return folder


@pytest.fixture(scope="module")
def store():
    with ObjectStore() as store, Proxy(store.port) as proxy:
        yield store, proxy


@pytest.fixture
def bucket(store, lines, tmp_path, monkeypatch):
    """The proxy of a bucket with a prepared corpus, and its config, with an empty cache."""
    _, proxy = store
    for name, value in proxy.environment.items():
        monkeypatch.setenv(name, value)
    data = config(URL, lines, cache=CacheConfig(directory=tmp_path / "cache"))
    prepare.prepare(data, SMALL)
    proxy.reset()
    return proxy, data.model_copy(update={"cache": CacheConfig(directory=tmp_path / "ranks")})


def read(data: DataConfig, *, ranks: int = 1, batch: int = 64) -> list[list[str]]:
    """Read two epochs by concurrent processes. Return the digest of each batch, by rank."""
    command = [sys.executable, "-c", READ, data.model_dump_json(), SMALL.model_dump_json()]
    processes = [
        subprocess.Popen([*command, str(rank), str(ranks), str(batch)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    outputs = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return [json.loads(out) for out, _ in outputs]


def downloads(proxy: Proxy) -> dict[str, int]:
    return {key.rpartition("/")[2]: count for key, count in proxy.gets.items() if key.endswith(".bin")}


def test_a_corpus_in_a_bucket_holds_the_bytes_of_one_on_disk(bucket, lines, tmp_path):
    _, data = bucket
    remote = prepare.find_prepared(data, SMALL)
    local = prepare.prepare(config(tmp_path / "local", lines), SMALL)
    assert remote.fingerprint == local.fingerprint
    assert remote.tokenizer.read_bytes() == local.tokenizer.read_bytes()
    assert all(root.startswith(f"{URL}/") for root in remote.corpora)
    assert prepare.prepare(data, SMALL) == remote  # nothing is prepared twice


@pytest.mark.slow
def test_two_ranks_download_each_shard_once(bucket, lines, tmp_path):
    proxy, data = bucket
    cold = read(data, ranks=2)
    assert len(downloads(proxy)) == 8
    assert set(downloads(proxy).values()) == {1}
    proxy.reset()
    assert read(data, ranks=2) == cold
    assert not downloads(proxy)
    local = config(tmp_path / "local", lines)
    prepare.prepare(local, SMALL)
    assert read(local, ranks=2) == cold


@pytest.mark.slow
def test_a_cache_smaller_than_the_corpus_needs_shuffle_shards(bucket, lines, tmp_path):
    proxy, data = bucket
    sizes = [shard.stat().st_size for shard in _shards(lines, tmp_path)]
    room = CacheConfig(directory=tmp_path / "small", bytes=sum(sorted(sizes)[-4:]) + sum(sizes) // 3)
    with pytest.raises(InputError, match=r"data\.cache\.bytes: expected at least [\d,]+ .*, got [\d,]+\. .*set data\.shuffle_shards"):
        Samples(prepare.find_prepared(data, SMALL), data.model_copy(update={"cache": room}), SMALL, seed=3)
    small = data.model_copy(update={"cache": room, "shuffle_shards": 2})
    wide = data.model_copy(update={"shuffle_shards": 2})
    assert room.bytes < sum(sizes)
    assert read(small, ranks=2, batch=16) == read(wide, ranks=2, batch=16)
    kept = sum(path.stat().st_size for path in (tmp_path / "small").glob("*.bin"))
    assert kept <= room.bytes
    assert sum(downloads(proxy).values()) > len(downloads(proxy))


@pytest.mark.slow
def test_a_cut_connection_and_a_flipped_bit_change_no_token(bucket):
    proxy, data = bucket
    (key, *_) = [key for key in _keys(data) if key.endswith("piece-00003.train.bin")]
    whole = read(data)
    data.cache.directory.rename(f"{data.cache.directory}-warm")
    proxy.cut(key, at=1000)
    proxy.flip(key, at=77)
    assert read(data) == whole


@pytest.mark.slow
def test_a_corrupt_object_is_refused(bucket, store):
    _, data = bucket
    (key, *_) = [key for key in _keys(data) if key.endswith("piece-00003.train.bin")]
    whole = open_store(f"s3://{BUCKET}/{key}").read()
    store[0].put(key, bytes([whole[0] ^ 1]) + whole[1:])
    try:
        with pytest.raises(AssertionError, match=r"piece-00003\.train\.bin: expected .* got"):
            read(data)
        (root,) = prepare.find_prepared(data, SMALL).corpora
        directory = CorpusDirectory(root, data.cache)
        damage = verify([(directory, manifest.load_manifest(directory))], window_shape(data), advance=lambda _: None)
        assert [one.path for one in damage] == [f"{root}/piece-00003.train.bin"]
    finally:
        store[0].put(key, whole)
    (right,) = read(data)
    assert len(right) > 10


def test_an_interrupted_preparation_into_a_bucket_is_continued(bucket):
    """Uploaded shards are kept; the manifest, which makes them a corpus, is written last."""
    proxy, data = bucket
    other = data.model_copy(update={"directory": f"s3://{BUCKET}/other"})
    made = prepare.find_prepared(data, SMALL)
    name = Path(made.corpora[0]).name
    proxy.refuse(f"other/{name}/piece-00005.json", status=403, times=1000)
    with pytest.raises(InputError, match=r"piece-00005\.json: no access"):
        prepare.prepare(other, SMALL)
    assert prepare.find_prepared(other, SMALL) is None
    proxy.reset()
    assert prepare.prepare(other, SMALL).fingerprint == made.fingerprint


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_full_disk_under_the_cache_stops_no_run(bucket, tmp_path, caplog):
    """Evicting a shard that is still mapped makes no room, so these are read into memory."""
    proxy, data = bucket
    whole = read_all(data)
    data = data.model_copy(update={"cache": CacheConfig(directory=tmp_path / "small")})
    with small_disk(tmp_path / "small", "size=1m") as disk:
        samples = Samples(prepare.find_prepared(data, SMALL), data, SMALL, seed=3)
        disk.remount("size=64k")
        proxy.reset()
        assert np.array_equal(all_samples(samples), whole)
        assert proxy.gets
    assert caplog.text.count("less than data.cache.bytes fit") == 1


def read_all(data: DataConfig) -> np.ndarray:
    return all_samples(Samples(prepare.find_prepared(data, SMALL), data, SMALL, seed=3))


def all_samples(samples: Samples) -> np.ndarray:
    total = len(samples.sampler.sources[0].dataset)
    return np.concatenate([samples.train(np.arange(first, first + 8)).tokens for first in range(0, total - 8, 8)])


def _keys(data: DataConfig) -> list[str]:
    (root,) = prepare.find_prepared(data, SMALL).corpora
    made = manifest.load_manifest(CorpusDirectory(root, data.cache))
    return [f"{root.removeprefix(f's3://{BUCKET}/')}/{shard.file}" for shard in (*made.train.shards, *made.validation.shards)]


def _shards(lines: Path, tmp_path: Path) -> list[Path]:
    prepare.prepare(config(tmp_path / "sizes", lines), SMALL)
    return list((tmp_path / "sizes").glob("*/piece-*.bin"))


def test_origins_of_a_corpus_in_a_bucket_are_those_of_one_on_disk(bucket, lines, tmp_path):
    """The positions are downloaded into the cache as shards are, once; the lines are counted in the local source."""
    proxy, data = bucket
    local = config(tmp_path / "local", lines)
    remote_samples, local_samples = (Samples(prepare.prepare(each, SMALL), each, SMALL, seed=3) for each in (data, local))
    numbers = range(0, remote_samples.train_windows, 9)
    found = [remote_samples.documents(number) for number in numbers]
    assert found == [local_samples.documents(number) for number in numbers]
    assert all(document.location.startswith(f"{lines}/") for documents in found for document in documents)
    counts = {key.rpartition("/")[2]: count for key, count in proxy.gets.items() if key.endswith(".origins")}
    assert counts == {f"piece-{index:05d}.train.origins": 1 for index in range(8)}
