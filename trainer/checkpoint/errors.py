"""What can be wrong with a checkpoint; named apart from the store, so that a command line knows it without torch."""


class CheckpointError(RuntimeError):
    """A checkpoint that can not be used, and why."""


class SaveError(RuntimeError):
    """A checkpoint that could not be written, and why; those that were there stand."""


class FencedError(RuntimeError):
    """A later attempt of the run has begun: this one may save no more."""
