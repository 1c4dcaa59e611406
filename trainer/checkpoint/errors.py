"""What can be wrong with a checkpoint; named apart from the store, so that a command line knows it without torch."""

import errno

_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}


class CheckpointError(RuntimeError):
    """A checkpoint that can not be used, and why."""


class UnreachableError(CheckpointError):
    """A checkpoint that could not be read now, which makes it no worse: a store that does not answer, a file that nobody may open."""


def unreadable(at: str, error: OSError) -> CheckpointError:
    """What an error in reading a checkpoint says about it."""
    told = error.strerror or str(error)
    kind = CheckpointError if error.errno in _DAMAGE else UnreachableError
    return kind(told if told.startswith(at) else f"{at}: {told}")


class SaveError(RuntimeError):
    """A checkpoint that could not be written, and why; those that were there stand."""


class LeftUnsavedError(SaveError):
    """A run that was told to leave, and could not be saved."""


class FencedError(RuntimeError):
    """A later attempt of the run has begun: this one may save no more."""
