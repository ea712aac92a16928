#!/usr/bin/env python
"""Fold every module of the zoo in ``tests/zoo`` and write ``docs/folding_zoo.md``: what became of each, in a table."""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from zoo import CASES  # noqa: E402
from zoo.case import Case  # noqa: E402
from zoo.judge import TOLERANCE, Outcome, Wrong, judge  # noqa: E402

HEAD = """# The folding zoo

What `taperlit.fold` does with {modules} small modules, written the way people write models. Each is tapered, its norms'
linear maps get random values, its gate is set to 0, and it is folded in float64 and in float32.

- *folded*: on the given run and on three fresh inputs the outputs differ by at most {tolerance:.0e} (relative, float64;
  the figure is the largest seen), no norm is left, and the structure record with the saved weights gives the same on a
  freshly built model.
- *refused*: one line says why, and the model is as it was, bit for bit.

Of {cases} cases {folded} fold and {refused} are refused. RMSNorm and LayerNorm stand apart where they differ.
`tests/test_zoo.py` holds each module to its verdict.

Made by `python tools/zoo_table.py` with torch {torch} on the CPU.
"""
TITLES = {"rms": "RMSNorm", "layer": "LayerNorm", "own": "its own norms"}


def cell(outcome: Outcome) -> str:
    """What became of one module, for the table."""
    if outcome.line is None:
        return f"folded, {outcome.difference:.0e}"
    return f"refused: {outcome.line}".replace("|", r"\|")


def run(case: Case) -> dict[str, Outcome]:
    """Judge a module in every kind of norm and dtype; what became of it in the first dtype, by kind."""
    outcomes: dict[str, Outcome] = {}
    for kind, dtype in case.trials():
        outcomes.setdefault(kind, judge(case, kind, dtype))
    return outcomes


def row(name: str, case: Case, outcomes: dict[str, Outcome]) -> str:
    """A line of the table."""
    cells = {kind: cell(outcome) for kind, outcome in outcomes.items()}
    folded = [outcome.difference for outcome in outcomes.values() if outcome.line is None]
    if len(folded) == len(cells):
        verdict = f"folded, {max(folded):.0e}"
    elif len(set(cells.values())) == 1:
        verdict = next(iter(cells.values()))
    else:
        verdict = "<br>".join(f"{TITLES[kind]} {text}" for kind, text in cells.items())
    return f"| `{name}` | {case.about} | {verdict} |".replace("0e+00", "0")


def main() -> int:
    """Write the table; say which verdicts do not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "folding_zoo.md", help="where to write")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    sections: dict[str, list[str]] = {}
    everything: list[Outcome] = []
    wrong = 0
    for name, case in CASES.items():
        try:
            outcomes = run(case)
        except Wrong as error:
            print(f"{name}: {error}", file=sys.stderr)
            wrong += 1
            continue
        everything += outcomes.values()
        sections.setdefault(case.theme, []).append(row(name, case, outcomes))
    if wrong:
        print(f"{wrong} modules did not get their verdict; nothing was written.", file=sys.stderr)
        return 1
    folded = sum(outcome.line is None for outcome in everything)
    head = HEAD.format(
        modules=len(CASES),
        cases=len(everything),
        folded=folded,
        refused=len(everything) - folded,
        tolerance=TOLERANCE,
        torch=torch.__version__.partition("+")[0],
    )
    parts = [head]
    for theme, rows in sections.items():
        about = sys.modules[f"zoo.{theme}"].__doc__.strip().splitlines()[0]
        parts.append(f"\n## {theme.capitalize()}\n\n{about}\n\n| module | what it is | verdict |\n|---|---|---|\n")
        parts.append("\n".join(rows) + "\n")
    out.parent.mkdir(exist_ok=True)
    out.write_text("".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
