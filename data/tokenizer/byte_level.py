"""Vocabularies of bytes: the letters that spell them, and tiktoken as a second encoder for those that it can copy exactly.

tiktoken splits a text by a regular expression and merges what is found in the order of ids; `tokenizers` knows many more ways.
`obstacle` says what of a tokenizer.json stands in the way; `encoding` makes of the others the same in tiktoken.
"""

from typing import Any

# The split that `tokenizers` calls ByteLevel (GPT-2's). In a group of its own, what needs no backtracking is one automaton for tiktoken,
# at twice the speed.
_GPT2 = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)|\s+(?!\S)|\s"
_BLANKS = r"|\s+(?!\S)|\s+"  # how most of the others end, and all that backtracks in them
_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def byte_letters() -> dict[int, str]:
    """Byte -> the printable letter that stands for it in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def letters_within_words() -> frozenset[str]:
    """Those of letters, digits and what is not ASCII: a token that begins with one goes on with a word."""
    return frozenset(letter for byte, letter in byte_letters().items() if byte >= 128 or chr(byte).isalnum())


def obstacle(spec: dict[str, Any]) -> str | None:
    """What of a tokenizer.json, all its fields spelled out, tiktoken has no word for, if anything."""
    model = spec["model"]
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not BPE"
    plain, letters = _plain(spec), set(byte_letters().values())
    merged = [plain.get("".join(pair), -1) for pair in model["merges"]]
    added = [token["content"] for token in _spelled(spec)]
    obstacles = {
        "it normalizes text": spec["normalizer"] not in (None, {"type": "NFC"}),
        "it splits text in a way of its own": _pattern(spec) is None,
        "its BPE has options of its own": any(model[option] for option in _OPTIONS),
        "its added tokens reach beyond their own letters": any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in _spelled(spec)),
        "its added tokens begin alike": any(a != b and a.startswith(b) for a in added for b in added),
        "its vocabulary is not of bytes": not letters <= plain.keys() or not all(letters.issuperset(token) for token in plain),
        # tiktoken merges any two tokens that make a third, in the order of ids; `tokenizers` those that it lists, in their order
        "its ids do not follow its merges": merged != sorted(merged) or {*merged} != {plain[token] for token in plain if len(token) > 1},
    }
    return next((told for told, stands in obstacles.items() if stands), None) or _unmerged(spec, plain)


def encoding(spec: dict[str, Any], end_of_text: str) -> tuple[Any, frozenset[str]]:
    """A tiktoken.Encoding, and the added tokens that it recognises in a text. Raises ValueError where it can not compile the pattern."""
    import tiktoken

    pattern = _pattern(spec)
    assert pattern is not None, "a tokenizer that has an obstacle is not asked for"
    byte = {letter: value for value, letter in byte_letters().items()}
    ranks = {bytes(byte[letter] for letter in token): rank for token, rank in _plain(spec).items()}
    added = {token["content"]: token["id"] for token in _spelled(spec)}
    # It looks for special tokens in every text; with none to look for, it would stop at every letter.
    special = added or {end_of_text: len(ranks)}
    return tiktoken.Encoding("manta", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special), frozenset(added)


def _plain(spec: dict[str, Any]) -> dict[str, int]:
    """The vocabulary without the tokens that were added to it."""
    added = {token["content"] for token in spec["added_tokens"]}
    return {token: rank for token, rank in spec["model"]["vocab"].items() if token not in added}


def _spelled(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens that a text may spell: those that are not special."""
    return [token for token in spec["added_tokens"] if not token["special"]]


def _pattern(spec: dict[str, Any]) -> str | None:
    """The regular expression that splits a text, where nothing else does."""
    match spec["pre_tokenizer"]:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(theirs)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            head = theirs.removesuffix(_BLANKS)
            grouped = f"(?:{head}){_BLANKS}" if head != theirs and not head.endswith("\\") else theirs
            return rf"{grouped}|(?:(?!{theirs})[\s\S])+"  # what stands between its matches is a piece as well
        case _:
            return None


def _unmerged(spec: dict[str, Any], plain: dict[str, int]) -> str | None:
    """Whether the merges make each token of its own letters, or list every two that make one.

    Then no two tokens that a text is cut into can make a third, and it is the same whether a pair is listed.
    """
    from tokenizers import models

    model = spec["model"]
    merges = [(left, right) for left, right in model["merges"]]
    bpe = models.BPE(vocab=model["vocab"], merges=merges)
    broken = next((token for token in plain if len(bpe.tokenize(token)) > 1), None)
    if broken is None:
        return None
    listed = set(merges)
    pairs = ((token[:cut], token[cut:]) for token in plain for cut in range(1, len(token)))
    if model["ignore_merges"] and all(pair in listed for pair in pairs if pair[0] in plain and pair[1] in plain):
        return None
    return f"its merges do not make its own token {broken!r}"
