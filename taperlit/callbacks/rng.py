"""Keep the random number generators with the checkpoint."""

import random
from typing import Any, cast

import lightning as L
import numpy as np
import torch

from taperlit.distributed import gather


class RngState(L.Callback):
    """Saves every process's generators (Python, NumPy, torch, the GPU) and restores them before a resumed run's first
    step, so that it draws what the run would have drawn, from dropout to augmentation.

    On another number of processes the generators stay as seeded: there is no such run to agree with.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit's; what a checkpoint restores comes after this."""
        if stage == "fit":
            self._saved = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Restore the generators, once per fit: only now will nothing else draw before the step."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        random.setstate(saved["python"])
        name, keys, *rest = saved["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(saved["torch"])
        if saved["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["cuda"])

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
        """Keep this process's states until the first step."""
        rank, world_size = _rank_of_process()
        if len(state_dict["ranks"]) == world_size:
            self._saved = state_dict["ranks"][rank]


def _rank_of_process() -> tuple[int, int]:
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
