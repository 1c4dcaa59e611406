"""Select documents of a source by their text."""

import math
import re
from dataclasses import dataclass, field

from manta.data.source_config import FilterConfig


@dataclass(frozen=True, slots=True)
class Filter:
    """A compiled filter. It ignores `dedup`, which depends on other documents."""

    config: FilterConfig
    _matching: re.Pattern[str] | None = field(init=False, repr=False)
    _not_matching: re.Pattern[str] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, pattern in (("_matching", self.config.matching), ("_not_matching", self.config.not_matching)):
            object.__setattr__(self, name, None if pattern is None else re.compile(pattern))

    @property
    def accepts_all(self) -> bool:
        """Whether text does not matter; only such a filter makes sense for token ids."""
        return self.config.model_copy(update={"dedup": False}) == FilterConfig()

    def rejection(self, text: str) -> str | None:
        """Return the reason to remove a document, of a fixed set of reasons; None to keep it."""
        if len(text) < self.config.minimum_characters:
            return "shorter than minimum_characters"
        if self.config.maximum_characters is not None and len(text) > self.config.maximum_characters:
            return "longer than maximum_characters"
        if self._matching and not self._matching.search(text):
            return "matching not found"
        if self._not_matching and self._not_matching.search(text):
            return "not_matching found"
        return None


def validation_threshold(share: float) -> int:
    """Return the number below which the hash of a document's text makes it a validation document."""
    return math.ceil(share * 2**64)
