"""Checkpoints from disk, read without executing code."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from taperlit.checkpoint.archive import check_zip
from taperlit.checkpoint.atomic import recover
from taperlit.checkpoint.plain import cannot_be_read, check_fields, check_file
from taperlit.checkpoint.sharded import (
    META,
    check_sharded,
    read_sharded,
    read_sharded_weights,
    tensors_of_sharded,
)
from taperlit.errors import TaperlitError

CHECKPOINT_FORMAT = 2  # raise it when a checkpoint's content changes so that older ones cannot be used

MEND = "use another one"


class _Content(TypedDict, total=False):
    """What readers take of a checkpoint as it is."""

    state_dict: dict[str, Any]
    hyper_parameters: dict[str, Any]
    taperlit: dict[str, Any]
    callbacks: dict[str, Any]
    TextDataModule: dict[str, Any]


class _Data(TypedDict, total=False):
    """What the data's part of it holds."""

    tokenizer: str | None
    sample: Tensor | None
    corpus: str
    seed: int
    global_batch: int


def open_checkpoint(path: str | Path, verify: bool = True) -> dict[str, Any]:
    """Look into a checkpoint of a ``LanguageModel``, executing nothing.

    Args:
        path: a file, or the directory of a sharded one.
        verify: read every byte and compare it with its checksum, which torch and Lightning do not.

    Returns:
        Of a file all that is in it, mapped from the disk; of a directory all but weights and optimizer.

    Raises:
        TaperlitError: missing, not to be read, truncated, damaged, no checkpoint, another program's, or another
            version's.
    """
    path = Path(path)
    try:
        recover(path)
        if not path.exists():
            raise TaperlitError(f"{path}: no such checkpoint.")
        is_folded = (path / "model.safetensors").exists()
    except OSError as error:
        raise cannot_be_read(path, error, MEND) from error
    if not path.is_dir():
        check_file(path, MEND)
    if path.suffix == ".safetensors" or is_folded:
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
    known = {key: value for key, value in checkpoint.items() if key in _Content.__annotations__}
    check_fields(known, _Content, path, "it", MEND)
    data = {key: value for key, value in known.get("TextDataModule", {}).items() if key in _Data.__annotations__}
    check_fields(data, _Data, path, "TextDataModule", MEND)
    sample = data.get("sample")
    if sample is not None and (sample.ndim != 2 or sample.is_floating_point() or not 1 <= len(sample) <= 64):
        raise TaperlitError(f"{path}: TextDataModule.sample is no few rows of tokens; {MEND}.")
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


def read_weights(
    path: str | Path, prefix: str, dtype: torch.dtype, ties: Iterable[Sequence[str]] = ()
) -> dict[str, Tensor]:
    """The weights in a checkpoint that was looked into, in memory once, executing nothing.

    Args:
        path: a file, or the directory of a sharded one.
        prefix: of the names that are wanted; it is taken off.
        dtype: of the floating tensors, whatever they are stored in.
        ties: names that are to have one tensor, which a sharded checkpoint holds once for each.

    Returns:
        The tensors by name.

    Raises:
        TaperlitError: unreadable, something else than a tensor, or tied names whose tensors differ.
    """
    path = Path(path)
    try:
        sizes = {name: size for name, (_, size) in _tensors(path).items() if name.startswith(prefix)}
        weights: dict[str, Tensor] = {}
        tied = [[prefix + name for name in names if prefix + name in sizes] for names in ties]
        for names in tied:
            first, *others = _some(path, names)
            if not all(torch.equal(first, other) for other in others):
                raise TaperlitError(f"{path}: {' and '.join(names)} differ, though its config ties them; use another.")
            weights |= dict.fromkeys(names, _own(first, dtype))
            del first, others
        for names in _parts({name: size for name, size in sizes.items() if name not in weights}):
            weights |= {name: _own(tensor, dtype) for name, tensor in zip(names, _some(path, names), strict=True)}
    except TaperlitError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def weight_shapes(path: str | Path, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in a checkpoint that was looked into, by name: those with a prefix, which is taken off.

    Raises:
        TaperlitError: unreadable.
    """
    path = Path(path)
    try:
        tensors = _tensors(path)
    except Exception as error:
        raise _unreadable(path, error) from error
    return {name.removeprefix(prefix): shape for name, (shape, _) in tensors.items() if name.startswith(prefix)}


def _tensors(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """The shape and the bytes of each tensor in a checkpoint's state dict."""
    if path.is_dir():
        return tensors_of_sharded(path)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    return {name: (tuple(getattr(tensor, "shape", ())), getattr(tensor, "nbytes", 0)) for name, tensor in state.items()}


def _parts(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names in lots of about a sixteenth of all bytes: so much is in memory twice while it is copied."""
    most = sum(sizes.values()) / 16
    lot: list[str] = []
    held = 0
    for name, size in sizes.items():
        lot.append(name)
        held += size
        if held > most:
            yield lot
            lot, held = [], 0
    yield lot


def _some(path: Path, names: list[str]) -> Iterator[Tensor]:
    """Some tensors of a checkpoint's state dict.

    A file is mapped anew for them: the pages of a mapping that were read count as memory until it is gone.
    """
    if path.is_dir():
        state = read_sharded_weights(path, names)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    for name in names:
        tensor = state.pop(name)
        if not isinstance(tensor, Tensor):
            raise TaperlitError(f"{path} holds no tensor for {name}; use another one.")
        yield tensor


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in memory of its own."""
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


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
    if isinstance(error, OSError) and error.strerror:
        return cannot_be_read(path, error, MEND)
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return TaperlitError(f"{path} is truncated, damaged or not a checkpoint ({reason}); use another one.")
