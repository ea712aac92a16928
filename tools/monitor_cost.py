#!/usr/bin/env python3
"""What TaperMonitor costs: the share of a training step that its hooks take, on the quickstart's model on the CPU.

tools/monitor_cost.py
"""

import argparse
import functools
import statistics
import tempfile
import time

import lightning as L
import torch

from taperlit import LanguageModel, TaperMonitor
from taperlit.callbacks import AlignmentFreeze, GateSchedule

SHAPE = dict(vocab_size=2048, block_size=256, n_layer=4, n_head=4, d_model=128, d_ff=384)
HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "_on_residual",
    "_on_logits",
)


class TimedMonitor(TaperMonitor):
    """TaperMonitor that adds up the time of its hooks, and of whole steps."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.hooks = self.steps = 0.0
        for name in HOOKS:
            setattr(self, name, self._timed(getattr(self, name)))

    def _timed(self, hook):
        @functools.wraps(hook)
        def wrapped(*args):
            start = time.perf_counter()
            if hook.__name__ == "on_train_batch_start":
                self.start = start
            result = hook(*args)
            end = time.perf_counter()
            self.hooks += end - start
            if hook.__name__ == "on_train_batch_end":
                self.steps += end - self.start
            return result

        return wrapped


def share(steps: int, directory: str) -> float:
    """Time in the monitor's hooks over time in steps, in one short run."""
    L.seed_everything(0, verbose=False)
    monitor = TimedMonitor(residual="model.final_norm", logits="model.head")
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=L.pytorch.loggers.TensorBoardLogger(directory),
        callbacks=[monitor, GateSchedule(0.2, 0.6), AlignmentFreeze()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    blocks = torch.randint(2048, (steps * 8, 257))
    trainer.fit(LanguageModel("small_1m", "internal", SHAPE), torch.utils.data.DataLoader(blocks, batch_size=8))
    return monitor.hooks / monitor.steps


def main() -> None:
    """Print the share and its spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="a multiple of the monitor's default interval, 50")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        shares = [share(args.steps, directory) for _ in range(args.rounds)]
    spread = f"{min(shares):.2%} to {max(shares):.2%}, {args.rounds} runs of {args.steps} steps"
    print(f"TaperMonitor takes {statistics.median(shares):.2%} of a step ({spread})")


if __name__ == "__main__":
    main()
