"""Errors in the user's input."""

import json


class InputError(ValueError):
    """Bad input, in one line: `KEY: expected A, got B. Do C.` KEY is a dotted config key, or a file and line.

    The command line prints the message without a traceback and exits with code 2.
    """


class AccessError(InputError):
    """A file that this user may not read. It is not damaged: nothing replaces it."""


class DataError(RuntimeError):
    """Data was not prepared or read, through no fault of the config: a killed process, a full disk, a store that fails. In one line.

    The command line prints the message without a traceback and exits with code 1.
    """


def one_line(error: object) -> str:
    """Return an error's message, with every line break and every run of spaces as one space."""
    return " ".join(str(error).split())


class InvalidValueError(ValueError):
    """A config value that a validator rejects because of another key's value. pydantic collects it.

    `key` and `related`, the other keys, are relative to the section that raises it.
    """

    def __init__(self, key: str, expected: str, got: object, remedy: str, *related: str) -> None:
        super().__init__(f"{key}: expected {expected}, got {json.dumps(got, default=str)}. {remedy}")
        self.keys = (key, *related)
