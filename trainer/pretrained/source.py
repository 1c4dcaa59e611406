"""What an imported directory was: the file that tells it from a run's."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from manta.data.errors import InputError

NAME = "source.json"
# Files that go through an import as they are.
KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")

Dtype = Literal["float32", "bfloat16", "float16"]


class Source(BaseModel):
    """Fields of source.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    architecture: str
    dtype: Dtype
    """Of most tensors."""
    dtypes: dict[str, Dtype]
    """Of the others, by their names."""
    end_of_text: str
    sequence_length: int
    """As far as its positions go."""
    config: dict[str, Any]
    """The config.json it came with."""

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=2) + "\n").encode()


def read(directory: Path) -> Source | None:
    """None where the directory is no imported one."""
    file = directory / NAME
    if not file.exists():
        return None
    try:
        return Source.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{file}: {' '.join(str(error).split())}; wants what manta import wrote: import it again") from None
