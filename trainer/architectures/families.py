"""The model classes of transformers that compute exactly what one of our models computes. Any other class is refused.

To add one: a value here, and its name in ARCHITECTURES.
"""

from manta.trainer.architectures.architecture import (
    DECODER_CONSTANTS,
    DECODER_KEYS,
    FUSE_TRANSPOSE,
    SPLIT_EXPERTS,
    TRANSPOSE,
    UNTIED_HEAD,
    Architecture,
    Key,
    Row,
    rows,
)

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

MIXTURE_BLOCK = (
    *ATTENTION,
    Row("mlp.router.weight", "mlp.gate.weight"),
    Row("mlp.router.bias", "mlp.gate.e_score_correction_bias"),
    *rows("mlp.experts.*", "mlp.experts.{e}.*.weight", "gate_proj up_proj down_proj", SPLIT_EXPERTS),
    *rows("mlp.shared.*", "mlp.shared_experts.*", "gate_proj up_proj down_proj"),
)
SOFTMAX_ROUTER: dict[str, tuple[object, ...]] = {
    "logit_soft_cap": (None,),
    "experts.score": ("softmax",),
    "experts.shared": (0,),
    "experts.scale": (1.0,),
    "experts.balance": ("loss", "none"),
}

MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    keys={
        **{ours: key for ours, key in DECODER_KEYS.items() if ours != "mlp_width"},
        "kv_heads": Key("num_key_value_heads", 8),
        "norm_epsilon": Key("rms_norm_eps", 1e-5),
        "sliding_window": Key("sliding_window"),
        "experts.width": Key("intermediate_size"),
        "experts.experts": Key("num_local_experts", 8),
        "experts.top_k": Key("num_experts_per_tok", 2),
    },
    requires={**SOFTMAX_ROUTER, "qk_norm": (False,), "experts.normalize": (True,)},
    rope_theta=1e6,
    block_tensors=(
        *ATTENTION,
        Row("mlp.router", "block_sparse_moe.gate"),
        Row("mlp.experts.gate_proj", "block_sparse_moe.experts.{e}.w1.weight", SPLIT_EXPERTS),
        Row("mlp.experts.down_proj", "block_sparse_moe.experts.{e}.w2.weight", SPLIT_EXPERTS),
        Row("mlp.experts.up_proj", "block_sparse_moe.experts.{e}.w3.weight", SPLIT_EXPERTS),
    ),
    memory_names=(
        (r"\.mlp\.(gate|experts)\.", r".block_sparse_moe.\1."),
        (r"(experts\.\d+)\.gate_proj", r"\1.w1"),
        (r"(experts\.\d+)\.down_proj", r"\1.w2"),
        (r"(experts\.\d+)\.up_proj", r"\1.w3"),
    ),
)
QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    keys={
        **DECODER_KEYS,
        "kv_heads": Key("num_key_value_heads", 4),
        "experts.experts": Key("num_experts", 128, older="num_local_experts"),
        "experts.top_k": Key("num_experts_per_tok", 8),
        "experts.width": Key("moe_intermediate_size", 768),
        "experts.normalize": Key("norm_topk_prob", default=False),
    },
    constants={**DECODER_CONSTANTS, "decoder_sparse_step": 1, "mlp_only_layers": []},
    requires={**SOFTMAX_ROUTER, "qk_norm": (True,)},
    has_window_switch=True,
    block_tensors=MIXTURE_BLOCK,
)
GLM4_MOE = Architecture(
    name="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    keys={
        **DECODER_KEYS,
        "kv_heads": Key("num_key_value_heads", 8),
        "norm_epsilon": Key("rms_norm_eps", 1e-5),
        "qk_norm": Key("use_qk_norm", default=False),
        "experts.experts": Key("n_routed_experts", 128, older="num_local_experts"),
        "experts.top_k": Key("num_experts_per_tok", 8),
        "experts.width": Key("moe_intermediate_size", 1408),
        "experts.shared": Key("n_shared_experts", 1),
        "experts.normalize": Key("norm_topk_prob", default=True),
        "experts.scale": Key("routed_scaling_factor", 1.0),
    },
    constants={**DECODER_CONSTANTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
    constant_defaults={"first_k_dense_replace": 1, "num_nextn_predict_layers": 1},
    requires={"logit_soft_cap": (None,), "sliding_window": (None,), "experts.score": ("sigmoid",), "experts.balance": ("bias",)},
    needs_shared_expert=True,
    partial_rotary_factor=0.5,
    block_tensors=MIXTURE_BLOCK,
)

