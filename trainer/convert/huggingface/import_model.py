"""Import a model of transformers: config.json, safetensors and tokenizer.json become a directory that a run can start from.

<output>/checkpoints/step-00000000/  model.yaml  source.json  tokenizer.json  …
"""

import re
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from manta.data.errors import InputError, cut, one_line
from manta.data.tokenizer.tokenizer import Tokenizer, read_vocabulary
from manta.trainer.architectures.architecture import Architecture, TensorMapping, hf_shapes, map_tensors, padded, substitute
from manta.trainer.architectures.config_json import ConfigJson, from_hf_config, whole_number
from manta.trainer.checkpoint.manifest import Progress, first_difference
from manta.trainer.checkpoint.rectangles import TensorViews
from manta.trainer.checkpoint.storage import open_backend
from manta.trainer.checkpoint.writer import CheckpointWriter
from manta.trainer.convert.huggingface.directory import (
    CONFIG,
    TOKENIZER,
    check_import,
    copy_kept_files,
    find_file,
    read_json,
    staged,
    weight_files,
)
from manta.trainer.model.build import build_model
from manta.trainer.model.transformer import Transformer
from manta.trainer.pretrained.load import MODEL_FILE, SOURCE_FILE, ImportSource, model_tensors, size_beyond

__all__ = ["import_model"]

STEP_ZERO = Progress(step=0, samples_consumed=0, optimizer_steps=0)
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

INITIAL_SEED = 0  # of the weights that the files lack

Slices = Mapping[str, Any]  # safetensors, by the tensor's name: each reads its tensor when it is indexed


def import_model(directory: Path, output: Path) -> None:
    """Write `output` completely or not at all. Raises InputError if `directory` is not a model that manta can train."""
    check_import(directory, output)
    file, hf = directory / CONFIG, read_json(directory, CONFIG)
    architecture, config = from_hf_config(hf, file)
    end_of_text, key = _end_of_text(directory, hf)
    tokens = Tokenizer(directory / TOKENIZER, end_of_text=end_of_text, key=key).vocabulary
    assert config.vocabulary is not None, "config.json has it"
    if config.vocabulary < tokens:
        expected = f"at least the {tokens} tokens of {TOKENIZER}"
        raise InputError(f"{directory}: vocab_size: expected {expected}, got {config.vocabulary}. Fetch the files of one model.")
    length = config.positions or whole_number(hf, "max_position_embeddings", file, default=2048, least=1)
    with _open_weights(directory, architecture) as slices:
        tied = architecture.keys["tied_head"].hf
        if not config.tied_head and tied not in hf and f"{architecture.tensors['head'].hf}.weight" not in slices:
            hf, config = hf | {tied: True}, config.model_copy(update={"tied_head": True})
        if beyond := size_beyond(config, [tuple(each.get_shape()) for each in slices.values()]):
            name, problem = beyond
            raise InputError(f"{file}: {getattr(architecture.keys.get(name), 'hf', name)}: {problem}. Fetch the files of one model.")
        with torch.device("meta"):
            model = build_model(config, vocabulary=tokens, sequence_length=1)
        tensors = model_tensors(model)
        mappings = map_tensors(architecture, config, tensors)
        shapes = hf_shapes(mappings, tensors, config.vocabulary)
        lacking = [name for name in shapes if _may_lack(name, architecture, slices)]
        shapes = {name: shape for name, shape in shapes.items() if name not in lacking}
        _check_weights(directory, architecture, shapes, slices)
        dtypes = {name: DTYPES[slices[name].get_dtype()] for name in shapes}
        most_common = Counter(dtypes.values()).most_common(1)[0][0]
        others = {name: dtype for name, dtype in sorted(dtypes.items()) if dtype != most_common}
        described = {"architecture": architecture.name, "dtype": most_common, "dtypes": others, "sequence_length": length}
        source = ImportSource.model_validate({**described, "end_of_text": end_of_text, "config": hf, "lacking": lacking})
        with staged(output) as partial:
            identity = {"source": xxhash.xxh3_128_hexdigest(source.to_json())}
            weights = _weights(model, mappings, slices, lacking)
            CheckpointWriter(open_backend(partial / "checkpoints"), identity=identity, attempt=0).save(weights, STEP_ZERO)
            copy_kept_files(directory, partial)
            (partial / SOURCE_FILE).write_bytes(source.to_json())
            section = {"family": config.family} | config.model_dump(mode="json", exclude_defaults=True)
            preset = f"# Imported {architecture.name}, for model.preset.\n" + yaml.safe_dump(section, sort_keys=False)
            (partial / MODEL_FILE).write_text(preset, encoding="utf-8")


