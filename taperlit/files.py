"""Directories that appear whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from taperlit.errors import TaperlitError


def write_directory(directory: Path, fill: Callable[[Path], None], force: bool = False) -> Path:
    """Fill a directory aside, sync it, and rename it into place.

    Raises:
        TaperlitError: it exists and ``force`` is not set, or the disk refuses.
    """
    if directory.exists() and not force:
        raise TaperlitError(f"{directory} exists; name another directory or pass --force.")
    if directory.exists() and not directory.is_dir():
        raise TaperlitError(f"{directory} is a file; name a directory.")
    partial = directory.parent / f".{directory.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        fill(partial)
        for path in (*partial.rglob("*"), partial):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if directory.exists():
            old = directory.parent / f".{directory.name}.{os.getpid()}.old"
            directory.rename(old)
            partial.rename(directory)
            shutil.rmtree(old)
        else:
            partial.rename(directory)
    except OSError as error:
        raise TaperlitError(f"{directory} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory
