"""Keep the random number generators with the checkpoint."""

import random
from functools import partial
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from taperlit.distributed import gather
from taperlit.training.lightning_compat import before_next_batch


class RngState(L.Callback):
    """Saves every process's generators (Python, NumPy, torch, the GPU) and restores them before a resumed run takes its
    first batch, so that it draws what the run would have drawn, from the data's augmentation to dropout.

    Augmentation goes on so where the data are loaded in the process itself (``num_workers=0``), by a loader with a
    length: workers have generators of their own, and without a length a batch is fetched before anything can be
    restored. A shuffling loader without a ``state_dict``, resumed within an epoch, draws a new order; the generators
    are restored after that, so that the steps' draws go on if the data make none. A run whose ``max_steps`` fell on an
    epoch's end that was not validated is given one batch more of that epoch by Lightning, if it goes on.

    On another number of processes the generators stay as seeded: there is no such run to agree with.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit's; what a checkpoint restores comes after this."""
        if stage == "fit":
            self._saved = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the generators when the first batch is fetched: only then will nothing else draw before it."""
        if self._saved is not None:
            before_next_batch(trainer, partial(_restore, self._saved, trainer))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore them here if an epoch's end was resumed and is done with: the next epoch makes its iterators now."""
        if self._saved is not None and not trainer.fit_loop.is_resuming:
            _restore(self._saved, trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Restore them once more if the data, in the midst of an epoch, have drawn a new order; then forget them."""
        saved, self._saved = self._saved, None
        if saved is not None and trainer.fit_loop.batch_idx > 0 and any(map(_begins_again, _loaders(trainer))):
            _restore(saved, trainer)

    def state_dict(self) -> dict[str, Any]:
        """The generators' states by rank; every process must ask."""
        name, keys, *rest = cast(tuple, np.random.get_state())
        mine = {
            "python": random.getstate(),
            "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }
        return {"ranks": gather(mine)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep this process's states until the first batch."""
        rank, world_size = _rank_of_process()
        if len(state_dict["ranks"]) == world_size:
            self._saved = state_dict["ranks"][rank]


def _restore(saved: dict[str, Any], trainer: L.Trainer) -> None:
    random.setstate(saved["python"])
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
    loop = trainer.fit_loop
    if loop.is_resuming and trainer.current_epoch > 0 and loop.batch_idx < 0:
        # A new epoch, whose iterators were made before; each that is torch's takes a number, says torch's manual.
        for loader in _loaders(trainer):
            if isinstance(loader, DataLoader) and loader.generator is None and not loader.persistent_workers:
                torch.empty((), dtype=torch.int64).random_()


def _loaders(trainer: L.Trainer) -> list[Any]:
    return CombinedLoader(trainer.train_dataloader).flattened


def _begins_again(loader: Any) -> bool:
    """Whether it cannot go on within an epoch, and draws an order from torch's default generator."""
    return getattr(getattr(loader, "sampler", None), "generator", 0) is None and not hasattr(loader, "load_state_dict")


def _rank_of_process() -> tuple[int, int]:
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
