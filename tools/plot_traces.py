#!/usr/bin/env python3
"""Draw a run's taper traces from its event files or metrics.csv.

tools/plot_traces.py runs/quickstart/version_0 docs/traces.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from taperlit.report.traces import read_traces


def main() -> None:
    """Draw four panels: gate, alignment scalars, scales, losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    logged = read_traces(args.run)
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), sharex=True, layout="constrained")

    def draw(axis, tag, label=None, **style):
        if tag in logged:
            axis.plot(*zip(*logged[tag], strict=True), label=label, **style)

    draw(axes[0, 0], "taper/gate")
    axes[0, 0].set_title("gate g")
    scalar_tags = [tag for tag in logged if tag.startswith("taper/alignment/")]
    for index, tag in enumerate(scalar_tags):
        name = tag.removeprefix("taper/alignment/").removeprefix("model.")
        draw(axes[0, 1], tag, name, color=plt.cm.viridis(index / max(1, len(scalar_tags) - 1)))
    axes[0, 1].set_yscale("log")
    axes[0, 1].set_title("alignment scalar c of every layer")
    axes[0, 1].legend(fontsize=6, ncols=2)
    draw(axes[1, 0], "taper/pre_logit_rms", "pre-logit RMS")
    draw(axes[1, 0], "taper/logit_norm", "logit norm")
    axes[1, 0].set_yscale("log")
    axes[1, 0].set_title("scales")
    axes[1, 0].legend(fontsize=8)
    draw(axes[1, 1], "train/loss", "train")
    draw(axes[1, 1], "val/loss", "validation", marker="o")
    axes[1, 1].set_title("loss")
    axes[1, 1].legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("optimizer step")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
