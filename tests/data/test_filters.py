"""A filter keeps documents, and says why it removes others."""

import pickle

import pytest

from manta.data.source_config import FilterConfig
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
def test_a_document_is_kept_or_removed_for_a_reason(config, text, reason):
    compiled = Filter(FilterConfig(**config))
    assert compiled.rejection(text) == reason
    assert pickle.loads(pickle.dumps(compiled)).rejection(text) == reason


def test_a_filter_is_a_value():
    one, other = (Filter(FilterConfig(matching="a", minimum_characters=2)) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Filter(FilterConfig(matching="b", minimum_characters=2))
    with pytest.raises(AttributeError):
        one.config = FilterConfig()


def test_only_a_filter_without_conditions_on_text_accepts_all():
    assert Filter(FilterConfig(dedup=True)).accepts_all
    assert Filter(FilterConfig(matching="")).accepts_all is False
    assert not Filter(FilterConfig(minimum_characters=1)).accepts_all
