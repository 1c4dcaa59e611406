"""Decoders with one MLP a block, and what they share with mixtures of experts (moe.py)."""

from manta.trainer.architectures.architecture import Architecture, Key
from manta.trainer.architectures.tensor_map import TensorRow, under

DECODER_KEYS = {
    "vocabulary": Key("vocab_size"),
    "width": Key("hidden_size"),
    "mlp_width": Key("intermediate_size"),
    "layers": Key("num_hidden_layers"),
    "heads": Key("num_attention_heads"),
    "kv_heads": Key("num_key_value_heads"),
    "head_width": Key("head_dim"),
    "norm_epsilon": Key("rms_norm_eps", 1e-6),
    "tied_head": Key("tie_word_embeddings", default=False),
    "attention_dropout": Key("attention_dropout", 0.0),
}
DECODER_TENSORS = (TensorRow("embedding", "model.embed_tokens"), TensorRow("norm", "model.norm"), TensorRow("head", "lm_head"))
ATTENTION_TENSORS = (
    TensorRow("attention_norm", "input_layernorm"),
    TensorRow("attention.q_proj", "self_attn.q_proj"),
    TensorRow("attention.k_proj", "self_attn.k_proj"),
    TensorRow("attention.v_proj", "self_attn.v_proj"),
    TensorRow("attention.o_proj", "self_attn.o_proj"),
    TensorRow("attention.q_norm", "self_attn.q_norm"),
    TensorRow("attention.k_norm", "self_attn.k_norm"),
    TensorRow("mlp_norm", "post_attention_layernorm"),
)
SILU = {"hidden_act": "silu", "attention_bias": False}
_DENSE_TENSORS = (
    *DECODER_TENSORS,
    *under(
        "blocks.{i}",
        "model.layers.{i}",
        *ATTENTION_TENSORS,
        TensorRow("mlp.gate_proj", "mlp.gate_proj"),
        TensorRow("mlp.up_proj", "mlp.up_proj"),
        TensorRow("mlp.down_proj", "mlp.down_proj"),
    ),
)
_ROTARY_BUFFERS = r"(.*\.)?rotary_emb\.inv_freq"

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    family="llama",
    keys=DECODER_KEYS,
    constants={**SILU, "mlp_bias": False},
    requires={"logit_soft_cap": (None,), "qk_norm": (False,), "sliding_window": (None,)},
    needs_divisible_width=True,
    tensors=_DENSE_TENSORS,
    buffers=_ROTARY_BUFFERS,
)
MISTRAL = Architecture(  # also a Llama with heads that do not divide the width
    name="MistralForCausalLM",
    model_type="mistral",
    family="llama",
    keys={**DECODER_KEYS, "kv_heads": Key("num_key_value_heads", 8), "sliding_window": Key("sliding_window", 4096)},
    constants=SILU,
    requires={"logit_soft_cap": (None,), "qk_norm": (False,)},
    tensors=_DENSE_TENSORS,
    buffers=_ROTARY_BUFFERS,
)
QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    family="llama",
    keys={**DECODER_KEYS, "kv_heads": Key("num_key_value_heads", 32), "head_width": Key("head_dim", 128)},
    constants=SILU,
    requires={"logit_soft_cap": (None,), "qk_norm": (True,)},
    has_window_switch=True,
    has_window_layers=True,
    tensors=_DENSE_TENSORS,
)
