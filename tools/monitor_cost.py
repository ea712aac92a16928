#!/usr/bin/env python3
"""What TaperMonitor costs: the share of training that its hooks take, on the quickstart's model on the CPU.

tools/monitor_cost.py
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable

import lightning as L
import torch

from taperlit import LanguageModel, TaperMonitor
from taperlit.callbacks import AlignmentFreeze, GateSchedule

SHAPE = dict(vocab_size=2048, block_size=256, n_layer=4, n_head=4, d_model=128, d_ff=384)


class Stopwatch(L.Callback):
    """Adds up the time of another callback's hooks, and of the training around them.

    Args:
        callback: whose hooks are timed.
        hooks: their names; those of one of its parts have a dot.
    """

    def __init__(self, callback: L.Callback, *hooks: str) -> None:
        self.spent = self.total = 0.0
        for hook in hooks:
            part, _, name = hook.rpartition(".")
            owner = getattr(callback, part) if part else callback
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, hook: Callable) -> Callable:
        @functools.wraps(hook)
        def wrapped(*args, **kwargs):
            start = time.perf_counter()
            result = hook(*args, **kwargs)
            self.spent += time.perf_counter() - start
            return result

        return wrapped

    def on_train_start(self, *_) -> None:
        """Start the clock, and forget what came before the first step."""
        self.spent, self.start = 0.0, time.perf_counter()

    def on_train_end(self, *_) -> None:
        """Stop the clock."""
        self.total = time.perf_counter() - self.start


def share(callback: L.Callback, hooks: tuple[str, ...], steps: int, directory: str, accumulate: int = 1) -> float:
    """Time in a callback's hooks over time in training, in one short run.

    Args:
        callback: of the run.
        hooks: names of those that are timed.
        steps: optimizer steps.
        directory: for the logger.
        accumulate: micro-batches of 8 blocks per step.
    """
    L.seed_everything(0, verbose=False)
    watch = Stopwatch(callback, *hooks)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        logger=L.pytorch.loggers.TensorBoardLogger(directory),
        callbacks=[callback, GateSchedule(0.2, 0.6), AlignmentFreeze(), watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    blocks = torch.randint(2048, (steps * accumulate * 8, 257))
    trainer.fit(LanguageModel("small_1m", "internal", SHAPE), torch.utils.data.DataLoader(blocks, batch_size=8))
    return watch.spent / watch.total


def report(name: str, shares: list[float], steps: int) -> str:
    """A line: the median share and its spread."""
    spread = f"{min(shares):.2%} to {max(shares):.2%}, {len(shares)} runs of {steps} steps"
    return f"{name} takes {statistics.median(shares):.2%} of training ({spread})"


def main() -> None:
    """Print the share and its spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="a multiple of the monitor's default interval, 50")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    hooks = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
    hooks += ("on_train_batch_end", "_on_residual", "_on_logits", "_radial._branch", "_radial._catch")
    with tempfile.TemporaryDirectory() as directory:
        shares = [
            share(
                TaperMonitor(residual="model.final_norm", logits="model.head"),
                hooks,
                args.steps,
                directory,
            )
            for _ in range(args.rounds)
        ]
    print(report("TaperMonitor", shares, args.steps))


if __name__ == "__main__":
    main()
