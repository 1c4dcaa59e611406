"""Preparation takes time in proportion to its input: four times the input may not take the square. Both are timed in the same run."""

import random
import string
import time
from collections.abc import Callable

import pytest
from small_corpora import config

from manta.data.config import CacheConfig, DataConfig
from manta.data.sampling.samples import SourceSampler
from manta.data.sampling.step_samples import Timeline
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.windows import CutDataset, TokenStream, WindowShape
from manta.data.source_config import SourceConfig
from manta.data.sources.splits import input_splits
from manta.data.tokenizer.train import train

MAX_GROWTH = 7.5  # for four times the input; a square is 16


def assert_linear(work: Callable[[int], object], size: int) -> None:
    """work: does what is timed; its first call for a size, which is not timed, makes the input."""

    def seconds(size: int) -> float:
        work(size)
        times: list[float] = []
        while len(times) < 3 or sum(times) < 0.5:  # often, if it is short: other programs interrupt some
            start = time.perf_counter()
            work(size)
            times.append(time.perf_counter() - start)
        return min(times)

    small, large = seconds(size), seconds(4 * size)
    assert large < MAX_GROWTH * small, f"{small:.3f} s for {size}, {large:.3f} s for {4 * size}"


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", pytest.param("unigram", marks=pytest.mark.slow)])
def test_tokenizer_training_on_one_word_is_linear(algorithm):
    letters = "".join(random.Random(9).choices(string.ascii_letters, k=160_000))
    assert_linear(lambda size: train([letters[:size]], vocabulary=1000, end_of_text="<|end|>", algorithm=algorithm), 40_000)


def test_planning_of_small_files_is_linear(tmp_path):
    def plan(count: int) -> None:
        folder = tmp_path / str(count)
        if not folder.exists():
            folder.mkdir()
            for number in range(count):
                (folder / f"{number}.txt").write_text("note")
        assert len(input_splits(SourceConfig(path=str(folder)), config(tmp_path, folder))) == 1

    assert_linear(plan, 2500)


def test_a_timeline_of_many_stages_is_linear():
    def plan(stages: int) -> None:
        Timeline(sequence_length=64, global_batch=8, ramp=[(number * 10**6, 8 + number) for number in range(stages)])

    assert_linear(plan, 2000)


def test_opening_many_sources_is_linear(tmp_path):
    home, shape = CorpusDirectory(str(tmp_path), CacheConfig()), WindowShape(17, 16)

    def open_sources(count: int) -> None:
        sources = [{"path": f"{number}.txt"} for number in range(count)]
        weights = {f"{number}.txt": 1 for number in range(count)}
        data = DataConfig(sources=sources, mixture={"weights": weights}, sequence_length=16)
        for source in data.sources:
            stream = TokenStream(home, [])
            SourceSampler.create([source], [stream], CutDataset([stream], shape, by_shard=False), data, 1)

    assert_linear(open_sources, 1000)
