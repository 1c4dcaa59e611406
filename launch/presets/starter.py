"""The config that `manta init` writes."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from manta.data.errors import InputError
from manta.launch.config import RunConfig, preset, validate
from manta.trainer.config.model import ModelConfig
from manta.trainer.config.yaml_file import parse_yaml


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What a starter config sets for a model of some size."""

    vocabulary: int
    sequence_length: int
    learning_rate: str
    warmup_steps: int = 500
    steps: int = 10_000
    global_batch: int = 256
    micro_batch: int = 8
    every_steps: int = 500
    precision: str = "bf16"


def scale(name: str) -> Scale:
    """Return the sizes that the preset's model is known with, or small ones for a laptop."""
    if name.endswith("-tiny"):
        tiny = {"warmup_steps": 40, "steps": 280, "global_batch": 32, "micro_batch": 16, "every_steps": 70}
        return Scale(vocabulary=4096, sequence_length=128, learning_rate="2e-3", precision="fp32", **tiny)
    vocabulary = {"gpt2": 50257, "bert": 30522, "moe": 50257}.get(name.partition("-")[0], 128256)
    return Scale(vocabulary=vocabulary, sequence_length=512 if name.startswith("bert") else 1024, learning_rate="3e-4")


def write_starter(file: Path, name: str, sources: Sequence[str]) -> None:
    """Write a commented config that trains as it is. Raises InputError if the file exists, or if there is no such preset."""
    model = ModelConfig.model_validate(preset(name, "--preset"))
    template = jinja2.Template(
        Path(__file__).with_name("starter.yaml.jinja").read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    quoted, stem = name if re.fullmatch(r"[\w./-]+", name) else json.dumps(name), re.sub(r"\.ya?ml$", "", Path(name).name)
    masked = model.family == "bert"
    text = template.render(file=file, preset=quoted, name=stem, sources=list(sources), masked=masked, scale=scale(stem))
    tree = parse_yaml(text, str(file), RunConfig)
    validate(tree | {"model": preset(name, "--preset")}, file, {"data.sources": "--data"})
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise InputError(f"{file}: expected a new file, got one that exists. Name another: manta init FILE") from None
    except OSError as error:
        raise InputError(f"{file}: expected a file that can be written, got an error: {error.strerror}. Name another.") from None
