"""A model section to a config.json of theirs, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from manta.data.errors import InputError
from manta.trainer.architectures.families import ARCHITECTURES, QWEN3, Architecture, flatten
from manta.trainer.config.model import ModelConfig

Config = dict[str, Any]
_WINDOWED = {"qwen3", "qwen3_moe"}  # these have a switch beside the window's size


def to_theirs(architecture: Architecture, config: ModelConfig, *, vocabulary: int, positions: int) -> Config:
    """What their config.json says of the model itself. `positions`: how far it was trained to see."""
    flat = flatten(config) | {
        "vocabulary": vocabulary,
        "positions": positions,
        "kv_heads": config.kv,
        "head_width": config.each_head,
        "mlp_width": config.inner,
    }
    theirs: Config = {"architectures": [architecture.name], "model_type": architecture.model_type}
    theirs |= {key.theirs: flat[key.ours] for key in architecture.keys}
    if architecture.family == "llama":
        theirs |= {"max_position_embeddings": positions, **_rotation(architecture, config.rope_theta)}
    if architecture.family == "gpt2":
        theirs["embd_pdrop"] = config.dropout
    if architecture.model_type in _WINDOWED:
        theirs |= {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    if architecture is QWEN3:
        theirs["max_window_layers"] = 0 if config.sliding_window else config.layers
    return theirs | {fixed.theirs: fixed.value for fixed in architecture.fixed}


def from_theirs(theirs: Config, file: Path) -> tuple[Architecture, ModelConfig]:
    """Raises InputError where `theirs`, read from `file`, is no architecture of ours or has what our family lacks."""
    architecture = ARCHITECTURES.get(str(theirs.get("model_type")))
    if architecture is None:
        raise InputError(f"{file}: model_type: got {theirs.get('model_type')!r}, wants one of {', '.join(ARCHITECTURES)}")
    for fixed in architecture.fixed:
        got = theirs.get(fixed.theirs, fixed.value if fixed.absent is ... else fixed.absent)
        _refuse_unless(got == fixed.value or (got is None and not fixed.value), file, fixed.theirs, got, fixed.value)
    flat: Config = {key: wanted[0] for key, wanted in architecture.needs.items()} | {"family": architecture.family}
    for key in architecture.keys:
        older = theirs.get(key.older, key.absent) if key.older else key.absent
        flat[key.ours] = theirs.get(key.theirs, older)
    if architecture.family == "llama":
        flat["rope_theta"] = _theta(architecture, theirs, file)
    if architecture.family == "gpt2":
        embedding = theirs.get("embd_pdrop", 0.1)
        _refuse_unless(embedding == flat["dropout"], file, "embd_pdrop", embedding, f"resid_pdrop's {flat['dropout']!r}")
    if architecture.model_type in _WINDOWED:
        flat["sliding_window"] = _window(theirs, file)
    if flat["vocabulary"] is None:
        raise InputError(f"{file}: vocab_size: got nothing, wants a number")
    tree: Config = {key: value for key, value in flat.items() if "." not in key and value is not None}
    experts = {key.removeprefix("experts."): value for key, value in flat.items() if key.startswith("experts.")}
    try:
        return architecture, ModelConfig.model_validate_json(json.dumps(tree | ({"experts": experts} if experts else {})), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        ours = ".".join(str(part) for part in first["loc"])
        name = next((key.theirs for key in architecture.keys if key.ours == ours), ours)
        if first["type"] == "value_error":
            told = str(first.get("ctx", {}).get("error", first["msg"]))
        else:
            told = f"got {'nothing' if first['type'] == 'missing' else repr(first['input'])}: {first['msg']}"
        raise InputError(f"{file}: {f'{name}: ' if name else ''}{told}; wants the config of a model that manta can train") from None


def number(theirs: Config, key: str, file: Path, *, absent: int) -> int:
    """Raises InputError where it is no whole number."""
    got = theirs.get(key, absent)
    if type(got) is not int:
        raise InputError(f"{file}: {key}: got {got!r}, wants a number")
    return got


def _rotation(architecture: Architecture, theta: float) -> Config:
    """As version 4 of transformers reads it, and as version 5 does."""
    partial = {"partial_rotary_factor": 1.0} if architecture.model_type == "glm4_moe" else {}
    return {"rope_theta": theta, **partial, "rope_parameters": {"rope_type": "default", "rope_theta": theta, **partial}}


def _theta(architecture: Architecture, theirs: Config, file: Path) -> object:
    for name in ("rope_scaling", "rope_parameters"):
        scaling: object = theirs.get(name) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, Mapping) else "unknown"
        _refuse_unless(kind == "default", file, name, scaling, "no scaling (rope_type default)")
    parameters = theirs.get("rope_parameters") or {}
    whole = 0.5 if architecture.model_type == "glm4_moe" else 1.0
    partial = parameters.get("partial_rotary_factor", theirs.get("partial_rotary_factor", whole))
    _refuse_unless(partial == 1.0, file, "partial_rotary_factor", partial, 1.0)
    usual = 1e6 if architecture.model_type == "mixtral" else 1e4
    return parameters.get("rope_theta", theirs.get("rope_theta", usual))


def _window(theirs: Config, file: Path) -> object:
    if not theirs.get("use_sliding_window", False):
        return None
    window = theirs.get("sliding_window", 4096)
    if theirs.get("model_type") == QWEN3.model_type and window is not None:
        layers, full = number(theirs, "num_hidden_layers", file, absent=0), number(theirs, "max_window_layers", file, absent=28)
        kinds: object = theirs.get("layer_types") or ["full_attention" if layer < full else "sliding_attention" for layer in range(layers)]
        if kinds == ["full_attention"] * layers:
            return None
        _refuse_unless(kinds == ["sliding_attention"] * layers, file, "layer_types", kinds, "the same window in every layer, or in none")
    return window


def _refuse_unless(fits: bool, file: Path, key: str, got: object, wanted: object) -> None:
    if not fits:
        wants = wanted if isinstance(wanted, str) and " " in wanted else json.dumps(wanted)
        raise InputError(f"{file}: {key}: got {json.dumps(got)}, wants {wants}: manta's models have no other")
