"""One interface to files on a local disk or in an object store. Corpora and checkpoints are read and written through it.

`LocalStore` describes the methods, and `RemoteStore` has the same ones. Methods that read raise FileNotFoundError if there is no such file,
InputError if the user has to fix something (no access, an unknown scheme), and OSError if the disk or the store fails.
"""

from pathlib import Path

from manta.data.storage.local import LocalStore
from manta.data.storage.location import local_path
from manta.data.storage.remote import RemoteStore

Store = LocalStore | RemoteStore


def open_store(location: str | Path) -> Store:
    """Return the store of a path or URL. Nothing is checked yet."""
    path = local_path(str(location))
    return RemoteStore(str(location)) if path is None else LocalStore(path)
