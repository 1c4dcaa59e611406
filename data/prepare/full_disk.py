"""What a preparation reports when the disk or the store fails: what is full, and how much space it still needs."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable

from pydantic import ValidationError

from manta.data.errors import DataError, InputError, one_line
from manta.data.prepare.encode import SplitTask, record_file
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.data.shards.manifest import SplitRecord

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FILES = 7  # of a split: two shards of two files each, their documents' positions, and its record


def disk_error(error: OSError, path: str, needed: int = 0, files: int = 0) -> DataError:
    """Return an error of a disk in one line. needed: bytes that are still to be written. files: their number."""
    place = str(error.filename or path)
    if error.errno not in _FULL:
        return DataError(f"{place}: {error.strerror or one_line(error)}. Once that is fixed, the same command resumes.")
    disk = path if os.path.isdir(path) else tempfile.gettempdir()  # noqa: PTH112  files for a store are written there first
    inodes = os.statvfs(disk)
    if inodes.f_files and inodes.f_favail < _FILES:  # the temporary files of a split that failed are deleted by now
        problem = f"no inodes are left: expected room for {max(files, 1):,} more files"
    else:
        free = "none" if error.errno == errno.EDQUOT else f"{shutil.disk_usage(disk).free / 1e6:,.1f} MB"
        problem = f"{os.strerror(error.errno or 0)}: expected room for about {max(needed / 1e6, 0.1):,.1f} MB more, got {free}"
    return DataError(f"{place}: {problem}. Make room, or set another data.directory; the same command resumes.")


def space_needed(directory: CorpusDirectory, tasks: Iterable[SplitTask]) -> tuple[int, int]:
    """Return about how many bytes the splits without a record take, in proportion to those that have one, and how many files."""
    read, written, remaining, files = 0, 0, 0, 0
    for task in tasks:
        try:
            record = SplitRecord.model_validate_json(directory.read(record_file(task.index)))
        except (OSError, ValidationError, InputError):
            remaining, files = remaining + task.split.size, files + _FILES
        else:
            read, written = read + task.split.size, written + sum(shard.bin_bytes + shard.idx_bytes for shard in record.shards())
    return int(remaining * (written / read if read else 1)), files
