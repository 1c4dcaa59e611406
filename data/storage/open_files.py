"""How many files a process maps at a time. Each holds a descriptor, for every shard of every source that it reads."""

import resource
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from typing import ParamSpec, TypeVar

_MAX_MAPPED = 4096  # the kernel allows 65,530 mappings

_release: list[Callable[[], None]] = []

P = ParamSpec("P")
T = TypeVar("T")


@cache
def max_mapped() -> int:
    """Return how many files one of the caches of this process may hold. Raises its limit of open files (ulimit -n) to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _MAX_MAPPED if hard == resource.RLIM_INFINITY else max(8, min(hard // 8, _MAX_MAPPED))


def cache_maps(function: Callable[P, T]) -> Callable[P, T]:
    """Keep the most recent results of a function that maps files."""
    cached = cache(lambda: lru_cache(max_mapped())(function))
    _release.append(lambda: cached().cache_clear())

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return cached()(*args, **kwargs)

    return call


def release_maps() -> None:
    """Unmap all files that are not in use."""
    for release in _release:
        release()
