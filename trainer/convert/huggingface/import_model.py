"""Import a model of transformers: config.json, safetensors and tokenizer.json become a directory that a run can start from.

<output>/checkpoints/step-00000000/  model.yaml  source.json  tokenizer.json  …
"""

import re
import shutil
from collections import Counter
from pathlib import Path

import torch
import xxhash
import yaml
from torch import Tensor

from manta.data.errors import InputError
from manta.data.tokenizer.tokenizer import Tokenizer
from manta.trainer.architectures.architecture import Architecture
from manta.trainer.architectures.config_json import ConfigJson, from_hf_config, whole_number
from manta.trainer.architectures.families import map_tensors
from manta.trainer.architectures.tensor_map import hf_shapes, padded, substitute
from manta.trainer.checkpoint.manifest import Progress, first_difference
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.config.model import ModelConfig
from manta.trainer.convert.huggingface.directory import CONFIG, TOKENIZER, check_import, read_json, staged
from manta.trainer.convert.huggingface.weight_files import DTYPES, WeightFiles, open_weights
from manta.trainer.model.build import build_model
from manta.trainer.pretrained.source import KEPT_FILES, SOURCE_FILE, ImportSource
from manta.trainer.pretrained.weights import model_tensors

__all__ = ["import_model"]

STEP_ZERO = Progress(step=0, samples_consumed=0, optimizer_steps=0)


def import_model(directory: Path, output: Path) -> None:
    """Write `output` completely or not at all. Raises InputError if `directory` is not a model that manta can train."""
    check_import(directory, output)
    config_file = directory / CONFIG
    hf = read_json(config_file)
    architecture, config = from_hf_config(hf, config_file)
    tokenizer, end_of_text = _tokenizer(directory, hf)
    with open_weights(directory) as files:
        reader = _WeightReader(directory, architecture, config, tokenizer.vocabulary, files)
        reader.check()
        dtypes = reader.dtypes()
        most_common = Counter(dtypes.values()).most_common(1)[0][0]
        source = ImportSource.model_validate(
            {
                "architecture": architecture.name,
                "dtype": most_common,
                "dtypes": {name: dtype for name, dtype in sorted(dtypes.items()) if dtype != most_common},
                "end_of_text": end_of_text,
                "sequence_length": config.positions or whole_number(hf, "max_position_embeddings", config_file, default=2048),
                "config": hf,
            }
        )
        with staged(output) as partial:
            identity = {"source": xxhash.xxh3_128_hexdigest(source.to_json())}
            weights = {key: TensorViews.from_whole(tensor) for key, tensor in reader.weights().items()}
            CheckpointWriter(open_backend(partial / "checkpoints"), identity=identity, attempt=0).save(weights, STEP_ZERO)
            for name in KEPT_FILES:
                if (directory / name).exists():
                    shutil.copyfile(directory / name, partial / name)
            (partial / SOURCE_FILE).write_bytes(source.to_json())
            (partial / "model.yaml").write_text(_preset(config, architecture))


class _WeightReader:
    """The weights of a directory as tensors of our model."""

    def __init__(self, directory: Path, architecture: Architecture, config: ModelConfig, tokens: int, files: WeightFiles) -> None:
        self._directory, self._architecture, self._files = directory, architecture, files
        assert config.vocabulary is not None
        if config.vocabulary < tokens:
            expected = f"at least the {tokens} tokens of {TOKENIZER}"
            raise InputError(f"{directory}: vocab_size: expected {expected}, got {config.vocabulary}. Fetch the files of one model.")
        with torch.device("meta"):
            model = build_model(config, vocabulary=tokens, sequence_length=1)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
        self._vocabulary = config.vocabulary
        self._mappings = map_tensors(architecture, config, self._shapes)
        self._names = {substitute(name, architecture.old_names): name for name in files.specs}
        self._other_dtypes = {substitute(name, architecture.old_names): dtype for name, dtype in files.other_dtypes.items()}
        self._specs = {name: files.specs[self._names[name]] for mapping in self._mappings for name in mapping.hf if name in self._names}

    def dtypes(self) -> dict[str, str]:
        return {name: str(spec.dtype).removeprefix("torch.") for name, spec in self._specs.items()}

    def check(self) -> None:
        """Raises InputError with the first tensor that is missing, surplus or of another shape."""
        expected = hf_shapes(self._mappings, self._shapes, self._vocabulary)
        found = {name: spec.shape for name, spec in self._specs.items()}
        for name in sorted(self._other_dtypes.keys() & expected.keys()):
            dtypes = ", ".join(DTYPES)
            raise InputError(f"{self._directory}: {name}: expected {dtypes}, got {self._other_dtypes[name]}. Convert it first.")
        if found != expected:
            raise InputError(f"{self._directory}: {first_difference(expected, found)}. Fetch the files of one model.")
        for name in sorted((self._names | self._other_dtypes).keys() - expected.keys()):
            if problem := self._surplus(name):
                raise InputError(f"{self._directory}: {name}: {problem}")

    def weights(self) -> dict[str, Tensor]:
        """Return our tensors by checkpoint key, in fp32. Holds no more than one other tensor meanwhile."""
        weights: dict[str, Tensor] = {}
        for mapping in self._mappings:
            for name, tensor in mapping.from_hf(self._read).items():
                weights[f"master/{name}"] = padded(tensor, self._shapes[name])
        return weights

    def _surplus(self, name: str) -> str | None:
        """Return what is wrong with a tensor that the model does not need; None if it is a buffer or a copy of a tied weight."""
        if re.fullmatch(self._architecture.buffers, name):
            return None
        original = self._architecture.copies.get(name)
        if original is None or name not in self._names:
            return f"expected no such tensor in {self._architecture.name}, got one. Import one model, of this class."
        if torch.equal(self._read(name), self._read(original)):
            return None
        return f"expected the values of {original}, got others. Set tie_word_embeddings to false."

    def _read(self, name: str) -> Tensor:
        return self._files.read(self._names[name])


def _preset(config: ModelConfig, architecture: Architecture) -> str:
    section = {"family": config.family} | config.model_dump(mode="json", exclude_defaults=True)
    return f"# Imported {architecture.name}, for model.preset.\n" + yaml.safe_dump(section, sort_keys=False)


def _tokenizer(directory: Path, hf: ConfigJson) -> tuple[Tokenizer, str]:
    """Return the tokenizer and the token that ends a text: the tokenizer config's, else the model config's, else BERT's [SEP]."""
    file, config_file = directory / TOKENIZER, directory / "tokenizer_config.json"
    config = read_json(config_file) if config_file.exists() else {}
    for key in ("eos_token", "sep_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return Tokenizer(file, end_of_text=token, key=f"{key} of {config_file.name}"), token
    number = hf.get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    if isinstance(number, int) and not isinstance(number, bool):
        from tokenizers import Tokenizer as Reference

        try:
            token = Reference.from_file(str(file)).id_to_token(number)
        except Exception as error:  # noqa: BLE001  `tokenizers` raises nothing narrower
            raise InputError(f"{file}: expected a tokenizer.json, got {' '.join(str(error).split())}. Fetch it again.") from None
        if token is not None:
            return Tokenizer(file, end_of_text=token), token
    return Tokenizer(file, end_of_text="[SEP]", key=f"eos_token of {config_file.name}"), "[SEP]"
