"""Decoders with a mixture of experts in each block."""

from manta.trainer.architectures.architecture import DECODER_CONSTANTS, DECODER_KEYS, Architecture, Key
from manta.trainer.architectures.dense import ATTENTION
from manta.trainer.architectures.tensor_map import SPLIT_EXPERTS, Row, rows

BLOCK = (
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
    block_tensors=BLOCK,
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
    block_tensors=BLOCK,
)
