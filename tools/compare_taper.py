#!/usr/bin/env python3
"""Train one config under several taper overlays and seeds, and print each overlay's final validation loss.

    tools/compare_taper.py --overlays baseline internal_aux baseline+paper internal_aux+paper --seeds 0 1 2

Every run of a seed has the same steps and data order, and of one shape the same initial weights. A run that stops at a
loss or gradient that is not finite is a result too. The table goes to --out, as Markdown.
"""

import argparse
import platform
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import lightning
import torch
from traces import last_run, scalars

ROOT = Path(__file__).resolve().parent.parent
LOST = re.compile(r"step (\d+)\b.*is not finite")  # of FiniteGuard's error

Result = float | str  # the last validation loss, or where the run stopped


def final_loss(config: str, overlay: str, seed: int, runs: Path, extra: list[str]) -> Result:
    """Train once under an overlay, or several joined by "+"."""
    name = f"{Path(config).stem}-{overlay}-seed{seed}"
    command = [sys.executable, "-m", "taperlit", "fit", "--config", config]
    for one in overlay.split("+"):
        command += ["--config", str(ROOT / f"configs/taper/{one}.yaml")]
    command += [f"--seed_everything={seed}", f"--data.seed={seed}", "--trainer.enable_progress_bar=false"]
    command += [f"--trainer.logger.save_dir={runs}", f"--trainer.logger.name={name}", *extra]
    print(shlex.join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    print(done.stderr, file=sys.stderr, flush=True)
    if lost := LOST.search(done.stderr):
        return f"not finite at step {lost[1]}"
    done.check_returncode()
    return scalars(last_run(runs / name))["val/loss"][-1][1]


def reference_of(overlays: list[str], overlay: str) -> str:
    """What an overlay is compared with: of those up to it the last that begins as the first of all does."""
    before = overlays[: overlays.index(overlay) + 1]
    return [one for one in before if one.split("+")[0] == overlays[0].split("+")[0]][-1]


def row(overlay: str, mine: list[Result], reference: str, theirs: list[Result]) -> str:
    """An overlay's losses, their mean, and by how much they are above the reference's of the same seeds."""
    arrived = [loss for loss in mine if isinstance(loss, float)]
    mean = f"{statistics.mean(arrived):.4f}" if len(arrived) == len(mine) else ""
    pairs = zip(mine, theirs, strict=True)
    gaps = [a / b - 1 for a, b in pairs if isinstance(a, float) and isinstance(b, float)]
    against = ""
    if gaps and overlay != reference:
        against = f"{statistics.mean(gaps):+.2%} ({min(gaps):+.2%} to {max(gaps):+.2%}) of {reference}"
    cells = [f"{loss:.4f}" if isinstance(loss, float) else loss for loss in mine]
    return f"| {overlay} | {' | '.join(cells)} | {mean} | {against} |"


def main() -> None:
    """Run the grid and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/quickstart.yaml"))
    parser.add_argument(
        "--overlays",
        nargs="+",
        default=["baseline", "internal_aux"],
        help="each is compared with the last before it that begins as the first does",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--out", type=Path, help="write the table there too")
    args, extra = parser.parse_known_args()
    losses = {
        overlay: [final_loss(args.config, overlay, seed, args.runs, extra) for seed in args.seeds]
        for overlay in args.overlays
    }
    rows = [f"| overlay | {' | '.join(f'seed {s}' for s in args.seeds)} | mean | gap (spread) |"]
    rows.append("|" + "---|" * (len(args.seeds) + 3))
    for overlay, values in losses.items():
        reference = reference_of(args.overlays, overlay)
        rows.append(row(overlay, values, reference, losses[reference]))
    where = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    shown = Path(sys.argv[0]).name
    table = "\n".join([*rows, "", f"`tools/{shown} {shlex.join(sys.argv[1:])}`".replace(" `", "`"), f"on {where}", ""])
    print(table)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(table)


if __name__ == "__main__":
    main()
