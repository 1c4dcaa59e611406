"""Find the class of transformers for a model section, and translate the section to its config.json, and back."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from manta.data.errors import InputError, cut
from manta.trainer.architectures.architecture import ARCHITECTURES, Architecture
from manta.trainer.config.model import ModelConfig

ConfigJson = dict[str, Any]
MAX_NUMBER = 2**31 - 1  # larger sizes are mistakes
SYNONYMS = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "gelu_python": "gelu", "swish": "silu"}
"""Names of one function in transformers: they differ in rounding."""


def architecture_for(config: ModelConfig) -> Architecture:
    """Return the class that computes what a model of this config computes. Raises InputError if there is none."""
    of_family = [architecture for architecture in ARCHITECTURES.values() if architecture.family == config.family]
    if not of_family:
        raise InputError(f"model.family: expected llama, gpt2 or bert, got {config.family!r}. Export a model of one of these.")
    candidates = [architecture for architecture in of_family if architecture.has_experts == (config.experts is not None)]
    if not candidates:
        raise InputError(f"model.experts: expected none for {config.family} in transformers, got some. Export a model without experts.")
    conflicts, closest = min(((list(_conflicts(each, config)), each) for each in candidates), key=lambda pair: len(pair[0]))
    if conflicts:
        raise InputError(f"{conflicts[0]}. Train a model that {closest.name}, the closest class of transformers, supports.")
    return closest


def to_hf_config(architecture: Architecture, config: ModelConfig, *, vocabulary: int, positions: int) -> ConfigJson:
    """Return the keys of config.json that describe the model itself. `positions`: the sequence length that it was trained with."""
    flat = _flatten(config) | {
        "vocabulary": vocabulary,
        "positions": positions,
        "kv_heads": config.kv,
        "head_width": config.head_dim,
        "mlp_width": config.inner_width,
    }
    hf: ConfigJson = {"architectures": [architecture.name], "model_type": architecture.model_type}
    for ours, key in architecture.keys.items():
        hf |= {name: flat[ours] for name in (key.hf, key.twin) if name is not None}
    if architecture.rope_theta is not None:
        partial = {} if architecture.partial_rotary_factor is None else {"partial_rotary_factor": 1.0}
        rope = {"rope_theta": config.rope_theta, **partial}
        # transformers 4 reads rope_theta, version 5 rope_parameters.
        hf |= {"max_position_embeddings": positions, **rope, "rope_parameters": {"rope_type": "default", **rope}}
    if architecture.has_window_switch:
        hf |= {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    if architecture.has_window_layers:
        hf["max_window_layers"] = 0 if config.sliding_window else config.layers
    return {**hf, **architecture.constants}


def from_hf_config(hf: ConfigJson, file: Path) -> tuple[Architecture, ModelConfig]:
    """Return the architecture of a config.json read from `file`, and our model section.

    Raises InputError if the architecture is unknown, or has something that our family lacks.
    """
    architecture = ARCHITECTURES.get(str(hf.get("model_type")))
    if architecture is None:
        expected, got = ", ".join(ARCHITECTURES), cut(repr(hf.get("model_type")))
        raise InputError(f"{file}: model_type: expected {expected}, got {got}. Import one of these.")
    _check_constants(architecture, hf, file)
    flat: ConfigJson = {key: values[0] for key, values in architecture.requires.items()} | {"family": architecture.family}
    for ours, key in architecture.keys.items():
        flat[ours] = next((hf[name] for name in (key.hf, key.older) if name in hf), key.default)
        if key.twin is not None and (twin := hf.get(key.twin, key.default)) != flat[ours]:
            raise _refusal(file, key.twin, twin, f"{key.hf}'s {cut(repr(flat[ours]))}")
        if isinstance(flat[ours], int) and abs(flat[ours]) > MAX_NUMBER:
            raise _refusal(file, key.hf, flat[ours], f"at most {MAX_NUMBER}")
    if architecture.rope_theta is not None:
        flat["rope_theta"] = _rope_theta(architecture, hf, file)
    if architecture.has_window_switch:
        flat["sliding_window"] = _window(architecture, hf, file)
    if flat["vocabulary"] is None:
        raise InputError(f"{file}: vocab_size: expected a whole number, got nothing. Add it.")
    section: ConfigJson = {key: value for key, value in flat.items() if "." not in key and value is not None}
    if architecture.has_experts:
        section["experts"] = {key.removeprefix("experts."): value for key, value in flat.items() if key.startswith("experts.")}
    try:
        return architecture, ModelConfig.model_validate_json(json.dumps(section), strict=True)
    except ValidationError as error:
        raise InputError(f"{file}: {_problem(error, architecture)}. Import a model that manta can train.") from None


def _check_constants(architecture: Architecture, hf: ConfigJson, file: Path) -> None:
    for key, expected in architecture.constants.items():
        value = hf.get(key, architecture.constant_defaults.get(key, expected))
        same = isinstance(value, str) and SYNONYMS.get(value, value) == SYNONYMS.get(expected, expected)
        if not same and value != expected and (value is not None or expected):
            raise _refusal(file, key, value, json.dumps(expected))


def whole_number(hf: ConfigJson, key: str, file: Path, *, default: int, least: int = 0) -> int:
    """Raises InputError if the key's value is not a whole number, or out of range."""
    value = hf.get(key, default)
    if type(value) is not int:
        raise InputError(f"{file}: {key}: expected a whole number, got {cut(repr(value))}. Correct it.")
    if not least <= value <= MAX_NUMBER:
        raise InputError(f"{file}: {key}: expected {least} to {MAX_NUMBER}, got {cut(str(value))}. Correct it.")
    return value


