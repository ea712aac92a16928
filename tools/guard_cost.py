#!/usr/bin/env python3
"""What FiniteGuard costs: the share of training that its hooks take, on the quickstart's model on the CPU.

tools/guard_cost.py
"""

import argparse
import tempfile

from monitor_cost import report, share

from taperlit.callbacks import FiniteGuard

HOOKS = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step")


def main() -> None:
    """Print the share and its spread, without and with gradient accumulation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for accumulate in (1, 4):
            shares = [share(FiniteGuard(), HOOKS, args.steps, directory, accumulate) for _ in range(args.rounds)]
            print(f"{accumulate} micro-batches per step: {report('FiniteGuard', shares, args.steps)}")


if __name__ == "__main__":
    main()
