"""Where torch.compile keeps its code. Imports no torch."""

import logging
import os
import tempfile
from pathlib import Path

from manta.data.storage.regular_file import make_own_directory

log = logging.getLogger(__name__)


def use_own_compile_cache() -> None:
    """Have torch.compile keep its code where no other user can put any.

    By default that is a directory in the shared folder for temporary files, which anybody can make first. torch uses it as soon as
    DeepSpeed is imported: call this before.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    directory = Path(tempfile.gettempdir()) / f"manta-compiled-{os.geteuid()}"
    try:
        make_own_directory(directory)
    except OSError as error:
        log.warning("%s: %s; compiled code is not kept for the next start", directory, error.strerror)
        directory = Path(tempfile.mkdtemp(prefix="manta-compiled-"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)
