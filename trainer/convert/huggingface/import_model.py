"""From transformers: a directory of config.json, safetensors and tokenizer.json becomes one of ours, weight for weight.

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
from manta.trainer.architectures.config_json import Config, from_theirs, number
from manta.trainer.architectures.families import Architecture
from manta.trainer.architectures.tensor_map import Link, bind, tensors
from manta.trainer.checkpoint.backend import open_backend
from manta.trainer.checkpoint.manifest import Progress
from manta.trainer.checkpoint.shards import Pieces
from manta.trainer.checkpoint.writer import Saver
from manta.trainer.config.model import ModelConfig
from manta.trainer.convert.huggingface import weight_files
from manta.trainer.convert.huggingface.directory import CONFIG, TOKENIZER, check_import, make_directory, read_json
from manta.trainer.model.build import build
from manta.trainer.pretrained.source import KEPT, NAME, Source

STEP_ZERO = Progress(step=0, samples_consumed=0, optimizer_steps=0)
TIED = {"head.weight": "embedding.weight", "head.bias": "head.bias"}  # what a file may hold a second time, and of what


def import_model(directory: Path, output: Path) -> None:
    """Writes `output`, whole or not at all. Raises InputError where `directory` is no model that manta can train."""
    check_import(directory, output)
    config_file = directory / CONFIG
    theirs = read_json(config_file)
    architecture, config = from_theirs(theirs, config_file)
    tokenizer = _tokenizer(directory, theirs)
    with weight_files.opened(directory) as weights:
        imported = _Import(directory, architecture, config, tokenizer[0].vocabulary, weights)
        imported.check()
        dtypes = {name: str(shape.dtype).removeprefix("torch.") for name, shape in imported.shapes.items()}
        main = Counter(dtypes.values()).most_common(1)[0][0]
        source = Source.model_validate(
            {
                "architecture": architecture.name,
                "dtype": main,
                "dtypes": {name: dtype for name, dtype in sorted(dtypes.items()) if dtype != main},
                "end_of_text": tokenizer[1],
                "sequence_length": config.positions or number(theirs, "max_position_embeddings", config_file, absent=2048),
                "config": theirs,
            }
        )
        partial = output.with_name(f".{output.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            make_directory(partial)
            identity = {"source": xxhash.xxh3_128_hexdigest(source.to_json())}
            weights_of = {key: Pieces.all_of(tensor) for key, tensor in imported.weights().items()}
            Saver(open_backend(partial / "checkpoints"), identity=identity, attempt=0).save(weights_of, STEP_ZERO)
            for name in KEPT:
                if (directory / name).exists():
                    shutil.copyfile(directory / name, partial / name)
            (partial / NAME).write_bytes(source.to_json())
            (partial / "model.yaml").write_text(_preset(config, architecture))
            output.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class _Import:
    """A directory's tensors under their names of today, and what they become."""

    def __init__(
        self, directory: Path, architecture: Architecture, config: ModelConfig, tokens: int, weights: weight_files.Weights
    ) -> None:
        self._directory, self._architecture, self._weights = directory, architecture, weights
        assert config.vocabulary is not None
        if config.vocabulary < tokens:
            raise InputError(f"{directory}: vocab_size: got {config.vocabulary}, wants the {tokens} that tokenizer.json has ids for")
        with torch.device("meta"):
            model = build(config, vocabulary=tokens, sequence_length=1)
        self._model = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors(model).items()}
        self._vocabulary = config.vocabulary
        experts = config.experts.experts if config.experts else 0
        self._links = bind(architecture.rows, self._model, layers=config.layers, experts=experts)
        self._names = {_today(name, architecture): name for name in weights.shapes}
        self._strange = {_today(name, architecture): dtype for name, dtype in weights.strange.items()}
        self.shapes = {name: weights.shapes[self._names[name]] for link in self._links for name in link.theirs if name in self._names}

    def check(self) -> None:
        """Raises InputError with the first tensor that is missing, surplus or of another shape."""
        wanted = {name: tuple(tensor.shape) for link in self._links for name, tensor in self._on_meta(link).items()}
        wrong = [self._lacking(name, sizes) for name, sizes in wanted.items() if name not in self._names]
        for name, shape in self.shapes.items():
            if shape.sizes != wanted[name]:
                wrong.append(f"{name}: got {list(shape.sizes)}, wants {list(wanted[name])}")
        if not wrong:
            surplus = sorted((self._names | self._strange).keys() - wanted.keys())
            wrong = [told for name in surplus if (told := self._surplus(name))]
        if wrong:
            raise InputError(f"{self._directory}: {wrong[0]}" + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""))

    def weights(self) -> dict[str, Tensor]:
        """Ours, under the keys of a checkpoint, in fp32. Beside them no more than one tensor is held."""
        filled: dict[str, Tensor] = {}
        for link in self._links:
            for name, tensor in link.take(self._read).items():
                whole = torch.empty(self._model[name][0], dtype=torch.float32)
                whole[: len(tensor)].copy_(tensor)
                whole[len(tensor) :].zero_()
                filled[f"master/{name}"] = whole
        return filled

    def _on_meta(self, link: Link) -> dict[str, Tensor]:
        ours = {name: torch.empty(self._model[name][0], device="meta") for name in link.ours}
        return link.export(ours, self._vocabulary)

    def _lacking(self, name: str, sizes: tuple[int, ...]) -> str:
        if name in self._strange:
            return f"{name}: got {self._strange[name]}, wants {', '.join(weight_files.TYPES)}; convert it first"
        return f"{name}: got nothing, wants {list(sizes)}"

    def _surplus(self, name: str) -> str | None:
        """What is wrong with a tensor that no row asks for: nothing where it is a tied head, written out once more."""
        if re.fullmatch(self._architecture.no_weights, name):
            return None
        for row in self._architecture.rows:
            same = TIED.get(dict(zip(row.theirs.split(), row.ours.split(), strict=False)).get(name, ""))
            original = next((link.theirs[0] for link in self._links if link.ours == (same,)), None)
            if original is not None and name in self._names:
                told = f"{name}: got other values than {original}, wants the same where tie_word_embeddings is true; set it to false"
                return None if torch.equal(self._read(name), self._read(original)) else told
        return f"{name}: got a tensor that {self._architecture.name} has not; is it another model, or more than one?"

    def _read(self, name: str) -> Tensor:
        return self._weights.read(self._names[name])


