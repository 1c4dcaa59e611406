"""Errors in the user's input."""

import json
import re

LONGEST_VALUE, LONGEST_LINE = 200, 1000  # characters in a message
_USER = re.compile(r"(?<=[a-z0-9]:/)/?[^/\s@:]+@", re.IGNORECASE)  # one slash: a Path of a URL
_PASSWORD = re.compile(r"(?<=[a-z0-9]:/)/?[^/\s@:]*:(?!\d+(?:[/\s]|$))\S*@", re.IGNORECASE)  # digits before a slash are a port
_SIGNATURE = re.compile(r"([?&][\w.-]*(?:sig|signature|token|secret|password|credential|key)[\w.-]*=)[^&\s\"']+", re.IGNORECASE)


class InputError(ValueError):
    """Bad input, in one line: `KEY: expected A, got B. Do C.` KEY is a dotted config key, or a file and line.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class AccessError(InputError):
    """A file that this user may not read. It is not damaged: nothing replaces it."""


class DataError(RuntimeError):
    """Data was not prepared or read, through no fault of the config: a killed process, a full disk, a store that fails. In one line.

    The command line prints the message without a traceback and exits with code 1.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def one_line(error: object) -> str:
    """Return an error's message, cut, with every line break and every run of spaces as one space."""
    return cut(" ".join(str(error).split()), 500)


def redact(text: str) -> str:
    """Return a text with `***` in place of the user names, passwords and signatures in its URLs."""
    return _SIGNATURE.sub(r"\1***", _USER.sub("/***@", _PASSWORD.sub("/***@", text)))


def has_password(url: str) -> bool:
    return _PASSWORD.search(url) is not None


def cut(text: str, length: int = LONGEST_VALUE) -> str:
    """Return a text as a message quotes it: of a long one, without its middle; what a terminal would obey or cannot show, escaped."""
    half = length // 2
    text = text if len(text) <= length else f"{text[: length - half]}…{text[1 - half :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(message: str) -> str:
    """Return a message without passwords, without what a terminal would obey, and with its long lines cut."""
    return "\n".join(cut(line, LONGEST_LINE) for line in redact(message).split("\n"))


def shown(value: object) -> str:
    """Return a value as a message shows it: as JSON, and cut if it is long."""
    return cut(json.dumps(value, default=str))


class InvalidValueError(ValueError):
    """A config value that a validator rejects because of another key's value. pydantic collects it.

    `key` and `related`, the other keys, are relative to the section that raises it.
    """

    def __init__(self, key: str, expected: str, got: object, remedy: str, *related: str) -> None:
        super().__init__(f"{key}: expected {expected}, got {shown(got)}. {remedy}")
        self.keys = (key, *related)
