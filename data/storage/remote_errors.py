"""What a store's error means to whoever asked: another try, a person's to mend, or final. Each store's library has errors of its own."""

import errno
import os
import re
from collections.abc import Iterator
from typing import Any, cast

from manta.data.errors import InputError

# Each store's library has errors of its own, with no base in common and not always installed: they are told by name.
_BROKEN = {
    "ConnectionError",
    "FlexibleChecksumError",
    "TimeoutError",
    "HTTPClientError",
    "ClientConnectionError",
    "ClientPayloadError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseParserError",
    "TransportError",
    "ServiceRequestError",
    "ServiceResponseError",
}
_LOCKED_OUT = {"PermissionError", "NoCredentialsError", "PartialCredentialsError", "ClientAuthenticationError", "DefaultCredentialsError"}
_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", re.IGNORECASE)


def meaning(url: str, error: Exception, told: str) -> Exception | None:
    """What an error means to the caller; None where another try may do."""
    if isinstance(error, InputError):
        return error
    status = status_of(error)
    names = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    if names & _BROKEN or (status is not None and (status >= 500 or status in {408, 429})):
        return None
    if status in {401, 403} or names & _LOCKED_OUT:
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if url.startswith("s3") else "the store's own"
        return InputError(f"{url}: no access ({told}); wants credentials that may: set {keys} in the environment")
    if status == 404 or isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "no such object, or no such bucket", url)
    if names & {"ValueError", "ParamValidationError"}:
        return InputError(f"{url}: {told}; wants a URL that its store can read; mend it")
    return OSError(f"{url}: {told}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from: a store may call missing what it could not ask for."""
    while error is not None:
        yield error
        error = error.__cause__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error, or what caused it, tells of."""
    for cause in _causes(error):
        response: Any = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            return cast("dict[str, Any]", response).get("ResponseMetadata", {}).get("HTTPStatusCode")
        for holder, name in ((cause, "status"), (cause, "status_code"), (cause, "code"), (response, "status_code")):
            if isinstance(found := getattr(holder, name, None), int):
                return found
    return None


def told_of(error: BaseException) -> str:
    """An error in one line, without what the environment keeps secret."""
    text = " ".join(str(error).split())
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET.search(name):
            text = text.replace(value, f"${name}")
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
