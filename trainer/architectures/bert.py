"""BERT with both heads of pretraining: masked tokens and next sentence."""

from manta.trainer.architectures.architecture import Architecture, Key
from manta.trainer.architectures.tensor_map import UNTIED_HEAD, Row

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
