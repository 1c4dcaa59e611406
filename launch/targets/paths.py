"""Locations that a run reads and writes, and whether the nodes of a target can use them."""

import re
from collections.abc import Iterator
from os.path import normpath
from pathlib import PurePosixPath

from manta.data.storage.location import local_path
from manta.launch.config import RunConfig


def location_problems(config: RunConfig, *, root: str, expected: str, remedy: str) -> Iterator[str]:
    """Yield an error for each path that is not below `root`: all nodes must see these locations."""
    sources = [location for source in config.data.sources for location in (source.path, source.validation)]
    optional = {
        "run.start_from": config.run.start_from,
        "tokenizer.file": config.tokenizer.file,
        "checkpoint.directory": config.checkpoint.directory,
    }
    locations = [("run.dir", config.run.dir), *(("data.sources", location) for location in sources)]
    for key, value in [*locations, ("data.directory", config.data.directory), *optional.items()]:
        location = re.sub("^hf:(?=/[^/])", "", str(value))  # hf:/local/dir
        if value is None or location.startswith(("stdlib:", "hf:")):
            continue
        if local_path(location) is not None and PurePosixPath(root) not in PurePosixPath(normpath(location)).parents:
            or_url = "" if key == "run.dir" else ", or a URL such as s3://bucket/mine"
            yield f"{key}: expected {expected}{or_url}, got {location}. {remedy}"