def _weights(model: Transformer, mappings: Iterable[TensorMapping], slices: Slices, lacking: Collection[str]) -> dict[str, TensorViews]:
    """Return all tensors of the model, in fp32. Those that the files lack have initial weights."""
    tensors, weights = model_tensors(model), dict[str, Tensor]()
    for mapping in mappings:
        if set(mapping.hf) <= set(lacking):
            (name,) = mapping.ours
            initial = nn.Parameter(torch.empty(tensors[name].shape), requires_grad=False)
            model.initialize_parameter(name, initial, INITIAL_SEED)
            weights[name] = initial
        else:
            ours = mapping.from_hf(lambda name: slices[name][:])
            weights |= {name: padded(tensor, tensors[name].shape) for name, tensor in ours.items()}
    return {f"master/{name}": TensorViews.from_whole(tensor) for name, tensor in weights.items()}


@contextmanager
def _open_weights(directory: Path, architecture: Architecture) -> Generator[Slices]:
    """Yield the tensors under today's names. Raises InputError if safetensors are missing or damaged."""
    with ExitStack() as stack:
        try:
            files: list[Any] = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(directory)]
        except (SafetensorError, OSError, MemoryError) as error:  # MemoryError: it is larger than what can be mapped
            raise InputError(f"{directory}: expected complete safetensors, got {one_line(error)}. Fetch them again.") from None
        names = [(file, name, substitute(name, architecture.old_names)) for file in files for name in file.keys()]  # noqa: SIM118
        slices = {name: file.get_slice(stored) for file, stored, name in names}
        if len(slices) < len(names):
            twice = Counter(name for *_, name in names).most_common(1)[0][0]
            raise InputError(f"{directory}: {cut(twice)}: expected each tensor once, got it twice. Fetch the files of one model.")
        yield slices


def _may_lack(name: str, architecture: Architecture, slices: Slices) -> bool:
    """Return whether a tensor belongs to a module that files need not have, and these have nothing of."""
    module = name.rpartition(".")[0]
    return re.fullmatch(architecture.optional, module) is not None and not slices.keys() & {f"{module}.weight", f"{module}.bias"}


def _check_weights(directory: Path, architecture: Architecture, expected: Mapping[str, tuple[int, ...]], slices: Slices) -> None:
    """Raises InputError with the first tensor that is missing, surplus, or of another shape or dtype."""
    for name in sorted(expected.keys() & slices.keys()):
        if (dtype := slices[name].get_dtype()) not in DTYPES:
            raise InputError(f"{directory}: {name}: expected {', '.join(DTYPES)}, got {cut(dtype)}. Convert it first.")
    found = {name: tuple(slices[name].get_shape()) for name in expected if name in slices}
    if found != expected:
        raise InputError(f"{directory}: {cut(first_difference(expected, found))}. Fetch the files of one {architecture.name}.")
    for name in sorted(slices.keys() - expected.keys()):
        if re.fullmatch(architecture.buffers, name):
            continue
        original = architecture.copies.get(name)
        if original is None or slices[name].get_dtype() not in DTYPES:
            problem = f"expected no such tensor in {architecture.name}, got one. Import one model, of this class."
            raise InputError(f"{directory}: {cut(name)}: {problem}")
        same_type = slices[name].get_dtype() == slices[original].get_dtype() and slices[name].get_shape() == slices[original].get_shape()
        if not same_type or not torch.equal(slices[name][:], slices[original][:]):
            raise InputError(f"{directory}: {name}: expected the values of {original}, got others. Set tie_word_embeddings to false.")


def _end_of_text(directory: Path, hf: ConfigJson) -> tuple[str, str]:
    """Return the token that ends a text, and what sets it: the tokenizer config's, else the model config's, else BERT's [SEP]."""
    config_file = directory / "tokenizer_config.json"
    config = {} if find_file(directory, config_file.name) is None else read_json(directory, config_file.name)
    for key in ("eos_token", "sep_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token, f"{key} of {config_file.name}"
    number = hf.get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    if type(number) is int:
        token = next((token for token, other in read_vocabulary(directory / TOKENIZER).items() if other == number), None)
        if token is not None:
            return token, f"eos_token_id of {CONFIG}"
    return "[SEP]", f"eos_token of {config_file.name}"
