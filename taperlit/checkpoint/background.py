"""Checkpoints written while training goes on: a copy of the state in host memory, and one thread that writes it."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def host_copy(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy in host memory, which no later step changes.

    Tensors that share memory do so in the copy: a file of it has as many bytes.

    Args:
        checkpoint: dicts, lists and tuples of plain data and of tensors with memory of their own, on any device.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}  # by the original's id, as copy.deepcopy wants it

    def on_host(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone() if storage.device.type == "cpu" else storage.cpu()
        result = torch.empty(0, dtype=tensor.dtype)
        return result.set_(storages[storage.data_ptr()], tensor.storage_offset(), tensor.size(), tensor.stride())

    for leaf in tree_leaves(checkpoint):
        if isinstance(leaf, Tensor):
            copies[id(leaf)] = on_host(leaf.detach())
    return copy.deepcopy(checkpoint, copies)


def can_copy(checkpoint: dict[str, Any]) -> bool:
    """Whether all its tensors are plain ones, which :func:`host_copy` takes: no shards, no quantized ones."""
    tensors = (leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor))
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided for t in tensors)


class BackgroundWriter:
    """Does one piece of work at a time in a thread, and keeps its error until it is asked for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; what was begun before must have been waited for."""
        if self._thread is not None:
            raise RuntimeError("the work before is not waited for")

        def run() -> None:
            try:
                work()
            except Exception as error:  # told where the work is waited for
                self._error = error

        # A daemon: a process that is told to stop at once waits no longer than it means to.
        self._thread = threading.Thread(target=run, name="taperlit-checkpoint", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether an error waits to be raised."""
        return self._error is not None

    def wait(self, timeout: float | None = None) -> Exception | None:
        """Wait until nothing is under way.

        Args:
            timeout: the most seconds to wait; None is for ever.

        Returns:
            What went wrong, told once.
        """
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return None
        self._thread = None
        error, self._error = self._error, None
        return error
