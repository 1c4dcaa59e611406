"""What error messages repeat of the input."""

import pytest

from manta.data.errors import DataError, InputError, cut


@pytest.mark.parametrize("kind", [InputError, DataError])
def test_messages_repeat_no_password_and_nothing_that_a_terminal_obeys_or_that_fills_it(kind):
    message = str(kind(f"s3://me:hunter2@bucket/x\x1b[2J\ud800: {'long ' * 10_000}\nsecond line"))
    first, second = message.split("\n")
    assert first.startswith("s3://***@bucket/x\\x1b[2J\\ud800: long")
    assert len(first) < 1100
    assert second == "second line"


def test_a_long_value_is_cut_in_the_middle():
    assert cut("a" * 50 + "b" * 50, 11) == "aaaaaa…bbbb"
    assert cut("é 日本", 11) == "é 日本"
