#!/usr/bin/env python3
"""Measure how large a model's residual is at the first position and elsewhere, and what each fit makes of it.

    tools/massive_activations.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out docs/results/massive_activations.md

The model may be a name on the hub, a folder, a .gguf file, or a checkpoint or folded model of ours. The text is the
Python standard library's source, each sequence the beginning of a file. Per norm the table has the root mean square of
its input (the standard deviation for the LayerNorm kind, unless it is folded) and the alignment scalar ``c`` by each
fit: E[w / r] / E[w] with w = ||h D||^2 (energy) or 1 (token), over all positions or all but the first, and over the
first alone.
"""

import argparse
import importlib.metadata
import platform
import random
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from taperlit.data.sources import python_files
from taperlit.surgery import known_norms


def python_blocks(tokenizer_json: str, count: int, length: int, seed: int, skip: int = 0) -> Tensor:
    """The beginnings of files of the standard library, in an order drawn by a seed.

    Args:
        tokenizer_json: the text of a ``tokenizer.json``.
        count: of files.
        length: in tokens; shorter files are left out.
        seed: of the order.
        skip: leave out the first files that are long enough.

    Returns:
        (count, length) int64.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    files = python_files()
    random.Random(seed).shuffle(files)
    blocks: list[list[int]] = []
    for file in files:
        # A token is mostly several characters, and never more than one per byte of a long enough beginning.
        ids = tokenizer.encode(Path(file).read_text("utf-8", "replace")[: 16 * length]).ids
        if len(ids) >= length:
            blocks.append(ids[:length])
        if len(blocks) == skip + count:
            return torch.tensor(blocks[skip:])
    sys.exit(f"Only {len(blocks)} files have {length} tokens; ask for fewer sequences or shorter ones.")


@dataclass
class Inputs:
    """What one norm was given, a number per token.

    Args:
        size: (B, T) root mean square of ``h`` (of the centred ``h`` in the LayerNorm kind).
        r: (B, T) the norm's denominator; None where there is no norm any more.
        energy: (B, T) ``||h D||^2``; None likewise.
    """

    size: Tensor
    r: Tensor | None = None
    energy: Tensor | None = None

    def alignment(self, positions: slice, weight: str) -> float:
        """``E[w / r] / E[w]`` over some positions, ``w`` by the name of the fit."""
        assert self.r is not None
        assert self.energy is not None
        r, energy = self.r[:, positions].double(), self.energy[:, positions].double()
        w = energy if weight == "energy" else (energy > 0).double()
        return ((w / r).mean() / w.mean()).item()


@contextmanager
def watched(model: nn.Module, gone: dict[str, bool]) -> Iterator[dict[str, Inputs]]:
    """Note what the norms of a model are given in the passes inside; batches are put below one another.

    Args:
        model: any.
        gone: names of modules in the place of norms that were folded, and whether these were centred.
    """
    kinds = {**dict.fromkeys(gone), **known_norms(model)}
    found: dict[str, list[Inputs]] = defaultdict(list)

    @torch.no_grad()
    def note(name: str, module: nn.Module, x: Tensor) -> None:
        kind = kinds[name]
        x = x.detach().float()
        dims = (-1,) if kind is None else tuple(range(-len(kind.shape), 0))
        if x.dim() != len(dims) + 2:
            return  # a norm of queries and keys, say, which has no residual stream before it
        centred = gone[name] if kind is None else kind.centred
        h = x - x.mean(dims, keepdim=True) if centred else x
        square = h.square().mean(dims)
        if kind is None:
            found[name].append(Inputs(square.sqrt()))
            return
        eps = torch.finfo(torch.float32).eps if kind.eps is None else kind.eps
        weight = getattr(module, "weight", None)
        scaled = h if weight is None else h * (weight.float() + kind.gain_offset)
        found[name].append(Inputs(square.sqrt(), (square + eps).sqrt(), scaled.square().sum(dims)))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: note(name, module, args[0]))
        for name in kinds
    ]
    inputs: dict[str, Inputs] = {}
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
    for name, parts in found.items():
        columns = [[getattr(part, field) for part in parts] for field in ("size", "r", "energy")]
        inputs[name] = Inputs(*(None if column[0] is None else torch.cat(column) for column in columns))


FITS: dict[str, Callable[[Inputs], float]] = {
    "energy": lambda inputs: inputs.alignment(slice(0, None), "energy"),
    "energy, skip 1": lambda inputs: inputs.alignment(slice(1, None), "energy"),
    "token": lambda inputs: inputs.alignment(slice(0, None), "token"),
    "token, skip 1": lambda inputs: inputs.alignment(slice(1, None), "token"),
    "first": lambda inputs: inputs.alignment(slice(0, 1), "energy"),
}


def table(inputs: dict[str, Inputs]) -> list[str]:
    """The rows of the Markdown table."""
    head = ["norm", "position 0", "mean", "median", "99.9%", "largest", *(f"c: {fit}" for fit in FITS)]
    rows = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, one in inputs.items():
        rest = one.size[:, 1:].flatten().double()
        sizes = [one.size[:, 0].double().mean(), rest.mean(), rest.median(), rest.quantile(0.999), rest.max()]
        scalars = ["" if one.r is None else f"{fit(one):.4g}" for fit in FITS.values()]
        rows.append(f"| {name} | {' | '.join([f'{size.item():.4g}' for size in sizes] + scalars)} |")
    return rows


def summary(inputs: dict[str, Inputs]) -> str:
    """One sentence about the largest ratio of the first position to the others."""
    ratios = {name: (one.size[:, 0].mean() / one.size[:, 1:].median()).item() for name, one in inputs.items()}
    name, largest = max(ratios.items(), key=lambda item: item[1])
    return (
        f"Position 0 is up to {largest:.0f} times the median of the others (before {name}); over all norms the median "
        f"ratio is {statistics.median(ratios.values()):.1f}."
    )


def provenance() -> str:
    """The command that ran and what it ran on, as the last lines of a result."""
    names = ("torch", "transformers", "taperlit")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    where = f"Python {platform.python_version()}, {versions}, {platform.machine()}, {torch.get_num_threads()} threads"
    arguments = shlex.join(Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    return f"`tools/{Path(sys.argv[0]).name} {arguments}`  \non {where}\n"


def load(source: str) -> tuple[nn.Module, str, dict[str, bool]]:
    """A model in eval mode, its tokenizer's JSON text, and the folded norms' names, each with whether it centres."""
    from taperlit.checkpoint.folded import load_any

    loaded = load_any(source)
    if loaded.tokenizer_json is None:
        sys.exit(f"{source} has no tokenizer.json, which the text is tokenized with.")
    structure = loaded.structure or {"identities": {}, "scales": {}}
    gone = {name: False for name in structure["identities"]}
    gone |= {name: scale["centred"] for name, scale in structure["scales"].items()}
    return loaded.model.eval(), loaded.tokenizer_json, gone


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub name, folder, .gguf file, checkpoint or folded model")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences in one pass")
    parser.add_argument("--bfloat16", action="store_true", help="run under bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    model, tokenizer_json, gone = load(args.model)
    tokens = python_blocks(tokenizer_json, args.sequences, args.length, args.seed)
    with watched(model, gone) as inputs, torch.no_grad(), torch.autocast("cpu", enabled=args.bfloat16):
        for batch in tokens.split(args.batch):
            model(batch)
    text = "\n".join(
        [
            f"# Activations before each norm: {Path(args.model).name}",
            "",
            "Root mean square (standard deviation for the LayerNorm kind, unless it is folded) of each norm's input: "
            f"the mean at position 0, and over positions >= 1; {args.sequences} sequences of {args.length} tokens, the "
            "beginnings of files of Python's standard library. `c` is the alignment scalar by each fit.",
            "",
            summary(inputs),
            "",
            *table(inputs),
            "",
            provenance(),
        ]
    )
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()
