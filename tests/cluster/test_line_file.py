"""Lines that a full disk delays: none is lost, torn or out of order once there is room."""

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from mounts import fill, lift_quota, mount, mounted

from manta.cluster import line_file
from manta.cluster.line_file import LineFile

LINES = [f"line {number} ".encode() + b"x" * (37 * number % 500) for number in range(1000)]


def lines_of(path: Path) -> list[bytes]:
    content = path.read_bytes()
    assert not content or content.endswith(b"\n"), "the last line is torn"
    return content.splitlines()


@pytest.mark.parametrize("sync", [False, True])
def test_lines_wait_for_room_and_are_written_in_order(disk, sync):
    path = disk / "lines"
    with closing(LineFile(path, sync=sync)) as file:
        file.write(LINES[0])
        fill(disk / "filler", leave=3 * 4096)
        for line in LINES[1:500]:
            file.write(line)
        assert 0 < len(lines_of(path)) < 500
        assert file.problem() == f"{path}: No space left on device: needs {file.unwritten:,} bytes. Free some space."
        assert file.unwritten == sum(len(line) + 1 for line in LINES[len(lines_of(path)) : 500])
        (disk / "filler").unlink()
        for line in LINES[500:]:
            file.write(line)
        assert (file.problem(), file.unwritten) == (None, 0)
    assert lines_of(path) == LINES


def test_a_file_that_cannot_be_made_yet_is_made_later(tmp_path):
    for few_inodes in mounted(tmp_path / "disk", "size=2m,nr_inodes=2"):
        (few_inodes / "last inode").touch()
        file = LineFile(few_inodes / "lines")
        file.write(b"one")
        assert "No space left on device: needs 4 bytes" in file.problem()
        (few_inodes / "last inode").unlink()
        file.write(b"two")
        file.close()
        assert file.problem() is None
        assert lines_of(few_inodes / "lines") == [b"one", b"two"]


def test_a_read_only_disk_and_a_quota_count_as_full(disk, tmp_path):
    assert mount("-o", "remount,ro", str(disk)).returncode == 0
    file = LineFile(disk / "lines")
    file.write(b"one")
    assert "Read-only file system: needs 4 bytes" in file.problem()
    assert mount("-o", "remount,rw", str(disk)).returncode == 0
    file.close()
    assert lines_of(disk / "lines") == [b"one"]
    code = "import os, resource, sys; from pathlib import Path; from manta.cluster.line_file import LineFile\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)); file = LineFile(Path(sys.argv[1]))\n"
    code += "file.write(b'a' * 6); file.write(b'b' * 6); file.close(); print(file.problem())"
    limited = subprocess.run([sys.executable, "-P", "-c", code, tmp_path / "limited"], capture_output=True, text=True, check=True)
    assert "File too large: needs 7 bytes" in limited.stdout
    assert lines_of(tmp_path / "limited") == [b"a" * 6]


def test_lines_wait_until_a_quota_is_raised(quota):
    path, lines = quota / "lines", [b"%d" % number * 50_000 for number in range(10, 30)]
    with closing(LineFile(path)) as file:
        for line in lines:
            file.write(line)
        assert f"{path}: Disk quota exceeded: needs {file.unwritten:,} bytes" in file.problem()
        lift_quota(quota)
        file.flush()
        assert file.problem() is None
    assert lines_of(path) == lines


def test_memory_for_lines_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(line_file, "MOST_UNWRITTEN", 1000)
    file = LineFile(tmp_path / "lines")
    file._close()
    file.path = tmp_path / "no such folder" / "lines"
    for number in range(100):
        file.write(b"%099d" % number)
    assert (file.unwritten, file.lost) == (1000, 90)
    assert file.problem().endswith("needs 1,000 bytes; 90 lines are lost. Free some space.")
    file.path.parent.mkdir()
    file.close()
    assert [int(line) for line in lines_of(file.path)] == list(range(90, 100))


@pytest.mark.parametrize("torn", [b'{"step": 3, "att', b"y" * 200_000])
def test_an_incomplete_last_line_is_removed_however_long(tmp_path, torn):
    path = tmp_path / "lines"
    path.write_bytes(b"x" * 100_000 + b"\n" + torn)
    with closing(LineFile(path)) as file:
        file.write(b"z")
    assert lines_of(path) == [b"x" * 100_000, b"z"]


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        LineFile(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        LineFile(tmp_path)


def test_lines_wait_while_their_directory_is_moved_away(tmp_path):
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    directory.mkdir()
    with closing(LineFile(directory / "lines")) as file:
        file.write(b"one")
        directory.rename(elsewhere)
        file.write(b"two")
        assert file.problem().startswith(f"{directory}/lines: No such file or directory: needs 4 bytes")
        elsewhere.rename(directory)
        file.write(b"three")
        assert file.problem() is None
    assert lines_of(directory / "lines") == [b"one", b"two", b"three"]
