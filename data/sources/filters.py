"""Which documents of a source are taken."""

import re
from dataclasses import dataclass, field

from manta.data.sources.config import FilterConfig


@dataclass(frozen=True, slots=True)
class Filter:
    """A source's filter, made ready. `dedup` is no matter of one document, and is not seen to here."""

    config: FilterConfig
    _matching: re.Pattern[str] | None = field(init=False, repr=False)
    _not_matching: re.Pattern[str] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, pattern in (("_matching", self.config.matching), ("_not_matching", self.config.not_matching)):
            object.__setattr__(self, name, None if pattern is None else re.compile(pattern))

    @property
    def takes_all(self) -> bool:
        """Whether no text is asked for; a filter that is not so has no use for token ids."""
        return self.config.model_copy(update={"dedup": False}) == FilterConfig()

    def reason_against(self, text: str) -> str | None:
        """Why a document is left out, in words that are the same for all that are left out for it; None where it is taken."""
        if len(text) < self.config.minimum_characters:
            return "shorter than minimum_characters"
        if self.config.maximum_characters is not None and len(text) > self.config.maximum_characters:
            return "longer than maximum_characters"
        if self._matching and not self._matching.search(text):
            return "matching not found"
        if self._not_matching and self._not_matching.search(text):
            return "not_matching found"
        return None
