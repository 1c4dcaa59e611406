"""The tokenizer's files, as AutoTokenizer wants them."""

import json

from tokenizers import Tokenizer as Reference
from tokenizers import processors

from manta.data.tokenizer.tokenizer import read_tokenizer
from manta.trainer.model.bert import Bert
from manta.trainer.pretrained.load import Pretrained
from manta.trainer.pretrained.source import KEPT


def tokenizer_files(trained: Pretrained) -> dict[str, bytes]:
    """Content by name. What was imported goes as it came."""
    if trained.source is not None:
        kept = {name: trained.home.path / name for name in KEPT}
        return {name: path.read_bytes() for name, path in kept.items() if path.exists()}
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    content = trained.tokenizer_file.read_bytes()
    if isinstance(trained.model, Bert):
        special = trained.tokenizer.special_tokens()
        marks = {"cls": special.cls, "sep": special.sep, "mask": special.mask, "pad": special.pad}
        names = {f"{mark}_token": trained.tokenizer.decode([number]) for mark, number in marks.items()}
        config |= {**names, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        content = _framed(read_tokenizer(trained.tokenizer_file), names["cls_token"], names["sep_token"]).encode()
    else:
        config |= {"bos_token": trained.end_of_text, "eos_token": trained.end_of_text}
    config |= {"model_max_length": trained.sequence_length, "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": content, "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}


def _framed(content: str, cls: str, sep: str) -> str:
    """With the marks put around a text and a pair of them, as they were in training."""
    tokenizer = Reference.from_str(content)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (cls, sep)],
    )
    return tokenizer.to_str(pretty=True)
