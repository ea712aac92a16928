"""Checkpoints from disk, read without executing code."""

from pathlib import Path
from typing import Any

import torch

from taperlit.checkpoint.atomic import recover
from taperlit.checkpoint.sharded import META, check_sharded, check_zip, read_sharded
from taperlit.errors import TaperlitError

CHECKPOINT_FORMAT = 1  # raise it when a checkpoint's content changes so that older ones cannot be used


def open_checkpoint(path: str | Path, verify: bool = True) -> dict[str, Any]:
    """Look into a checkpoint of a ``LanguageModel``, executing nothing.

    Args:
        path: a file, or the directory of a sharded one.
        verify: read every byte and compare it with its checksum, which torch and Lightning do not.

    Returns:
        Of a file all that is in it, mapped from the disk; of a directory all but weights and optimizer.

    Raises:
        TaperlitError: missing, truncated, damaged, no checkpoint, another program's, or another version's.
    """
    path = Path(path)
    recover(path)
    if not path.exists():
        raise TaperlitError(f"{path}: no such checkpoint.")
    if path.suffix == ".safetensors" or (path / "model.safetensors").exists():
        raise TaperlitError(f"{path} is a folded model, not a checkpoint; name the .ckpt that it was folded from.")
    if path.is_dir() and not (path / META).exists():
        raise TaperlitError(f"{path} is a directory without a checkpoint's {META}; name the .ckpt in it.")
    try:
        if path.is_dir():
            if verify:
                check_sharded(path)
            checkpoint = torch.load(path / META, map_location="cpu", weights_only=True)
        else:
            if verify:
                check_zip(path)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen kinds, by where the damage is
        raise _unreadable(path, error) from error
    keys = checkpoint.keys() if isinstance(checkpoint, dict) else ()
    if "hyper_parameters" not in keys or (path.is_file() and "state_dict" not in keys):
        raise TaperlitError(f"{path} is not a checkpoint of `taperlit fit`; use the last.ckpt that it wrote.")
    written = checkpoint.get("taperlit")
    number = written.get("format") if isinstance(written, dict) else 0
    if number != CHECKPOINT_FORMAT:
        which = "a newer" if isinstance(number, int) and number > CHECKPOINT_FORMAT else "an older"
        raise TaperlitError(f"{path} was written by {which} taperlit; use that version, or train again.")
    return checkpoint


def read_checkpoint(path: str | Path, optimizer: bool = True) -> dict[str, Any]:
    """A checkpoint of a ``LanguageModel`` as a run on one process writes it, executing nothing.

    Args:
        path: a file, or the directory of a sharded one.
        optimizer: read its states too.

    Raises:
        TaperlitError: as :func:`open_checkpoint`.
    """
    checkpoint = open_checkpoint(path)
    return load_whole(path, optimizer) if Path(path).is_dir() else checkpoint


def load_whole(path: str | Path, optimizer: bool = True) -> dict[str, Any]:
    """Any Lightning checkpoint, file or sharded directory, in memory and on the CPU, executing nothing.

    Raises:
        TaperlitError: missing or unreadable.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return read_sharded(path, optimizer)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> TaperlitError:
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return TaperlitError(f"{path} is truncated, damaged or not a checkpoint ({reason}); use another one.")
