"""Byte-level vocabularies: their alphabet, and tiktoken as a faster encoder for those that it can reproduce exactly.

tiktoken splits text by a regular expression and merges in the order of ids; `tokenizers` supports many more ways.
"""

from typing import Any

# The split that `tokenizers` calls ByteLevel (GPT-2's). Its first group needs no backtracking: tiktoken compiles it to one automaton,
# which is twice as fast.
_GPT2 = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)|\s+(?!\S)|\s"
_SPACES = r"|\s+(?!\S)|\s+"  # the end of most other patterns, and the only part of them that backtracks
_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def byte_letters() -> dict[int, str]:
    """Return the printable letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def letters_within_words() -> frozenset[str]:
    """Return the letters of letters, digits and non-ASCII bytes: a token that starts with one continues a word."""
    return frozenset(letter for byte, letter in byte_letters().items() if byte >= 128 or chr(byte).isalnum())


def tiktoken_obstacle(spec: dict[str, Any]) -> str | None:
    """Return why tiktoken cannot reproduce a tokenizer.json (with all optional fields), or None if it can."""
    model = spec["model"]
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not BPE"
    ranks, letters, added = _ranks(spec), set(byte_letters().values()), _plain_added_tokens(spec)
    merged = [ranks.get("".join(pair), -1) for pair in model["merges"]]
    obstacles = {
        "it normalizes text": spec["normalizer"] not in (None, {"type": "NFC"}),
        "its pre-tokenizer is not a single pattern": _pattern(spec) is None,
        "its BPE has options that tiktoken lacks": any(model[option] for option in _OPTIONS),
        "its added tokens depend on their context": any(
            token[key] for token in added.values() for key in ("lstrip", "rstrip", "single_word")
        ),
        "one of its added tokens is the start of another": any(a != b and a.startswith(b) for a in added for b in added),
        "its vocabulary is not byte-level": not letters <= ranks.keys() or not all(letters.issuperset(token) for token in ranks),
        # tiktoken merges any two tokens that make a third, in the order of ids; `tokenizers` merges listed pairs, in their order
        "its ids do not follow its merges": merged != sorted(merged) or {*merged} != {ranks[token] for token in ranks if len(token) > 1},
    }
    return next((obstacle for obstacle, applies in obstacles.items() if applies), None) or _unmerged(spec, ranks)


def tiktoken_encoding(spec: dict[str, Any], end_of_text: str) -> tuple[Any, frozenset[str]]:
    """Return a tiktoken.Encoding for a tokenizer without an obstacle, and the added tokens that it recognizes in text.

    Raises ValueError if tiktoken cannot compile its pattern.
    """
    import tiktoken

    pattern = _pattern(spec)
    assert pattern is not None, "this tokenizer has an obstacle"
    byte = {letter: value for value, letter in byte_letters().items()}
    ranks = {bytes(byte[letter] for letter in token): rank for token, rank in _ranks(spec).items()}
    added = {name: token["id"] for name, token in _plain_added_tokens(spec).items()}
    # tiktoken searches every text for special tokens; without any it would stop at every letter.
    special = added or {end_of_text: len(ranks)}
    return tiktoken.Encoding("manta", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special), frozenset(added)


def _ranks(spec: dict[str, Any]) -> dict[str, int]:
    """Return the vocabulary without added tokens."""
    added = {token["content"] for token in spec["added_tokens"]}
    return {token: rank for token, rank in spec["model"]["vocab"].items() if token not in added}


def _plain_added_tokens(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the added tokens that are not special: text may contain them."""
    return {token["content"]: token for token in spec["added_tokens"] if not token["special"]}


def _pattern(spec: dict[str, Any]) -> str | None:
    """Return the regular expression that splits text; None if anything else does."""
    match spec["pre_tokenizer"]:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            head = regex.removesuffix(_SPACES)
            grouped = f"(?:{head}){_SPACES}" if head != regex and not head.endswith("\\") else regex
            return rf"{grouped}|(?:(?!{regex})[\s\S])+"  # text between its matches is a word as well
        case _:
            return None


def _unmerged(spec: dict[str, Any], ranks: dict[str, int]) -> str | None:
    """Check that merges produce each token from its letters, or that they list every pair of tokens that makes a token.

    Then no two tokens of an encoded text can make a third, so it does not matter whether a pair is listed.
    """
    from tokenizers import models

    model = spec["model"]
    merges = [(left, right) for left, right in model["merges"]]
    bpe = models.BPE(vocab=model["vocab"], merges=merges)
    unmerged = next((token for token in ranks if len(bpe.tokenize(token)) > 1), None)
    if unmerged is None:
        return None
    listed = set(merges)
    pairs = ((token[:cut], token[cut:]) for token in ranks for cut in range(1, len(token)))
    if model["ignore_merges"] and all(pair in listed for pair in pairs if pair[0] in ranks and pair[1] in ranks):
        return None
    return f"its merges do not produce its token {unmerged!r}"
