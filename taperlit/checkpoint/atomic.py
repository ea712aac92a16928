"""Files and directories that appear whole or not at all, and never cost what was there before."""

import glob
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from taperlit.errors import TaperlitError

_own: set[Path] = set()  # what this process may have aside


def named(path: str | Path) -> Path:
    """A path whose last part is a name: as it is, or in full where it ends in "." or "..".

    Raises:
        TaperlitError: the disk's root, which has none.
    """
    path = Path(path)
    if path.name in ("", ".."):
        path = path.resolve()
    if not path.name:
        raise TaperlitError(f"{path} is the root of all folders; name another.")
    return path


def require_apart(source: Path, target: Path) -> None:
    """Refuse to replace what is read.

    Raises:
        TaperlitError: the target is the source, or a folder that holds it.
    """
    whole = source.resolve()
    if target.resolve() in (whole, *whole.parents):
        raise TaperlitError(f"{target} is or holds {source}, which would be lost; name another --out.")


def aside(path: Path, kind: str) -> Path:
    """A hidden name beside a path."""
    path = named(path)
    return path.with_name(f".{path.name}.{kind}")


def aside_of_this_process(path: Path) -> Path:
    """A hidden name beside a path that no other process takes; what killed processes left under theirs is removed.

    The name has the machine's, since processes of another one that shares the disk cannot be asked after.
    """
    host = socket.gethostname()
    start = f".{path.name}.{host}."
    for left in path.parent.glob(f"{glob.escape(start)}*.partial"):
        number = left.name.removeprefix(start).removesuffix(".partial")
        if number.isdigit() and int(number) != os.getpid() and not _runs(int(number)):
            remove(left)
    own = aside(path, f"{host}.{os.getpid()}.partial")
    _own.add(own)
    return own


def remove_own_asides() -> None:
    """Remove what this process has aside, before it ends without unwinding."""
    for path in _own:
        remove(path)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(partial: Path, target: Path) -> None:
    """Put a file or directory that was written aside safely on disk, then give it its name.

    One file replaces another in one step. Where a directory is involved, that takes two; a process killed between them
    leaves the old one under ``aside(target, "old")``, whence :func:`recover` takes it back.

    Raises:
        OSError: the disk refuses; what was at ``target`` stays.
    """
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    if target.exists() and (target.is_dir() or partial.is_dir()):
        old = aside(target, "old")
        remove(old)
        target.rename(old)
        partial.rename(target)
        _sync(target.parent)
        remove(old)
    else:
        partial.replace(target)
        _sync(target.parent)


def stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written anew or another takes its place: inode, size in bytes and time in ns.

    Raises:
        OSError: it is not there.
    """
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def recover(target: Path) -> None:
    """Undo the first half of a :func:`commit` that was killed before its second."""
    old = aside(target, "old")
    if old.exists() and not target.exists():
        old.rename(target)


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file aside, sync it, and rename it into place, where it takes the place of one that is there.

    Args:
        path: of the file, in a directory that exists.
        fill: writes to the path that it is given.

    Raises:
        TaperlitError: it is a folder, or the disk refuses; what was at ``path`` stays.
    """
    try:
        if path.is_dir():
            raise TaperlitError(f"{path} is a folder; name a file.")
        partial = aside_of_this_process(path)
        try:
            fill(partial)
            commit(partial, path)
        finally:
            remove(partial)
    except OSError as error:
        raise TaperlitError(f"{path} cannot be written: {error.strerror or error}.") from error


def write_directory(directory: Path, fill: Callable[[Path], None], force: bool = False) -> Path:
    """Fill a directory aside, sync it, and rename it into place.

    Raises:
        TaperlitError: it exists and ``force`` is not set, or the disk refuses.
    """
    directory = named(directory)
    recover(directory)
    if directory.exists() and not force:
        raise TaperlitError(f"{directory} exists; name another directory or pass --force.")
    if directory.exists() and not directory.is_dir():
        raise TaperlitError(f"{directory} is a file; name a directory.")
    partial = aside_of_this_process(directory)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        commit(partial, directory)
    except OSError as error:
        raise TaperlitError(f"{directory} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory
