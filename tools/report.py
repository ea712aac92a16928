#!/usr/bin/env python3
"""Report on a finished run: its losses, its gate, its folding, and decoding speed before and after.

tools/report.py runs/quickstart/version_0 runs/quickstart/version_0/checkpoints/last-folded
"""

import argparse
from pathlib import Path

import torch
from traces import scalars

from taperlit.bench.decode import compare_decoding
from taperlit.checkpoint.folded import load_checkpoint, load_model
from taperlit.compare import largest_difference


@torch.no_grad()
def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folded", type=Path)
    args = parser.parse_args()
    logged = scalars(args.run)
    unfolded = load_checkpoint(args.run / "checkpoints/last.ckpt")
    folded = load_model(args.folded)
    tokens = unfolded.sample[:, :-1].long()
    difference = largest_difference(unfolded.model(tokens), folded.model(tokens))
    losses = ", ".join(f"{loss:.3f} (step {step + 1})" for step, loss in logged.get("val/loss", ()))
    gate = [value for _, value in logged["taper/gate"]]
    before, after = compare_decoding({"before": unfolded.model, "after": folded.model})
    print(f"validation loss            {losses or 'not measured'}")
    print(f"gate                       {gate[0]:g} -> {gate[-1]:g}")
    print(f"largest logit difference   {difference:.1e} relative, folded against unfolded, {tokens.numel()} tokens")
    print(f"decoding before folding    {before.rate:.0f} tokens/s")
    print(
        f"decoding after folding     {after.rate:.0f} tokens/s, {after.ratio:.2f}x "
        f"({after.low:.2f}x to {after.high:.2f}x over 7 rounds in turns)"
    )


if __name__ == "__main__":
    main()
