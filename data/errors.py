"""What a person's own input can be wrong about, told in one line."""


class InputError(ValueError):
    """Bad input: where it stands (file and line, or dotted key), what was got, what is wanted, what to do.

    The command line prints the message as it is and leaves with exit code 2, so it is one line and needs no traceback.
    """
