#!/usr/bin/env python3
"""How much the alignment scalars of q, k and v would differ, if each had its own: docs/experiments.md, `qkv`.

tools/qkv_alignment.py CHECKPOINT...

The norm before attention has one scalar, c = E[w / r] / E[w] with w = ||h D||^2, the least-squares fit of c h D to the
norm's output. Fitted to what one map W makes of it, c h D W to the norm's output times W, it is the same quotient with
w = ||h D W||^2. Per checkpoint of a normalised run and per block this prints c, what q's, k's and v's own would be
relative to it, and how much of the squared error in that map's output its own scalar would take away.
"""

import argparse

import torch
from torch import Tensor

from taperlit import Transformer, load_model
from taperlit.norm import tapered_norms

MAPS = ("q_proj", "k_proj", "v_proj")


@torch.no_grad()
def compare(model: Transformer, tokens: Tensor) -> list[str]:
    """A row per block: c, and of each map its own scalar over c less 1, and the share of the error that it saves.

    Args:
        model: with its RMSNorms.
        tokens: (B, T) token ids.
    """
    inputs: dict[int, Tensor] = {}
    hooks = [
        block.attn_norm.register_forward_pre_hook(lambda _, args, i=i: inputs.update({i: args[0].double()}))
        for i, block in enumerate(model.blocks)
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    rows = []
    for i, h in inputs.items():
        norm, attention = model.blocks[i].attn_norm, model.blocks[i].attn
        r = (h.square().mean(-1) + norm.eps).sqrt()  # (B, T)
        scaled = h * norm.weight.double()
        energy = scaled.square().sum(-1)
        c = (energy / r).mean() / energy.mean()
        cells = [f"{i}", f"{c:.3f}"]
        for name in MAPS:
            w = (scaled @ attention.get_submodule(name).weight.double().t()).square().sum(-1)
            own = (w / r).mean() / w.mean()
            common, least = ((w * (1 / r - value).square()).mean() for value in (c, own))
            cells.append(f"{own / c - 1:+.1%} ({1 - least / common:.1%})")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Print a table per checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    for path in parser.parse_args().checkpoints:
        loaded = load_model(path)
        model = loaded.model
        if not isinstance(model, Transformer) or model.config.norm != "rmsnorm" or tapered_norms(model):
            raise SystemExit(f"{path} is no normalised run of taperlit's Transformer with RMSNorms; name another.")
        print(f"\n{path}\n\n| block | c | q | k | v |\n|---|---|---|---|---|")
        print("\n".join(compare(model, loaded.sample[:, :-1])), flush=True)


if __name__ == "__main__":
    main()