def _today(name: str, architecture: Architecture) -> str:
    for pattern, replacement in architecture.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _preset(config: ModelConfig, architecture: Architecture) -> str:
    tree = {"family": config.family} | config.model_dump(mode="json", exclude_defaults=True)
    return f"# {architecture.name}, imported: for model.preset.\n" + yaml.safe_dump(tree, sort_keys=False)


def _tokenizer(directory: Path, theirs: Config) -> tuple[Tokenizer, str]:
    """The tokenizer, and the token that ends a text: as its config says, or the model's; BERT's [SEP] where there is no other."""
    file, told_file = directory / TOKENIZER, directory / "tokenizer_config.json"
    told = read_json(told_file) if told_file.exists() else {}
    for key in ("eos_token", "sep_token"):
        token = told.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return Tokenizer(file, end_of_text=token, key=f"{key} of {told_file.name}"), token
    number = theirs.get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    if isinstance(number, int) and not isinstance(number, bool):
        from tokenizers import Tokenizer as Reference

        try:
            token = Reference.from_file(str(file)).id_to_token(number)
        except Exception as error:  # noqa: BLE001  `tokenizers` raises nothing narrower
            raise InputError(f"{file}: {' '.join(str(error).split())}; wants a tokenizer.json: fetch it again") from None
        if token is not None:
            return Tokenizer(file, end_of_text=token), token
    return Tokenizer(file, end_of_text="[SEP]", key=f"eos_token of {told_file.name}"), "[SEP]"