# Its linear layers store their weights transposed (Conv1D).
GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    family="gpt2",
    keys={
        "vocabulary": Key("vocab_size", 50257),
        "positions": Key("n_positions", 1024),
        "width": Key("n_embd", 768),
        "layers": Key("n_layer", 12),
        "heads": Key("n_head", 12),
        "mlp_width": Key("n_inner"),
        "norm_epsilon": Key("layer_norm_epsilon", 1e-5),
        "tied_head": Key("tie_word_embeddings", default=True),
        "dropout": Key("resid_pdrop", 0.1, twin="embd_pdrop"),
        "attention_dropout": Key("attn_pdrop", 0.1),
    },
    constants={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    rope_theta=None,
    tensors=(
        Row("embedding", "transformer.wte"),
        Row("position_embedding", "transformer.wpe"),
        Row("norm", "transformer.ln_f"),
        Row("head", "lm_head"),
    ),
    block="transformer.h",
    block_tensors=(
        Row("attention_norm", "ln_1"),
        Row("attention.q_proj attention.k_proj attention.v_proj", "attn.c_attn", FUSE_TRANSPOSE),
        Row("attention.o_proj", "attn.c_proj", TRANSPOSE),
        Row("mlp_norm", "ln_2"),
        Row("mlp.up_proj", "mlp.c_fc", TRANSPOSE),
        Row("mlp.down_proj", "mlp.c_proj", TRANSPOSE),
    ),
    copies={"lm_head.weight": "transformer.wte.weight"},
    old_names=((r"^(?=wte\.|wpe\.|h\.|ln_f\.)", "transformer."),),
    buffers=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
)

BERT = Architecture(
    name="BertForPreTraining",
    model_type="bert",
    family="bert",
    keys={
        "vocabulary": Key("vocab_size", 30522),
        "positions": Key("max_position_embeddings", 512),
        "width": Key("hidden_size", 768),
        "mlp_width": Key("intermediate_size", 3072),
        "layers": Key("num_hidden_layers", 12),
        "heads": Key("num_attention_heads", 12),
        "norm_epsilon": Key("layer_norm_eps", 1e-12),
        "tied_head": Key("tie_word_embeddings", default=True),
        "dropout": Key("hidden_dropout_prob", 0.1),
        "attention_dropout": Key("attention_probs_dropout_prob", 0.1),
    },
    constants={
        "hidden_act": "gelu",
        "type_vocab_size": 2,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    },
    rope_theta=None,
    tensors=(
        Row("embedding", "bert.embeddings.word_embeddings"),
        Row("position_embedding", "bert.embeddings.position_embeddings"),
        Row("segment_embedding", "bert.embeddings.token_type_embeddings"),
        Row("embedding_norm", "bert.embeddings.LayerNorm"),
        Row("pooler", "bert.pooler.dense"),
        Row("transform", "cls.predictions.transform.dense"),
        Row("transform_norm", "cls.predictions.transform.LayerNorm"),
        Row("head.weight head.bias", "cls.predictions.decoder.weight cls.predictions.decoder.bias cls.predictions.bias", UNTIED_HEAD),
        Row("head.bias", "cls.predictions.bias"),
        Row("next_sentence", "cls.seq_relationship"),
    ),
    block="bert.encoder.layer",
    block_tensors=(
        Row("attention.q_proj", "attention.self.query"),
        Row("attention.k_proj", "attention.self.key"),
        Row("attention.v_proj", "attention.self.value"),
        Row("attention.o_proj", "attention.output.dense"),
        Row("attention_norm", "attention.output.LayerNorm"),
        Row("mlp.up_proj", "intermediate.dense"),
        Row("mlp.down_proj", "output.dense"),
        Row("mlp_norm", "output.LayerNorm"),
    ),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    old_names=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    buffers=r"bert\.embeddings\.position_ids",
)

ARCHITECTURES = {
    architecture.model_type: architecture for architecture in (LLAMA, MISTRAL, QWEN3, MIXTRAL, QWEN3_MOE, GLM4_MOE, GPT2, BERT)
}
"""By model_type. Of several that fit a config, the first is used."""
