"""Locations that a run reads and writes, and whether the nodes of a target can use them."""

from collections.abc import Iterator
from os.path import normpath
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from manta.data.storage.location import local_path
from manta.launch.config import RunConfig


def shared_locations(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the config key and the path or URL of everything that all nodes must see."""
    yield "run.dir", str(config.run.dir)
    for source in config.data.sources:
        path = source.path.removeprefix("hf:") if source.path.startswith("hf:/") and not source.path.startswith("hf://") else source.path
        if not path.startswith(("stdlib:", "hf:")):
            yield "data.sources", path
        if source.validation is not None:
            yield "data.sources", source.validation
    yield "data.directory", config.data.directory
    optional = {
        "run.start_from": config.run.start_from,
        "tokenizer.file": config.tokenizer.file,
        "checkpoint.directory": config.checkpoint.directory,
    }
    yield from ((key, str(location)) for key, location in optional.items() if location is not None)


def location_problems(config: RunConfig, *, root: str, expected: str, remedy: str, url_remedy: str) -> Iterator[str]:
    """Yield an error for each path that is not below `root`, and for each URL with a password, which is not repeated."""
    for key, location in shared_locations(config):
        if local_path(location) is None:
            url = urlsplit(location)
            if url.password is not None:
                yield f"{key}: expected a URL without a password, got one for {url.hostname}. {url_remedy}"
        elif PurePosixPath(root) not in PurePosixPath(normpath(location)).parents:
            or_url = "" if key == "run.dir" else ", or a URL such as s3://bucket/mine"
            yield f"{key}: expected {expected}{or_url}, got {location}. {remedy}"
