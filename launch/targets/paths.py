"""Where a run reads and writes, by the config's keys: what has to be there for whoever runs it elsewhere."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from manta.data.storage.location import local_path
from manta.launch.config import RunConfig


def places(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Every place, a path or a URL, that a run's nodes share, with its key."""
    yield "run.dir", str(config.run.dir)
    for source in config.data.sources:
        path = source.path.removeprefix("hf:") if source.path.startswith("hf:/") and not source.path.startswith("hf://") else source.path
        if not path.startswith(("stdlib:", "hf:")):
            yield "data.sources", path
        if source.validation is not None:
            yield "data.sources", source.validation
    yield "data.directory", config.data.directory
    others = {
        "run.start_from": config.run.start_from,
        "tokenizer.file": config.tokenizer.file,
        "checkpoint.directory": config.checkpoint.directory,
    }
    yield from ((where, str(place)) for where, place in others.items() if place is not None)


def password_in(where: str, place: str, remedy: str) -> str | None:
    """What is wrong with a URL that has a password in it, which is not repeated."""
    if local_path(place) is not None or urlsplit(place).password is None:
        return None
    return f"{where}: got a password in a URL of {urlsplit(place).hostname}, wants none; {remedy}"
