"""Token embeddings whose rows have one norm."""

from collections.abc import Callable
from typing import Any

import lightning as L
from torch import nn

from taperlit.callbacks.after_step import after_each_step
from taperlit.callbacks.submodule import named_module
from taperlit.errors import TaperlitError
from taperlit.norm import plain_name
from taperlit.static import equalize_rows


class EqualRows(L.Callback):
    """Keeps the rows of the token embedding at one norm, the mean of theirs, after every optimizer step.

    Where positions are rotary the first block's norm is given nothing but a row of the embedding, so that with equal
    norms its linear branch fits every token with one scalar, and no token begins larger than the others. The common
    norm goes where the optimizer takes the mean; see :func:`taperlit.static.equalize_rows`. Beside learned positions,
    which are added to the row, the inputs are not quite equal.

    A tied head has the same rows: every logit is then at most the common norm times that of the last hidden state, and
    no token can be preferred by a longer row, only by its direction.

    It is meant for training from scratch, where rows begin nearly equal; in a pretrained model the first step changes
    what the first block is given. The weight is saved as any, and a resumed run is the unbroken one. It works beside
    DDP, FSDP2 and tensor parallelism.

    Example::

        Trainer(callbacks=[GateSchedule(), AlignmentFreeze(), EqualRows("model.tok_embed")])

    Args:
        module: name of the embedding; None is the only ``nn.Embedding`` that there is.

    Raises:
        TaperlitError: before the first step, if there is no such module or several, it is no embedding, or its weight
            is not trained or is FSDP version 1's.
    """

    def __init__(self, module: str | None = None) -> None:
        self.module = module
        self._undo: list[Callable[[], None]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of an earlier fit."""
        self._release()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the embedding."""
        self._find(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the weight as the strategy has made it, and follow the optimizers."""
        name, module = self._find(pl_module)
        weight = module._parameters.get("weight")  # not one that is computed, as by a parametrization
        if weight is None or weight.dim() != 2 or not weight.requires_grad:
            raise TaperlitError(
                f"EqualRows would change the rows of {plain_name(name)}, which are computed, flattened by FSDP, or not "
                "trained; use FSDP2 (ModelParallelStrategy) and train the embedding itself, or leave EqualRows out."
            )
        self._undo = [after_each_step(trainer, lambda: equalize_rows(module.weight.detach()))]

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the optimizers alone."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the optimizers alone after an error too: Lightning calls no teardown then."""
        self._release()

    def _find(self, pl_module: L.LightningModule) -> tuple[str, nn.Embedding]:
        name = self.module
        if name is None:
            found = {id(m): n for n, m in pl_module.named_modules() if isinstance(m, nn.Embedding)}
            if len(found) != 1:
                raise TaperlitError(
                    f"EqualRows finds {len(found)} embeddings in {type(pl_module).__name__}"
                    f"{': ' if found else ''}{', '.join(map(plain_name, found.values()))}; name one, "
                    "EqualRows(module=...)."
                )
            (name,) = found.values()
        module: Any = named_module(pl_module, name, "EqualRows")
        if not isinstance(module, nn.Embedding):
            raise TaperlitError(
                f"EqualRows was given {name}, which is a {type(module).__name__}; name an nn.Embedding."
            )
        return name, module