def _problem(error: ValidationError, architecture: Architecture) -> str:
    first = error.errors(include_url=False)[0]
    ours = ".".join(str(part) for part in first["loc"])
    name = architecture.keys[ours].hf if ours in architecture.keys else ours
    if first["type"] == "value_error":
        problem = str(first.get("ctx", {}).get("error", first["msg"])).removesuffix(".")
    elif first["type"] == "missing":
        problem = "expected a value, got nothing"
    else:
        problem = f"expected {first['msg'].removeprefix('Input should be ')}, got {cut(repr(first['input']))}"
    return f"{name}: {problem}" if name else problem


def _rope_theta(architecture: Architecture, hf: ConfigJson, file: Path) -> object:
    for name in ("rope_scaling", "rope_parameters"):
        scaling: object = hf.get(name) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, Mapping) else "unknown"
        if kind != "default":
            raise _refusal(file, name, scaling, "no scaling (rope_type default)")
    parameters = hf.get("rope_parameters") or {}
    partial = hf.get("partial_rotary_factor", architecture.partial_rotary_factor or 1.0)
    if (partial := parameters.get("partial_rotary_factor", partial)) != 1.0:
        raise _refusal(file, "partial_rotary_factor", partial, "1.0")
    return parameters.get("rope_theta", hf.get("rope_theta", architecture.rope_theta))


def _window(architecture: Architecture, hf: ConfigJson, file: Path) -> object:
    if not hf.get("use_sliding_window", False):
        return None
    window = hf.get("sliding_window", 4096)
    if architecture.has_window_layers and window is not None:
        layers = whole_number(hf, "num_hidden_layers", file, default=0)
        full = whole_number(hf, "max_window_layers", file, default=28)
        if kinds := hf.get("layer_types"):
            known = isinstance(kinds, list) and len(kinds) == layers and all(kind == kinds[0] for kind in kinds)
            if known and kinds[0] == "full_attention":
                return None
            if not known or kinds[0] != "sliding_attention":
                raise _refusal(file, "layer_types", kinds, "the same window in every layer, or in none")
        elif full >= layers:
            return None
        elif full > 0:
            raise _refusal(file, "max_window_layers", full, f"0 or {layers}, the same window in every layer or in none")
    return window


def _refusal(file: Path, key: str, value: object, expected: str) -> InputError:
    return InputError(f"{file}: {key}: expected {expected}, got {cut(json.dumps(value))}. Import a model that manta can train.")


def _conflicts(architecture: Architecture, config: ModelConfig) -> Iterator[str]:
    flat = _flatten(config)
    for key, values in architecture.requires.items():
        if flat[key] not in values:
            expected = " or ".join("none" if value is None else repr(value) for value in values)
            yield f"model.{key}: expected {expected}, got {flat[key]!r}"
    if architecture.needs_shared_expert and not flat["experts.shared"]:
        yield "model.experts.shared: expected at least 1, got 0"
    if architecture.needs_divisible_width and config.width % config.heads:
        yield f"model.heads: expected a divisor of model.width ({config.width}), got {config.heads}"


def _flatten(config: ModelConfig) -> dict[str, object]:
    """Return the model section by dotted key."""
    flat = config.model_dump(mode="json")
    experts: dict[str, object] = flat.pop("experts") or {}
    return flat | {f"experts.{key}": value for key, value in experts.items()}
