#!/usr/bin/env python3
"""Train one config under several taper overlays and seeds, and print each overlay's final validation loss.

    tools/compare_taper.py --overlays baseline internal_aux internal_aux+paper --seeds 0 1 2

Every run of a seed has the same steps and data order, and of one shape the same initial weights. The table goes to
--out, as Markdown.
"""

import argparse
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import lightning
import torch
from traces import last_run, scalars

ROOT = Path(__file__).resolve().parent.parent


def final_loss(config: str, overlay: str, seed: int, runs: Path, extra: list[str]) -> float:
    """Train once under an overlay, or several joined by "+"; return the last validation loss."""
    name = f"{Path(config).stem}-{overlay}-seed{seed}"
    command = [sys.executable, "-m", "taperlit", "fit", "--config", config]
    for one in overlay.split("+"):
        command += ["--config", str(ROOT / f"configs/taper/{one}.yaml")]
    command += [f"--seed_everything={seed}", f"--data.seed={seed}", "--trainer.enable_progress_bar=false"]
    command += [f"--trainer.logger.save_dir={runs}", f"--trainer.logger.name={name}", *extra]
    print(shlex.join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)
    return scalars(last_run(runs / name))["val/loss"][-1][1]


def main() -> None:
    """Run the grid and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/quickstart.yaml"))
    parser.add_argument(
        "--overlays", nargs="+", default=["baseline", "internal_aux"], help="the first is the reference"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--out", type=Path, help="write the table there too")
    args, extra = parser.parse_known_args()
    losses = {
        overlay: [final_loss(args.config, overlay, seed, args.runs, extra) for seed in args.seeds]
        for overlay in args.overlays
    }
    reference = losses[args.overlays[0]]
    rows = [f"| overlay | {' | '.join(f'seed {s}' for s in args.seeds)} | mean | against {args.overlays[0]} (spread) |"]
    rows.append("|" + "---|" * (len(args.seeds) + 3))
    for overlay, values in losses.items():
        ratios = [value / base for value, base in zip(values, reference, strict=True)]
        mean = statistics.mean(values)
        against = f"{mean / statistics.mean(reference) - 1:+.2%} ({min(ratios) - 1:+.2%} to {max(ratios) - 1:+.2%})"
        rows.append(f"| {overlay} | {' | '.join(f'{v:.4f}' for v in values)} | {mean:.4f} | {against} |")
    where = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    shown = Path(sys.argv[0]).name
    table = "\n".join([*rows, "", f"`tools/{shown} {shlex.join(sys.argv[1:])}`".replace(" `", "`"), f"on {where}", ""])
    print(table)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(table)


if __name__ == "__main__":
    main()
