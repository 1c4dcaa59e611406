"""Errors of checkpoints. They need no torch, so that the command line can import them."""

import errno

_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP, errno.ENXIO, errno.EINVAL, errno.EFBIG}
_NO_ACCESS = {errno.EACCES, errno.EPERM}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, and why."""


class UnreachableError(CheckpointError):
    """A checkpoint that could not be read now, but may be sound: its store does not respond, or its files may not be opened."""


def read_error(location: str, error: OSError) -> CheckpointError:
    """Return what an OSError means for the checkpoint that was read."""
    message = error.strerror or str(error)
    kind = CheckpointError if error.errno in _DAMAGE else UnreachableError
    remedy = ". Let this user read it." if error.errno in _NO_ACCESS else ""
    return kind((message if message.startswith(location) else f"{location}: {message}") + remedy)


class SaveError(RuntimeError):
    """A checkpoint that could not be written, and why. Earlier checkpoints are unharmed."""


class LeftUnsavedError(SaveError):
    """A run that was asked to stop, and could not be saved."""


class FencedError(RuntimeError):
    """A later attempt of the run has started: this one can no longer save."""
