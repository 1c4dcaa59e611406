"""A trained or imported model, whole, in one process that trains nothing: what generation and export begin with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from manta.data.config_history import upgrade
from manta.data.errors import InputError
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.trainer.architectures.tensor_map import tensors
from manta.trainer.checkpoint import catalog
from manta.trainer.checkpoint.errors import CheckpointError
from manta.trainer.checkpoint.manifest import Checkpoint, difference
from manta.trainer.checkpoint.vocabulary import ROWS
from manta.trainer.config.model import ModelConfig
from manta.trainer.model.build import build
from manta.trainer.model.transformer import Transformer
from manta.trainer.pretrained import source as provenance
from manta.trainer.run_directory import RunDirectory, origin_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    home: RunDirectory
    config: ModelConfig
    model: Transformer  # fp32, in evaluation mode
    tokenizer: Tokenizer
    tokenizer_file: Path
    end_of_text: str
    sequence_length: int
    checkpoint: Checkpoint
    source: provenance.Source | None  # None: it was trained here

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding that are no padding: tokens that it has room for."""
        return self.config.vocabulary or self.tokenizer.vocabulary


def load_pretrained(home: RunDirectory) -> Pretrained:
    """From the newest valid checkpoint of a run, or from what was imported.

    Raises InputError where there is none, CheckpointError where all are bad, or of another model.
    """
    origin = provenance.read(home.path)
    if origin is None:
        run = home.config()
        config, end_of_text, sequence_length = run.model, run.tokenizer.end_of_text, run.data.sequence_length
    else:
        config, end_of_text, sequence_length = imported_config(home.path), origin.end_of_text, origin.sequence_length
    found = catalog.newest_weights(home.checkpoints)
    if found is None:
        remedy = f"train first: manta resume {home.typed}" if origin is None else "import it again"
        raise InputError(f"{home.checkpoints}: got no checkpoint, wants one; {remedy}")
    file = home.tokenizer_file if home.tokenizer_file.exists() else home.prepared().tokenizer
    tokenizer = Tokenizer(file, end_of_text=end_of_text)
    with torch.device("meta"):
        model = build(config, vocabulary=tokenizer.vocabulary, sequence_length=sequence_length, code=home.code)
    checkpoint, weights = found
    fill(model, weights, checkpoint.at)
    return Pretrained(
        home=home,
        config=config,
        model=model.eval(),
        tokenizer=tokenizer,
        tokenizer_file=file,
        end_of_text=end_of_text,
        sequence_length=sequence_length,
        checkpoint=checkpoint,
        source=origin,
    )


def imported_config(directory: Path) -> ModelConfig:
    """The model section that an import wrote."""
    file = directory / "model.yaml"
    try:
        return ModelConfig.model_validate_json(json.dumps(upgrade(yaml.safe_load(file.read_text()), "model")), strict=True)
    except (OSError, yaml.YAMLError, TypeError, ValidationError) as error:
        raise InputError(f"{file}: {' '.join(str(error).split())}; wants what manta import wrote: import it again") from None


def other_weights(
    start: str, config: ModelConfig, *, vocabulary: int, sequence_length: int, code: Path, by_token: bool = False
) -> str | None:
    """The first difference of what the checkpoint at `start` holds from what this model wants; None where it fits.

    by_token: rows of the vocabulary are matched by what a token is; there may be more or fewer. Raises CheckpointError where there is none.
    """
    where, name = origin_of(start)
    assert name is not None, f"{start}: not the name of one checkpoint"
    got = catalog.look(where, name).shapes
    with torch.device("meta"):
        model = build(config, vocabulary=vocabulary, sequence_length=sequence_length, code=code)
    weights = {key.removeprefix("master/"): shape for key, shape in got.items() if key.startswith("master/")}
    if by_token:
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors(model).items()}
        rows = [name for name, shape in weights.items() if ROWS.fullmatch(f"master/{name}") and wanted.get(name, ())[1:] == shape[1:]]
        weights |= {name: wanted[name] for name in rows if name in wanted}
    return differs(model, weights)


def differs(model: Transformer, got: Mapping[str, tuple[int, ...]]) -> str | None:
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors(model).items()}
    return None if wanted == got else difference(wanted, got)


def fill(model: Transformer, weights: dict[str, Tensor], at: str) -> None:
    """Gives a model without memory its weights. Raises CheckpointError where they are another model's."""
    if told := differs(model, {name: tuple(tensor.shape) for name, tensor in weights.items()}):
        raise CheckpointError(f"{at}: {told}")
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    shared = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != name}
    model.load_state_dict(weights, assign=True, strict=False)
    for name, same in shared.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(same))
    for name, router in model.routers():
        router.bias = weights.get(f"{name}.bias")
