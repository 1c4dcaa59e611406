"""What can be wrong with a checkpoint; named apart from the store, so that a command line knows it without torch."""


class CheckpointError(RuntimeError):
    """A checkpoint that can not be used, and why."""
