"""source.json: where an imported model comes from. A run directory has no such file."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from manta.data.errors import InputError

SOURCE_FILE = "source.json"
# An import keeps these files of the model's directory, and an export of the import returns them.
KEPT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")

Dtype = Literal["float32", "bfloat16", "float16"]


class ImportSource(BaseModel):
    """Fields of source.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    architecture: str
    dtype: Dtype
    """Of most tensors."""
    dtypes: dict[str, Dtype]
    """Of the other tensors, by name."""
    end_of_text: str
    sequence_length: int
    """The longest that the model has positions for."""
    config: dict[str, Any]
    """The model's config.json."""

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=2) + "\n").encode()


def read_source(directory: Path) -> ImportSource | None:
    """Return None if the directory holds no imported model. Raises InputError if its source.json is damaged."""
    file = directory / SOURCE_FILE
    if not file.exists():
        return None
    try:
        return ImportSource.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{file}: expected the file that manta import wrote: {' '.join(str(error).split())}. Import again.") from None
