"""Bound how much more a matrix writes to the residual stream in one direction than in others."""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from torch import nn
from torch.distributed.tensor import DTensor

from taperlit.callbacks.after_step import after_each_step
from taperlit.callbacks.plan import find_boundary, forget_plan
from taperlit.errors import TaperlitError
from taperlit.norm import plain_name
from taperlit.ranges import require_range, require_steps
from taperlit.static import cap_singular_values

WRITERS = ("*.o_proj", "*.down_proj", "*.c_proj")
"""The maps that write to the stream in our Transformer, the Llama family, GPT-2 and StarCoder2."""


class BoundedWrites(L.Callback):
    """Caps the singular values of the matrices that write to the residual stream, from the boundary on.

    Without norms a token that is larger than the others, or lies in a direction that a matrix writes strongly, is
    passed on as it is, layer after layer. After every optimizer step each matrix's singular values are capped at
    ``multiple`` times their root mean square (:func:`taperlit.static.cap_singular_values`), so that for a given size of
    a matrix's input no direction is written more than that many times as strongly as a typical one. It bounds the
    linear maps alone: what an MLP's activation makes of a large token is the ``mlp`` of
    :class:`taperlit.TransformerConfig`.

    Per matrix and step it takes an eigendecomposition of (d_model, d_model) and two products of the weight's size. The
    weights are saved as any, and a resumed run is the unbroken one. It works beside DDP.

    Example::

        Trainer(callbacks=[GateSchedule(), AlignmentFreeze(), BoundedWrites(multiple=2.5)])

    Args:
        multiple: of the root mean square of a matrix's singular values, above 1.
        at: begin after this many steps (int) or fraction of ``max_steps`` (float); None is the end of the
            GateSchedule's warm-up.
        names: glob patterns over module names, all of which match some; None is ``o_proj``, ``down_proj`` and
            ``c_proj``, whichever there are.

    Raises:
        TaperlitError: a value out of its range; before the first step, if the boundary is unknown, a pattern matches no
            module, or one that matches has no matrix or one that is sharded or not trained; in a step, if a weight is
            not finite.
    """

    def __init__(
        self, multiple: float = 2.5, at: int | float | None = None, names: Sequence[str] | None = None
    ) -> None:
        require_range("BoundedWrites.multiple", multiple, above=1)
        require_steps("BoundedWrites.at", at, least=1)
        if isinstance(names, str) or (names is not None and not names):
            raise TaperlitError(f"BoundedWrites.names is {names!r}; give a list of patterns, or None.")
        self.multiple, self.at, self.names = multiple, at, names
        self._undo: list[Callable[[], None]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of an earlier fit."""
        if stage == "fit":
            self._release()
            forget_plan(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the matrices."""
        self._find(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the matrices as the strategy has made them, find the boundary, and follow the optimizers."""
        modules = self._find(pl_module)
        for name, module in modules.items():
            weight = module._parameters.get("weight")  # not one that is computed, as by a parametrization
            if isinstance(weight, DTensor) or weight is None or weight.dim() != 2 or not weight.requires_grad:
                raise TaperlitError(
                    f"BoundedWrites would change the weight of {plain_name(name)}, which is computed, no matrix, "
                    "sharded, or not trained; run it on whole weights that are all trained (one process or DDP, no "
                    "LoRA), or leave it out."
                )
        boundary = find_boundary(trainer, pl_module, self.at, "BoundedWrites")

        def act() -> None:
            # The step is counted after its optimizer's hooks.
            if trainer.global_step >= boundary.step:
                for name, module in modules.items():
                    try:
                        cap_singular_values(module.weight.detach(), self.multiple)
                    except TaperlitError as error:
                        raise TaperlitError(f"BoundedWrites at {plain_name(name)}: {error}") from error

        self._undo = [after_each_step(trainer, act)]

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the optimizers alone."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the optimizers alone after an error too: Lightning calls no teardown then."""
        self._release()

    def _find(self, pl_module: nn.Module) -> dict[str, Any]:
        """The modules by name, those of one weight once."""
        patterns = WRITERS if self.names is None else self.names
        found: dict[str, Any] = {}
        unmatched = []
        for pattern in patterns:
            matching = {n: m for n, m in pl_module.named_modules() if fnmatch.fnmatchcase(plain_name(n), pattern)}
            unmatched += [] if matching else [pattern]
            found |= matching
        if not found or (unmatched and self.names is not None):
            raise TaperlitError(
                f"BoundedWrites finds no module {' or '.join(unmatched)} in {type(pl_module).__name__}; give the names "
                "of the maps that write to the residual stream, BoundedWrites(names=[...])."
            )
        weights = {id(getattr(module, "weight", module)): name for name, module in found.items()}
        return {name: found[name] for name in weights.values()}
