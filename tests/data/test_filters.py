"""A filter keeps documents, and says why it removes others."""

import pickle

import pytest
from pydantic import ValidationError

from manta.data.source_config import FilterConfig


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
    document_filter = FilterConfig(**config)
    assert document_filter.rejection(text) == reason
    assert pickle.loads(pickle.dumps(document_filter)).rejection(text) == reason


def test_a_filter_is_a_value():
    one, other = (FilterConfig(matching="a", minimum_characters=2) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != FilterConfig(matching="b", minimum_characters=2)
    with pytest.raises(ValidationError):
        one.matching = "b"


def test_only_a_filter_without_conditions_on_text_accepts_all():
    assert FilterConfig(dedup=True).accepts_all
    assert FilterConfig(matching="").accepts_all is False
    assert not FilterConfig(minimum_characters=1).accepts_all
