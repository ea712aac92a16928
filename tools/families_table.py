#!/usr/bin/env python3
"""What taper and fold do on transformers' model families: tiny random models, in float64, on the CPU; no download.

Writes a table with the norms that each family has, what they compute, and what became of them: the largest difference
of the logits before and after the fold, relative to the largest logit, or the line of the refusal.

tools/families_table.py --out docs/families.md
"""

import argparse
import copy
import fnmatch
import platform
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers

from taperlit import fold, taper
from taperlit.errors import TaperlitError
from taperlit.norm import TaperNorm, tapered_norms

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from families import FAMILIES, Family, close_with_random_maps

HEAD = """# taper and fold on transformers' model families

Each family as a tiny random model (two layers, under 50 thousand parameters, float64, CPU). *Kind* is what `taper`
found by trying the norm out. *Fold*: the norms got random alignment scalars, gains and biases, and the gate was closed.
All norms of a family that fold were folded together; the figure is the largest difference of the outputs before and
after, relative to the largest output. (DeepSeek-V3's own forward rounds its router's matrix, which absorbs a norm, to
float32.) The norms of a row that is refused were tried by themselves; a refusal leaves the model as it was, and says
why they are to be left untapered. `*` stands for any letters of a name.

| family | norms | kind | fold |
|---|---|---|---|
"""


def families() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Per family its name and (pattern, kind, fold) for each pattern of norms."""
    for name, family in FAMILIES.items():
        model = family.make(torch.float64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            taper(model)
        left = dict(re.findall(r"([\w.]+) \(\w+: (.*?)\)(?=, [\w.]+ \(|\.$)", " ".join(str(w.message) for w in caught)))
        kinds = {n: kind_of(norm) for n, norm in tapered_norms(model).items()}
        together = (*family.foldable, family.final) if family.final else family.foldable
        figure = folded(family, together)
        rows = [(p, one_of(kinds, p), figure if p in together else folded(family, [p])) for p in family.patterns]
        rows += [(p, "", f"not tapered: {one_of(left, p)}") for p in family.unknown]
        yield name, rows


def kind_of(norm: TaperNorm) -> str:
    """What a tapered norm computes, in words."""
    name = "LayerNorm" if norm.centred else "RMSNorm"
    gain = "no gain" if norm.taper_weight is None else "1 + weight" if norm.gain_offset else "weight"
    bias = "" if norm.taper_bias is None else ", bias"
    return f"{name}, {gain}{bias}, eps {norm.kind.eps:g}"


def one_of(values: dict[str, str], pattern: str) -> str:
    """What is said of the names that match; they all say the same, but for their own names."""
    return " / ".join(dict.fromkeys(value for name, value in values.items() if fnmatch.fnmatchcase(name, pattern)))


def folded(family: Family, patterns: Iterable[str]) -> str:
    """The relative difference of the outputs, or the line that refuses."""
    model, batch = family.make(torch.float64), family.batch(torch.float64)
    taper(model, patterns)
    close_with_random_maps(tapered_norms(model))
    state = copy.deepcopy(model.state_dict())

    def run() -> torch.Tensor:
        with torch.no_grad():
            return family.run(model, batch)

    before = run()
    try:
        fold(model, run, untouched=family.untouched)
    except TaperlitError as error:
        whole = torch.equal(run(), before) and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        return f"refused: {error}" if whole else f"**left changed**: {error}"
    gone = not any(isinstance(module, TaperNorm) for module in model.modules())
    difference = ((run() - before).abs().max() / before.abs().max()).item()
    return f"folds, {difference:.0e}" if gone else "**norms left**"


def main() -> None:
    """Print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    text = HEAD
    for name, rows in families():
        for i, (pattern, kind, outcome) in enumerate(rows):
            text += f"| {name if i == 0 else ''} | `{pattern}` | {kind} | {outcome.replace('|', chr(92) + '|')} |\n"
    text += f"\n`tools/families_table.py{f' --out {args.out}' if args.out else ''}`\n"
    text += (
        f"on Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    print(text, end="")
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
