"""Errors of starting or joining Ray."""


class RayStartError(RuntimeError):
    """Ray did not start, or cannot be joined: one line, for the user. `is_transient`: it may start if it is tried again."""

    def __init__(self, message: str, *, is_transient: bool = False) -> None:
        super().__init__(message)
        self.is_transient = is_transient


class NoClusterError(RayStartError):
    """No Ray answers at the address, it denies access, or it requires no token, so that anyone may run code on it."""
