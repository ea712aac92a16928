"""The same in a few lines of text."""

from collections.abc import Iterator, Sequence

from taperlit.report.parts import Parts
from taperlit.report.run import Run
from taperlit.report.side_by_side import LOSS, other_text, relative_gap
from taperlit.structure import Structure

MOST_LOSSES = 8  # in a line


def lines_of(run: Run, parts: Parts) -> Iterator[str]:
    """A run's losses, gate and fold, and its decoding before and after, as far as they were measured."""
    losses = [f"{loss:.3f} (step {step + 1})" for step, loss in run.traces.get(LOSS, ())]
    if len(losses) > MOST_LOSSES:
        losses = [losses[0], "...", *losses[2 - MOST_LOSSES :]]
    yield _line("validation loss", ", ".join(losses) or "not measured")
    if gate := run.traces.get("taper/gate"):
        yield _line("gate", f"{gate[0][1]:g} -> {gate[-1][1]:g}")
    for each in parts.folds[:1]:
        yield _line("folding", f"{_in_words(each.structure)}{run.earlier(each.step)}")
    for row in (row for bench in parts.benches for row in bench.rows if "logit_difference" in row):
        tokens = f"{row.get('compared_tokens')} tokens"
        yield _line(
            "largest logit difference", f"{row['logit_difference']:.1e} relative, folded against unfolded, {tokens}"
        )
    for bench in parts.benches:
        if any("logit_difference" in row for row in bench.rows):
            for row in bench.rows:
                yield _line(f"decoding {row['variant']}", _rate(row))


def comparison_lines(names: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    """A line per run: its last validation loss, and how far it is from the first's."""
    width = max(map(len, names))
    for name, run in zip(names, runs, strict=True):
        loss, gap = run.last(LOSS), None if run is runs[0] else relative_gap(run, runs[0])
        shown = "not measured" if loss is None else f"{loss:.4f}"
        told = "" if gap is None else f"  {gap[1]:+.2%} at step {gap[0] + 1}{other_text(run, runs[0])}"
        yield f"{name:<{width}}  {shown}{told}"


def _in_words(structure: Structure) -> str:
    removed, scales = len(structure["identities"]), len(structure["scales"])
    kept = f", {scales} left as scales" if scales else ""
    return f"{removed} norms removed{kept}; difference {structure['difference']:.1e} in float64"


def _rate(row: dict) -> str:
    rate = f"{row['tokens_per_s']:.0f} tokens/s"
    if row["ratio"] == row["low"] == row["high"] == 1:
        return rate
    spread = f"{row['low']:.2f}x to {row['high']:.2f}x over {row['rounds']} rounds in turns"
    return f"{rate}, {row['ratio']:.2f}x ({spread})"


def _line(what: str, how: str) -> str:
    return f"{what:<26} {how}"
