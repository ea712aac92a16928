"""Act right after every optimizer step."""

from collections.abc import Callable
from typing import Any

import lightning as L


def after_each_step(trainer: L.Trainer, act: Callable[[], None]) -> Callable[[], None]:
    """Call ``act`` after each step of every optimizer, before anybody sees the weights that it made.

    Lightning has no hook there: ``on_train_batch_end`` comes to one callback after another, and, with manual
    optimization, after several steps. While ``act`` runs, ``trainer.global_step`` does not count the step yet.

    Args:
        trainer: whose optimizers have been made.
        act: what to do.

    Returns:
        What ends it.
    """

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        act()

    handles = [optimizer.register_step_post_hook(hook) for optimizer in trainer.optimizers]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end
