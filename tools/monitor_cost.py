#!/usr/bin/env python3
"""What TaperMonitor costs: training steps with and without it, in turns, on the quickstart's model.

tools/monitor_cost.py
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import lightning as L
import torch

from taperlit import LanguageModel, TaperMonitor
from taperlit.callbacks import AlignmentFreeze, GateSchedule

SHAPE = dict(vocab_size=2048, block_size=256, n_layer=4, n_head=4, d_model=128, d_ff=384)


class StepTimes(L.Callback):
    """Time of each optimizer step, data excluded."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_) -> None:
        """Stop."""
        self.times.append(time.perf_counter() - self.start)


def seconds(monitor: bool, steps: int, directory: str) -> float:
    """Total time of a short run."""
    L.seed_everything(0, verbose=False)
    times = StepTimes()
    callbacks: list[L.Callback] = [GateSchedule(0.2, 0.6), AlignmentFreeze()]
    if monitor:
        callbacks.append(TaperMonitor(residual="model.final_norm", logits="model.head"))
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=L.pytorch.loggers.TensorBoardLogger(directory),
        callbacks=[times, *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    blocks = torch.randint(2048, (steps * 8, 257))
    trainer.fit(LanguageModel("small_1m", "internal", SHAPE), torch.utils.data.DataLoader(blocks, batch_size=8))
    return sum(times.times)


def main() -> None:
    """Print the ratio and its spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="a multiple of the monitor's default interval, 50")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as directory:
        for round_ in range(args.rounds + 1):
            order = (False, True) if round_ % 2 else (True, False)
            spent = {monitor: seconds(monitor, args.steps, str(Path(directory))) for monitor in order}
            if round_:
                ratios.append(spent[True] / spent[False])
    print(f"step time with TaperMonitor / without: {statistics.median(ratios):.4f} "
          f"({min(ratios):.4f} to {max(ratios):.4f}, {args.rounds} rounds of {args.steps} steps)")  # fmt: skip


if __name__ == "__main__":
    main()
