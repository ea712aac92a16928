"""A number of the optimizers' parameter groups, changed while a step is under way."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch


class ScaledInStep:
    """Multiplies a number of every group as an optimizer's step begins and puts it back as it ends.

    So no scheduler and no checkpoint sees it, and every optimizer that reads its groups in its step obeys.

    Args:
        key: of the number in a group, such as ``lr``.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._undo: list[Callable[[], None]] = []
        self._full: list[tuple[dict[str, Any], Any]] = []  # a group in a step under way, and its number

    def follow(self, trainer: L.Trainer, multiplier: Callable[[], float]) -> None:
        """Do so in every step from now on; ``multiplier`` is asked within the step, which is not counted yet."""
        self.release()

        def begin(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            self._scale(optimizer, multiplier())

        def end(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            self._restore()

        for optimizer in trainer.optimizers:
            self._undo += [
                optimizer.register_step_pre_hook(begin).remove,
                optimizer.register_step_post_hook(end).remove,
            ]

    def release(self) -> None:
        """Leave the optimizers alone, also in a step that an error ended."""
        self._restore()
        while self._undo:
            self._undo.pop()()

    def _scale(self, optimizer: torch.optim.Optimizer, factor: float) -> None:
        self._restore()
        if factor != 1:
            self._full = [(group, group[self.key]) for group in optimizer.param_groups if self.key in group]
            for group, number in self._full:
                group[self.key] = number * factor

    def _restore(self) -> None:
        while self._full:
            group, number = self._full.pop()
            group[self.key] = number
