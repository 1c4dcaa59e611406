"""Decoders with one MLP in each block."""

from manta.trainer.architectures.architecture import DECODER_CONSTANTS, DECODER_KEYS, Architecture, Key
from manta.trainer.architectures.tensor_map import Row, rows

ATTENTION = (
    Row("attention_norm", "input_layernorm"),
    *rows("attention.*", "self_attn.*", "q_proj k_proj v_proj o_proj q_norm k_norm"),
    Row("mlp_norm", "post_attention_layernorm"),
)
BLOCK = (*ATTENTION, *rows("mlp.*", "mlp.*", "gate_proj up_proj down_proj"))
ROTARY_BUFFERS = r"(.*\.)?rotary_emb\.inv_freq"

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    constants={**DECODER_CONSTANTS, "mlp_bias": False},
    requires={"logit_soft_cap": (None,), "qk_norm": (False,), "sliding_window": (None,)},
    needs_divisible_width=True,
    block_tensors=BLOCK,
    buffers=ROTARY_BUFFERS,
)
MISTRAL = Architecture(  # also a Llama with heads that do not divide the width
    name="MistralForCausalLM",
    model_type="mistral",
    keys={**DECODER_KEYS, "kv_heads": Key("num_key_value_heads", 8), "sliding_window": Key("sliding_window", 4096)},
    requires={"logit_soft_cap": (None,), "qk_norm": (False,)},
    block_tensors=BLOCK,
    buffers=ROTARY_BUFFERS,
)
QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    keys={**DECODER_KEYS, "kv_heads": Key("num_key_value_heads", 32), "head_width": Key("head_dim", 128)},
    requires={"logit_soft_cap": (None,), "qk_norm": (True,)},
    has_window_switch=True,
    has_window_layers=True,
    block_tensors=BLOCK,
)
