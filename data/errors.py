"""Errors in the user's input."""

import json


class InputError(ValueError):
    """Bad input, in one line: `KEY: expected A, got B. Do C.` KEY is a dotted config key, or a file and line.

    The command line prints the message without a traceback and exits with code 2.
    """


class DataError(RuntimeError):
    """Data was not prepared or read, through no fault of the config: a killed process, a full disk, a store that fails. In one line.

    The command line prints the message without a traceback and exits with code 1.
    """


def one_line(error: BaseException) -> str:
    """Return an error's message, cut, with every line break and every run of spaces as one space."""
    return cut(" ".join(str(error).split()), 500)


def cut(text: str, limit: int = 200) -> str:
    """Return a text from elsewhere as a message may quote it: its start, without what a terminal would obey or could not encode."""
    text = text[: limit + 1]
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= limit else f"{text[:limit]}…"


class InvalidValueError(ValueError):
    """A config value that a validator rejects because of another key's value. pydantic collects it.

    `key` and `related`, the other keys, are relative to the section that raises it.
    """

    def __init__(self, key: str, expected: str, got: object, remedy: str, *related: str) -> None:
        super().__init__(f"{key}: expected {expected}, got {json.dumps(got, default=str)}. {remedy}")
        self.keys = (key, *related)
