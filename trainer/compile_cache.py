"""Where torch.compile keeps its code. Imports no torch."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from manta.data.storage.regular_file import make_own_directory

PREFIX = "manta-compiled-"


def use_own_compile_cache() -> None:
    """Have torch.compile keep its code where no other user can put any.

    By default that is a directory in the shared folder for temporary files, which anybody can make first. torch uses it as soon as
    DeepSpeed is imported: call this before.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder = Path(tempfile.gettempdir())
    for directory in (folder / f"{PREFIX}{os.geteuid()}", *sorted(folder.glob(f"{PREFIX}*"))):
        with suppress(OSError):  # it is another user's
            make_own_directory(directory)
            break
    else:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)
