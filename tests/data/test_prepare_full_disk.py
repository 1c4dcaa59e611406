"""A full disk ends a preparation in one line that says how much room is missing; with room, the same command resumes."""

import os
import re
from pathlib import Path

import pytest
from fuzz import Outcome, call
from mounts import lift_quota
from small_corpora import SMALL, config, content, write_source
from small_disk import small_disk

from manta.data.prepare import prepare
from manta.data.shards.manifest import PreparedData

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")]


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def undisturbed(lines, tmp_path_factory) -> PreparedData:
    return prepare.prepare(config(tmp_path_factory.mktemp("corpora"), lines, packing="best_fit"), SMALL)


def refused(outcome: Outcome, directory: Path) -> str:
    assert outcome.code == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not list(directory.glob("*/manifest.json"))
    assert not list(directory.glob("**/.*.tmp"))
    (line,) = (line for line in outcome.stderr.splitlines() if line.startswith("manta: "))
    return line


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_reported_and_with_room_the_preparation_resumes(lines, undisturbed, tmp_path, workers):
    data = config(tmp_path / "disk", lines, packing="best_fit", workers=workers)
    with small_disk(tmp_path / "disk", "size=200k") as disk:
        line = refused(call(lambda: prepare.prepare(data, SMALL)), disk.path)
        needed = re.fullmatch(
            rf"manta: {disk.path}/.*: No space left on device: expected room for about ([\d.]+) MB more, got 0\.0 MB\. "
            r"Make room, or set another data\.directory; the same command resumes\.",
            line,
        )
        whole = sum(len(file) for name, file in content(undisturbed).items() if name.endswith((".bin", ".idx")) and "packing" not in name)
        assert 0.5 < (float(needed[1]) * 1e6 + 200_000) / whole < 1.5
        disk.remount("size=10m")
        assert content(prepare.prepare(data, SMALL)) == content(undisturbed)


def test_a_quota_is_reported_and_once_it_is_raised_the_preparation_resumes(lines, undisturbed, quota):
    (quota / "filler").write_bytes(bytes(1_800_000))
    data = config(quota, lines, packing="best_fit")
    line = refused(call(lambda: prepare.prepare(data, SMALL)), quota)
    assert re.search(r": Disk quota exceeded: expected room for about [\d.]+ MB more, got none\. Make room, or set", line)
    lift_quota(quota)
    assert content(prepare.prepare(data, SMALL)) == content(undisturbed)


def test_a_disk_without_inodes_is_reported(lines, undisturbed, tmp_path):
    data = config(tmp_path / "disk", lines, packing="best_fit")
    with small_disk(tmp_path / "disk", "size=10m,nr_inodes=30") as disk:
        line = refused(call(lambda: prepare.prepare(data, SMALL)), disk.path)
        assert re.search(r"no inodes are left: expected room for \d+ more files\. Make room", line)
        disk.remount("size=10m,nr_inodes=1000")
        assert content(prepare.prepare(data, SMALL)) == content(undisturbed)


def test_a_disk_that_becomes_read_only_is_reported(lines, undisturbed, tmp_path):
    data = config(tmp_path / "disk", lines, packing="best_fit")
    with small_disk(tmp_path / "disk", "size=200k") as disk:
        call(lambda: prepare.prepare(data, SMALL))
        disk.remount("size=10m,ro")
        outcome = call(lambda: prepare.prepare(data, SMALL))
        assert outcome.code == 2
        assert outcome.stderr.startswith("manta: data.directory: expected a directory that can be written, got")
        assert "Read-only file system" in outcome.stderr
        disk.remount("size=10m,rw")
        assert content(prepare.prepare(data, SMALL)) == content(undisturbed)
        disk.remount("size=10m,ro")
        assert prepare.find_prepared(data, SMALL)  # a run needs only to read it


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["size", "nr_inodes"])
def test_a_preparation_resumes_from_a_disk_that_fills_up_anywhere(lines, undisturbed, tmp_path, limit):
    """The disk grows a little each time: it is full at the lock, the tokenizer, a shard, a record, the manifest and the packing."""
    data = config(tmp_path / "disk", lines, packing="best_fit")
    sizes = range(8, 1640, 48) if limit == "size" else range(2, 138, 4)
    options = [f"size={size}k" if limit == "size" else f"size=10m,nr_inodes={size}" for size in sizes]
    codes = []
    with small_disk(tmp_path / "disk", options[0]) as disk:
        for option in options:
            disk.remount(option)
            outcome = call(lambda: prepare.prepare(data, SMALL))
            codes.append(outcome.code)
            assert outcome.code in {0, 1}
            assert "Traceback" not in outcome.stderr
            assert outcome.stderr.count("manta: ") == outcome.code
        assert codes[0] == 1
        assert codes[-1] == 0
        assert content(prepare.find_prepared(data, SMALL)) == content(undisturbed)
