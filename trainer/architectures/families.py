"""The architectures of transformers that equal one of ours to the last bit of mathematics: their names for our keys and tensors.

What has no row here has no exact counterpart there, and is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from manta.data.errors import InputError
from manta.trainer.architectures.tensor_map import EACH_EXPERT, JOINED_TRANSPOSED, TRANSPOSED, UNTIED_HEAD, Row, affine
from manta.trainer.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Key:
    """Our key (dotted) and theirs. `absent`: what transformers takes where theirs is not written."""

    ours: str
    theirs: str
    absent: object = None
    older: str | None = None  # another name of theirs that is read, too


@dataclass(frozen=True, slots=True)
class Fixed:
    """A key of theirs for what our family has no choice in. `absent`: as above; the value itself where left out."""

    theirs: str
    value: object
    absent: object = ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    name: str
    model_type: str
    family: str
    keys: tuple[Key, ...]
    fixed: tuple[Fixed, ...]
    rows: tuple[Row, ...]
    needs: Mapping[str, tuple[object, ...]] = field(default_factory=dict[str, tuple[object, ...]])
    """Our keys that they have none for, and what these must be: the first is what an import becomes."""
    renames: tuple[tuple[str, str], ...] = ()
    """Patterns for names that files of older versions have."""
    no_weights: str = "$."
    """A pattern for tensors that some files hold and no model reads."""


def architecture_for(config: ModelConfig) -> Architecture:
    """Raises InputError where transformers has none that computes the same."""
    if (found := _nearest(config)) is None:
        raise InputError(f"model.family: got {config.family!r}, and transformers has no such architecture; wants llama, gpt2 or bert")
    flat = flatten(config)
    for key, wanted in found.needs.items():
        if flat[key] not in wanted:
            wants = " or ".join("none" if value is None else repr(value) for value in wanted)
            raise InputError(f"model.{key}: got {flat[key]!r}, and {found.name}, the nearest in transformers, has only {wants}")
    if found is GLM4_MOE and not flat["experts.shared"]:
        raise InputError(f"model.experts.shared: got 0, and {found.name}, the nearest in transformers, has at least 1")
    return found


def _nearest(config: ModelConfig) -> Architecture | None:
    if config.family != "llama":
        return {"gpt2": GPT2, "bert": BERT}.get(config.family)
    if config.experts:
        if config.experts.score == "sigmoid":
            return GLM4_MOE
        return QWEN3_MOE if config.qk_norm else MIXTRAL
    if config.qk_norm:
        return QWEN3
    # LlamaForCausalLM wants heads that divide the width; Mistral's is the same model, and does not.
    return MISTRAL if config.sliding_window or config.width % config.heads else LLAMA


def flatten(config: ModelConfig) -> dict[str, object]:
    """By dotted key."""
    flat = config.model_dump(mode="json")
    experts: dict[str, object] = flat["experts"] or {}
    return flat | {"experts": "a mixture" if experts else None} | {f"experts.{key}": value for key, value in experts.items()}


def _decoder_keys(*, kv: int | None, head: int | None = None, epsilon: float = 1e-6, inner: str = "mlp_width") -> tuple[Key, ...]:
    return (
        Key("vocabulary", "vocab_size"),
        Key("width", "hidden_size"),
        Key(inner, "intermediate_size"),
        Key("layers", "num_hidden_layers"),
        Key("heads", "num_attention_heads"),
        Key("kv_heads", "num_key_value_heads", kv),
        Key("head_width", "head_dim", head),
        Key("norm_epsilon", "rms_norm_eps", epsilon),
        Key("tied_head", "tie_word_embeddings", absent=False),
        Key("attention_dropout", "attention_dropout", 0.0),
    )


def _decoder_rows(*mlp: Row) -> tuple[Row, ...]:
    return (
        Row("embedding.weight", "model.embed_tokens.weight"),
        Row("blocks.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight"),
        Row("blocks.{i}.attention.q_proj.weight", "model.layers.{i}.self_attn.q_proj.weight"),
        Row("blocks.{i}.attention.k_proj.weight", "model.layers.{i}.self_attn.k_proj.weight"),
        Row("blocks.{i}.attention.v_proj.weight", "model.layers.{i}.self_attn.v_proj.weight"),
        Row("blocks.{i}.attention.o_proj.weight", "model.layers.{i}.self_attn.o_proj.weight"),
        Row("blocks.{i}.attention.q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
        Row("blocks.{i}.attention.k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
        Row("blocks.{i}.mlp_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
        *mlp,
        Row("norm.weight", "model.norm.weight"),
        Row("head.weight", "lm_head.weight"),
    )


_DENSE_ROWS = _decoder_rows(
    Row("blocks.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.gate_proj.weight"),
    Row("blocks.{i}.mlp.up_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
    Row("blocks.{i}.mlp.down_proj.weight", "model.layers.{i}.mlp.down_proj.weight"),
)
_EXPERT_ROWS = _decoder_rows(
    Row("blocks.{i}.mlp.router.weight", "model.layers.{i}.mlp.gate.weight"),
    Row("blocks.{i}.mlp.router.bias", "model.layers.{i}.mlp.gate.e_score_correction_bias"),
    Row("blocks.{i}.mlp.experts.gate_proj", "model.layers.{i}.mlp.experts.{e}.gate_proj.weight", EACH_EXPERT),
    Row("blocks.{i}.mlp.experts.up_proj", "model.layers.{i}.mlp.experts.{e}.up_proj.weight", EACH_EXPERT),
    Row("blocks.{i}.mlp.experts.down_proj", "model.layers.{i}.mlp.experts.{e}.down_proj.weight", EACH_EXPERT),
    Row("blocks.{i}.mlp.shared.gate_proj.weight", "model.layers.{i}.mlp.shared_experts.gate_proj.weight"),
    Row("blocks.{i}.mlp.shared.up_proj.weight", "model.layers.{i}.mlp.shared_experts.up_proj.weight"),
    Row("blocks.{i}.mlp.shared.down_proj.weight", "model.layers.{i}.mlp.shared_experts.down_proj.weight"),
)
_DENSE = {"experts": (None,), "logit_soft_cap": (None,)}
_SOFTMAX = {
    "logit_soft_cap": (None,),
    "experts.score": ("softmax",),
    "experts.shared": (0,),
    "experts.scale": (1.0,),
    "experts.balance": ("loss", "none"),
}
_NO_BIAS = (Fixed("hidden_act", "silu"), Fixed("attention_bias", value=False))
_ROTATION = r"(.*\.)?rotary_emb\.inv_freq"

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    family="llama",
    keys=_decoder_keys(kv=None),
    fixed=(*_NO_BIAS, Fixed("mlp_bias", value=False)),
    rows=_DENSE_ROWS,
    needs={**_DENSE, "qk_norm": (False,), "sliding_window": (None,)},
    no_weights=_ROTATION,
)
MISTRAL = Architecture(
    name="MistralForCausalLM",
    model_type="mistral",
    family="llama",
    keys=(*_decoder_keys(kv=8), Key("sliding_window", "sliding_window", 4096)),
    fixed=(*_NO_BIAS,),
    rows=_DENSE_ROWS,
    needs={**_DENSE, "qk_norm": (False,)},
    no_weights=_ROTATION,
)
QWEN3 = Architecture(  # its window is another matter: see configs.py
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    family="llama",
    keys=_decoder_keys(kv=32, head=128),
    fixed=_NO_BIAS,
    rows=_DENSE_ROWS,
    needs={**_DENSE, "qk_norm": (True,)},
)
MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    family="llama",
    keys=(
        *_decoder_keys(kv=8, epsilon=1e-5, inner="experts.width"),
        Key("sliding_window", "sliding_window"),
        Key("experts.experts", "num_local_experts", 8),
        Key("experts.top_k", "num_experts_per_tok", 2),
    ),
    fixed=_NO_BIAS,
    rows=_decoder_rows(
        Row("blocks.{i}.mlp.router.weight", "model.layers.{i}.block_sparse_moe.gate.weight"),
        Row("blocks.{i}.mlp.experts.gate_proj", "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight", EACH_EXPERT),
        Row("blocks.{i}.mlp.experts.down_proj", "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight", EACH_EXPERT),
        Row("blocks.{i}.mlp.experts.up_proj", "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight", EACH_EXPERT),
    ),
    needs={**_SOFTMAX, "qk_norm": (False,), "experts.normalize": (True,)},
)
QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    family="llama",
    keys=(
        *_decoder_keys(kv=4),
        Key("experts.experts", "num_experts", 128, older="num_local_experts"),
        Key("experts.top_k", "num_experts_per_tok", 8),
        Key("experts.width", "moe_intermediate_size", 768),
        Key("experts.normalize", "norm_topk_prob", absent=False),
    ),
    fixed=(*_NO_BIAS, Fixed("decoder_sparse_step", 1), Fixed("mlp_only_layers", [])),
    rows=_EXPERT_ROWS,
    needs={**_SOFTMAX, "qk_norm": (True,)},
)
GLM4_MOE = Architecture(
    name="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    family="llama",
    keys=(
        *_decoder_keys(kv=8, epsilon=1e-5),
        Key("qk_norm", "use_qk_norm", absent=False),
        Key("experts.experts", "n_routed_experts", 128, older="num_local_experts"),
        Key("experts.top_k", "num_experts_per_tok", 8),
        Key("experts.width", "moe_intermediate_size", 1408),
        Key("experts.shared", "n_shared_experts", 1),
        Key("experts.normalize", "norm_topk_prob", absent=True),
        Key("experts.scale", "routed_scaling_factor", 1.0),
    ),
    fixed=(
        *_NO_BIAS,
        Fixed("n_group", 1),
        Fixed("topk_group", 1),
        Fixed("first_k_dense_replace", 0, absent=1),
        Fixed("num_nextn_predict_layers", 0, absent=1),
    ),
    rows=_EXPERT_ROWS,
    needs={
        "logit_soft_cap": (None,),
        "sliding_window": (None,),
        "experts.score": ("sigmoid",),
        "experts.balance": ("bias",),
    },
)
_QKV = "blocks.{i}.attention.q_proj blocks.{i}.attention.k_proj blocks.{i}.attention.v_proj"
GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    family="gpt2",
    keys=(
        Key("vocabulary", "vocab_size", 50257),
        Key("positions", "n_positions", 1024),
        Key("width", "n_embd", 768),
        Key("layers", "n_layer", 12),
        Key("heads", "n_head", 12),
        Key("mlp_width", "n_inner"),
        Key("norm_epsilon", "layer_norm_epsilon", 1e-5),
        Key("tied_head", "tie_word_embeddings", absent=True),
        Key("dropout", "resid_pdrop", 0.1),
        Key("attention_dropout", "attn_pdrop", 0.1),
    ),
    fixed=(
        Fixed("activation_function", "gelu_new"),
        Fixed("scale_attn_weights", value=True),
        Fixed("scale_attn_by_inverse_layer_idx", value=False),
        Fixed("add_cross_attention", value=False),
    ),
    rows=(
        Row("embedding.weight", "transformer.wte.weight"),
        Row("position_embedding.weight", "transformer.wpe.weight"),
        *affine("blocks.{i}.attention_norm", "transformer.h.{i}.ln_1"),
        *affine(_QKV, "transformer.h.{i}.attn.c_attn", JOINED_TRANSPOSED),
        *affine("blocks.{i}.attention.o_proj", "transformer.h.{i}.attn.c_proj", TRANSPOSED),
        *affine("blocks.{i}.mlp_norm", "transformer.h.{i}.ln_2"),
        *affine("blocks.{i}.mlp.up_proj", "transformer.h.{i}.mlp.c_fc", TRANSPOSED),
        *affine("blocks.{i}.mlp.down_proj", "transformer.h.{i}.mlp.c_proj", TRANSPOSED),
        *affine("norm", "transformer.ln_f"),
        Row("head.weight", "lm_head.weight"),
    ),
    needs={"experts": (None,)},
    renames=((r"^(?=wte\.|wpe\.|h\.|ln_f\.)", "transformer."),),
    no_weights=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
)
_BERT_HEAD = "cls.predictions.decoder.weight cls.predictions.decoder.bias cls.predictions.bias"
BERT = Architecture(
    name="BertForPreTraining",
    model_type="bert",
    family="bert",
    keys=(
        Key("vocabulary", "vocab_size", 30522),
        Key("positions", "max_position_embeddings", 512),
        Key("width", "hidden_size", 768),
        Key("mlp_width", "intermediate_size", 3072),
        Key("layers", "num_hidden_layers", 12),
        Key("heads", "num_attention_heads", 12),
        Key("norm_epsilon", "layer_norm_eps", 1e-12),
        Key("tied_head", "tie_word_embeddings", absent=True),
        Key("dropout", "hidden_dropout_prob", 0.1),
        Key("attention_dropout", "attention_probs_dropout_prob", 0.1),
    ),
    fixed=(
        Fixed("hidden_act", "gelu"),
        Fixed("type_vocab_size", 2),
        Fixed("position_embedding_type", "absolute"),
        Fixed("is_decoder", value=False),
        Fixed("add_cross_attention", value=False),
    ),
    rows=(
        Row("embedding.weight", "bert.embeddings.word_embeddings.weight"),
        Row("position_embedding.weight", "bert.embeddings.position_embeddings.weight"),
        Row("segment_embedding.weight", "bert.embeddings.token_type_embeddings.weight"),
        *affine("embedding_norm", "bert.embeddings.LayerNorm"),
        *affine("blocks.{i}.attention.q_proj", "bert.encoder.layer.{i}.attention.self.query"),
        *affine("blocks.{i}.attention.k_proj", "bert.encoder.layer.{i}.attention.self.key"),
        *affine("blocks.{i}.attention.v_proj", "bert.encoder.layer.{i}.attention.self.value"),
        *affine("blocks.{i}.attention.o_proj", "bert.encoder.layer.{i}.attention.output.dense"),
        *affine("blocks.{i}.attention_norm", "bert.encoder.layer.{i}.attention.output.LayerNorm"),
        *affine("blocks.{i}.mlp.up_proj", "bert.encoder.layer.{i}.intermediate.dense"),
        *affine("blocks.{i}.mlp.down_proj", "bert.encoder.layer.{i}.output.dense"),
        *affine("blocks.{i}.mlp_norm", "bert.encoder.layer.{i}.output.LayerNorm"),
        *affine("pooler", "bert.pooler.dense"),
        *affine("transform", "cls.predictions.transform.dense"),
        *affine("transform_norm", "cls.predictions.transform.LayerNorm"),
        Row("head.weight head.bias", _BERT_HEAD, UNTIED_HEAD),
        Row("head.bias", "cls.predictions.bias"),
        *affine("next_sentence", "cls.seq_relationship"),
    ),
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    no_weights=r"bert\.embeddings\.position_ids",
)
ARCHITECTURES = {a.model_type: a for a in (LLAMA, MISTRAL, QWEN3, MIXTRAL, QWEN3_MOE, GLM4_MOE, GPT2, BERT)}
