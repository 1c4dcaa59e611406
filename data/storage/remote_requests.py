"""Requests to any store that fsspec knows (s3://, gs://, abfs://, https://, hf://, …), with retries and with errors in common.

A request is retried, after fixed waits that double, if a connection breaks or times out, or if the store is unavailable (5xx, 429).

| error | raised if |
|---|---|
| `FileNotFoundError` | the object or the bucket is missing |
| `InputError` | the user has to fix it: an unknown scheme, a missing package, no access |
| `OSError` | the last of `TRIES` tries failed, or the store reports another error |

Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, … as each store's own library reads them). Messages do not show
them, and URLs must not hold any. Processes may fork: a child opens its own connections.
"""

import errno
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from manta.data.errors import InputError

log = logging.getLogger(__name__)

TRIES = 5
WAIT = 0.2  # seconds before the second try; doubles before each further one

# We count the tries, the library must not; two parts at a time, each of 50 MB and more.
_S3_OPTIONS: dict[str, Any] = {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 1}}, "max_concurrency": 2}
# The libraries' errors have no common base, and a library may not be installed: they are recognized by name.
_BROKEN = (
    {"ConnectionError", "TimeoutError", "IncompleteRead", "IncompleteReadError"}  # Python's own, and others with the same names
    | {"HTTPClientError", "FlexibleChecksumError", "ResponseParserError"}  # botocore
    | {"ClientConnectionError", "ClientPayloadError"}  # aiohttp
    | {"TransportError", "ServiceRequestError", "ServiceResponseError"}  # Google's and Azure's
)
_LOCKED_OUT = {"PermissionError", "NoCredentialsError", "PartialCredentialsError", "ClientAuthenticationError", "DefaultCredentialsError"}
_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", re.IGNORECASE)

T = TypeVar("T")


def request(url: str, action: Callable[[Any], T]) -> T:
    """Return the result of an action on the URL's file system, with retries."""
    system = _file_system(url)
    for attempt in range(1, TRIES + 1):
        try:
            return action(system)
        except Exception as error:  # noqa: BLE001  each store's library has its own errors
            message = _describe(error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error)
            final = _translate(url, error, message)
            if final is None and attempt == TRIES:
                final = OSError(f"{url}: {TRIES} tries failed, the last with {message}")
            if final is not None:
                raise final from None
            wait = WAIT * 2 ** (attempt - 1)
            log.warning("%s: try %d of %d failed with %s; the next in %.1f s", url, attempt, TRIES, message, wait)
            time.sleep(wait)
    raise AssertionError("the last try has returned or raised")


def _file_system(url: str) -> Any:
    """Return the URL's file system. fsspec caches one per process; a forked child makes its own."""
    import fsspec  # takes tenths of a second, with its dependencies

    scheme = url.partition("://")[0].lower()
    is_s3 = scheme in {"s3", "s3a"}
    if urlsplit(url).password:
        raise InputError(f"{scheme}://…@{urlsplit(url).hostname}: expected no password in the URL. Put it into the environment.")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        remedy = "pip install 'manta[s3]'" if is_s3 else str(error)
        raise InputError(f"{url}: the package for {scheme}:// is not installed; {remedy}") from None
    except ValueError:
        raise InputError(f"{url}: expected a scheme that fsspec knows, such as s3://, got {scheme}://. Change it.") from None
    try:
        system, _ = fsspec.url_to_fs(url, **(_S3_OPTIONS if is_s3 else {}))
    except (ValueError, TypeError) as error:
        remedy = f"Check the URL, and the environment's settings for {scheme}://."
        raise InputError(f"{url}: cannot be opened ({_describe(error)}). {remedy}") from None
    if is_s3:
        system.retries = 1
    return system


def _translate(url: str, error: Exception, message: str) -> Exception | None:
    """Return the error to raise instead, or None if a retry may help."""
    if isinstance(error, InputError):
        return error
    status = http_status(error)
    names = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    if names & _BROKEN or (status is not None and (status >= 500 or status in {408, 429})):
        return None
    if status in {401, 403} or names & _LOCKED_OUT:
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if url.startswith("s3") else "the store's own"
        return InputError(f"{url}: no access ({message}). Set {keys} in the environment, for a user with access.")
    if status == 404 or isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "no such object, or no such bucket", url)
    if names & {"ValueError", "ParamValidationError"}:
        return InputError(f"{url}: expected a URL that its store can read, got {message}. Fix the URL.")
    return OSError(f"{url}: {message}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the chain of its causes: a store may report as missing what it could not request."""
    while error is not None:
        yield error
        error = error.__cause__


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error or one of its causes carries."""
    for cause in _causes(error):
        response: Any = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            return cast("dict[str, Any]", response).get("ResponseMetadata", {}).get("HTTPStatusCode")
        for holder, name in ((cause, "status"), (cause, "status_code"), (cause, "code"), (response, "status_code")):
            if isinstance(found := getattr(holder, name, None), int):
                return found
    return None


def _describe(error: BaseException) -> str:
    """Return an error in one line, without the environment's secrets."""
    text = " ".join(str(error).split())
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET.search(name):
            text = text.replace(value, f"${name}")
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _reset_the_parents_loop() -> None:
    """A forked child lacks the thread that ran the loop. Newer releases of fsspec do this themselves."""
    if asyn := sys.modules.get("fsspec.asyn"):
        asyn.reset_lock()


os.register_at_fork(after_in_child=_reset_the_parents_loop)
