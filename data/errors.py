"""Errors in the user's input."""


class InputError(ValueError):
    """Bad input, in one line: `KEY: expected A, got B. Do C.` KEY is a dotted config key, or a file and line.

    The command line prints the message without a traceback and exits with code 2.
    """
