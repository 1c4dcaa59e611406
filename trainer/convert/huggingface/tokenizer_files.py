"""The files that AutoTokenizer loads."""

import json

from tokenizers import Tokenizer as Reference
from tokenizers import processors

from manta.data.tokenizer.tokenizer import read_tokenizer
from manta.trainer.model.bert import Bert
from manta.trainer.pretrained.load import Pretrained
from manta.trainer.pretrained.source import KEPT_FILES


def tokenizer_files(pretrained: Pretrained) -> dict[str, bytes]:
    """Return content by file name. The files of an import are returned unchanged."""
    if pretrained.source is not None:
        kept = {name: pretrained.run_directory.path / name for name in KEPT_FILES}
        return {name: path.read_bytes() for name, path in kept.items() if path.exists()}
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    content = pretrained.tokenizer_file.read_bytes()
    if isinstance(pretrained.model, Bert):
        special = pretrained.tokenizer.special_tokens()
        ids = {"cls": special.cls, "sep": special.sep, "mask": special.mask, "pad": special.pad}
        names = {f"{key}_token": pretrained.tokenizer.decode([number]) for key, number in ids.items()}
        config |= {**names, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        content = _with_template(read_tokenizer(pretrained.tokenizer_file), names["cls_token"], names["sep_token"]).encode()
    else:
        config |= {"bos_token": pretrained.end_of_text, "eos_token": pretrained.end_of_text}
    config |= {"model_max_length": pretrained.sequence_length, "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": content, "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}


def _with_template(content: str, cls: str, sep: str) -> str:
    """Put the special tokens of BERT's pretraining around a text, or a pair of texts."""
    tokenizer = Reference.from_str(content)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (cls, sep)],
    )
    return tokenizer.to_str(pretty=True)
