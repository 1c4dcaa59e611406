"""Which documents a filter takes, and why not the others."""

import pickle

import pytest

from manta.data.sources.config import FilterConfig
from manta.data.sources.filters import Filter


@pytest.mark.parametrize(
    ("config", "text", "reason"),
    [
        ({}, "", None),
        ({"minimum_characters": 3}, "ab", "shorter than minimum_characters"),
        ({"minimum_characters": 3}, "雪が降", None),  # characters, not bytes
        ({"maximum_characters": 3}, "abcd", "longer than maximum_characters"),
        ({"maximum_characters": 3}, "abc", None),
        ({"matching": r"\bsnow\b"}, "no snowman", "matching not found"),
        ({"matching": r"\bsnow\b"}, "much\nsnow", None),
        ({"not_matching": "(?i)lorem"}, "Lorem ipsum", "not_matching found"),
        ({"not_matching": "(?i)lorem"}, "ipsum", None),
        ({"minimum_characters": 2, "matching": "a", "not_matching": "b"}, "ab", "not_matching found"),
        ({"dedup": True}, "again", None),
    ],
)
def test_a_document_is_taken_or_left_out_for_a_reason(config, text, reason):
    made = Filter(FilterConfig(**config))
    assert made.reason_against(text) == reason
    assert pickle.loads(pickle.dumps(made)).reason_against(text) == reason


def test_a_filter_is_a_value():
    one, other = (Filter(FilterConfig(matching="a", minimum_characters=2)) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Filter(FilterConfig(matching="b", minimum_characters=2))
    with pytest.raises(AttributeError):
        one.config = FilterConfig()


def test_only_a_filter_that_asks_nothing_of_text_takes_all():
    assert Filter(FilterConfig(dedup=True)).takes_all
    assert Filter(FilterConfig(matching="")).takes_all is False
    assert not Filter(FilterConfig(minimum_characters=1)).takes_all
