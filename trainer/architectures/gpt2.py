"""GPT-2. Its linear layers store their weights transposed (Conv1D)."""

from manta.trainer.architectures.architecture import Architecture, Key
from manta.trainer.architectures.tensor_map import FUSE_TRANSPOSE, TRANSPOSE, Row

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
