"""Write token files the way Megatron, nanoGPT and llm.c do, and a tokenizer for them.

Documents are lists of ids. nanoGPT and llm.c add the end of text to each; Megatron writes documents unchanged.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

LLMC = {"gpt-2": (20240520, 1, np.dtype("<u2")), "llama-3": (20240801, 7, np.dtype("<u4"))}  # magic, version, ids
MEGATRON = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}


def write_nanogpt(path: Path, documents: Sequence[Sequence[int]], end_of_text: int) -> None:
    """train.bin or val.bin: bare uint16, the end of text after each document (karpathy/nanoGPT, data/openwebtext/prepare.py)."""
    ids = [token for document in documents for token in (*document, end_of_text)]
    file = np.memmap(path, dtype=np.uint16, mode="w+", shape=(len(ids),))
    file[:] = ids
    file.flush()


def write_llmc(path: Path, documents: Sequence[Sequence[int]], end_of_text: int, *, model: str = "gpt-2") -> None:
    """A header of 256 int32, then the ids, the end of text before each document (karpathy/llm.c, dev/data/data_common.py, fineweb.py)."""
    magic, version, dtype = LLMC[model]
    ids = np.array([token for document in documents for token in (end_of_text, *document)], dtype=dtype)
    header = struct.pack("<3i", magic, version, len(ids))
    path.write_bytes(header.ljust(256 * 4, b"\0") + ids.tobytes())


def write_megatron(prefix: Path, documents: Sequence[Sequence[int]], dtype: type[np.integer], *, sequences: int = 1) -> None:
    """x.bin and x.idx, each document in at most `sequences` sequences (NVIDIA/Megatron-LM, core/datasets/indexed_dataset.py)."""
    parts_by_document = [in_sequences(document, sequences) for document in documents]
    lengths = [len(part) for parts in parts_by_document for part in parts]
    ends = np.cumsum([0, *map(len, parts_by_document)], dtype=np.int64)
    ids = np.concatenate([np.array(document, dtype=dtype) for document in documents])
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * ids.itemsize
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, MEGATRON[ids.dtype], len(lengths), len(ends))
    prefix.with_name(f"{prefix.name}.bin").write_bytes(ids.tobytes())
    prefix.with_name(f"{prefix.name}.idx").write_bytes(header + np.int32(lengths).tobytes() + starts.tobytes() + ends.tobytes())


def in_sequences(document: Sequence[int], sequences: int) -> list[list[int]]:
    """Split a document into several sequences, as a tool that splits sentences does."""
    return [part.tolist() for part in np.array_split(np.array(document), sequences) if len(part)]


def write_tokenizer(file: Path) -> None:
    """Write a tokenizer.json of 257 ids: 0 is the end of text, the others are bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False))
    tokenizer.save(str(file))
