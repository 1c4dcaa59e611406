"""Opening files that another user may have replaced."""

import os

import pytest

from manta.data.storage.regular_file import open_regular, read_regular


def test_a_regular_file_is_read_up_to_the_limit(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_regular(file, 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_regular(file, 4)


@pytest.mark.timeout(10)  # without O_NONBLOCK, opening the pipe waits for a writer
def test_nothing_but_a_regular_file_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
