"""What DyT and Derf need at the widths of these experiments."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from taperlit.baselines.embedding_scale import ScaledEmbedding


class FirstEmbeddingScale(Callback):
    """Set the learnable scalar after the embedding before the first step, once.

    Args:
        scale: in the place of ``sqrt(d_model)``.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self._done = False

    @torch.no_grad()
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set it, unless the run that goes on has done it before its checkpoint."""
        if not self._done:
            for module in pl_module.modules():
                if isinstance(module, ScaledEmbedding):
                    module.scale.fill_(self.scale)
        self._done = True

    def state_dict(self) -> dict[str, Any]:
        """Whether it is done."""
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Whether it was."""
        self._done = state_dict["done"]
