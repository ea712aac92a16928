"""`ours`: what we taper with beside the paper's own settings and the baselines, and the targets that it is held to."""

import statistics
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from paper_harness.comparison import left_out
from paper_harness.experiments import PEERS
from paper_harness.ideas import OURS
from paper_harness.records import BASELINE, StoredRun, grouped, title, without_doubles
from paper_harness.sections.ideas import CAPTION, COLUMNS, MOST_ROWS, Tried, csv_rows, draw_gaps, rivals, tried_in
from paper_harness.statistics import relative_gaps
from paper_harness.tables import Claim, Section, few, gap_cell, markdown, number_cell, percent


class Target(NamedTuple):
    """A bound that ours is held to.

    Args:
        what: is bounded.
        bound: in words.
        found: what was measured.
        holds: whether it is within its bound.
    """

    what: str
    bound: str
    found: str
    holds: bool


def _commands(runs: Sequence[StoredRun]) -> str:
    sizes = grouped([run for run in runs if run.setup.size.endswith("_unit")], lambda run: run.setup.size)
    commands = [
        f"`tools/paper ours --size {size} --seeds {' '.join(map(str, sorted({run.settings['seed'] for run in own})))}`"
        for size, own in sizes.items()
    ]
    return f" All pairs: {' and '.join(commands)}." if commands else ""


def section(runs: Sequence[StoredRun]) -> Section:
    """The tables, the rows and the figure of the runs."""
    picked = without_doubles(runs)
    lines = [
        f"Ours is the idea `{OURS}` in the sizes whose embeddings are of one size (`_unit`); beside it the same length "
        "of the plain size with the paper's own settings. Gaps are to the baseline of the same model, seed and length, "
        "and losses compare across models. FakeLN, DyT and Derf stand in the tables of a length that they ran at. What "
        f"the columns are is told at the ideas.{_commands(picked.runs)}",
        "",
    ]
    rows, drawn, claims = [], [], []
    for (corpus, length), own in grouped(picked.runs, lambda run: (run.settings["corpus"], run.length)).items():
        heading = f"{corpus}, {length:g} tokens per parameter"
        tried = {setup: tried_in(some) for setup, some in grouped(own, lambda run: run.setup[:4]).items()}
        lines += [f"### {heading}", "", *_table(tried)]
        for setup, table in tried.items():
            rows += csv_rows(table)
            if told := [row for row in rivals(table) if row.variant not in PEERS]:  # DyT's gap would hide the others
                drawn.append((f"{setup[0]}, {heading}", told))
            if targets := _targets(table):
                lines += [f"Targets, {setup[0]}:", "", *_targets_table(targets)]
                held = sum(target.holds for target in targets)
                claims.append(f"{setup[0]}, {heading}: {_gaps(table)}; {held} of {len(targets)} targets hold")
    claim = Claim("Ours against the baseline of the same model", "+0.7% to +1.8%", "<br>".join(claims))
    return Section(
        name="ours",
        title="Ours beside the paper's settings",
        lines=[*lines, *left_out(picked.superseded)],
        columns=COLUMNS,
        rows=rows,
        caption=CAPTION,
        draw=partial(draw_gaps, drawn[:MOST_ROWS]) if any(some for _, some in drawn) else None,
        claims=[claim] if claims else [],
    )


def _name(row: Tried) -> str:
    if row.variant in (BASELINE, *PEERS):
        return ""
    return "ours" if row.idea else "the paper's"


def _relative_spread(row: Tried) -> float | None:
    """Standard deviation of the losses between seeds, over their mean."""
    losses = [run.loss for run in row.runs.values() if run.arrived]
    return statistics.stdev(losses) / statistics.mean(losses) if len(losses) > 1 else None


def _table(tried: dict[tuple[str, str, str, float], list[Tried]]) -> list[str]:
    header = [
        "size", "settings", "variant", "learning rate", "seeds", "diverged", "loss", "spread", "gap (95%)", "widest",
        "largest", "random", "RMS",
    ]  # fmt: skip
    rows = []
    for (size, _, _, lr), table in tried.items():
        for row in table:
            base, spread = row.variant == BASELINE, _relative_spread(row)
            rows.append([
                size,
                _name(row),
                title(row.variant),
                f"{lr:g}",
                str(len(row.runs)),
                str(len(row.lost)) if row.lost else "",
                number_cell(row.mean(lambda run: run.loss), ".4f"),
                "" if spread is None else f"{spread:.2%}{few(len(row.runs) - len(row.lost))}",
                "" if base else gap_cell(row.gap()),
                "" if base else gap_cell(row.widest()),
                "" if base else number_cell(row.ratio(lambda run: run.tail("loss_max"))),
                "" if base else number_cell(row.ratio(lambda run: run.random("largest_loss"))),
                number_cell(row.mean(lambda run: run.random("ratio"))),
            ])  # fmt: skip
    return markdown(header, rows, left=3)


def _targets(table: Sequence[Tried]) -> list[Target]:
    """The bounds of our rows in one setup."""
    base = next((row for row in table if row.variant == BASELINE), None)
    found = []
    for row in table:
        if row.idea != OURS or row.variant == BASELINE:
            continue
        name = title(row.variant)
        found.append(Target(f"{name}: runs that diverge", "none", str(len(row.lost)), not row.lost))
        if (gap := row.gap()) is not None:
            all_taper = row.variant.startswith("all")
            most = 0.003 if all_taper else 0.0
            found.append(Target(f"{name}: mean gap", f"<= {percent(most)}", percent(gap.mean), gap.mean <= most))
            if all_taper and base is not None:
                own, theirs = _relative_spread(row), _relative_spread(base)
                if own is not None and theirs is not None:
                    found.append(
                        Target(f"{name}: spread between seeds", f"<= {theirs:.2%}", f"{own:.2%}", own <= theirs)
                    )
            elif gap.high is not None:
                told = Target(f"{name}: its 95% upper end", "<= +0.20%", percent(gap.high), gap.high <= 0.002)
                found.append(told)
        if (over := _over_peers(row, table)) is not None:
            told = f"{percent(over[0])} ({over[1]})"
            found.append(Target(f"{name}: mean gap to the lowest of FakeLN, DyT and Derf", "< 0", told, over[0] < 0))
        if (widest := row.widest()) is not None:
            mean = widest.mean
            found.append(Target(f"{name}: widest gap while the gate falls", "<= +0.70%", percent(mean), mean <= 0.007))
        for what, most, value in (
            ("largest token loss over the baseline's", 1.25, row.ratio(lambda run: run.tail("loss_max"))),
            ("the same on random tokens", 1.5, row.ratio(lambda run: run.random("largest_loss"))),
            ("RMS over the median on random tokens", 3.0, row.mean(lambda run: run.random("ratio"))),
        ):
            if value is not None:
                found.append(Target(f"{name}: {what}", f"<= {most:g}", f"{value.mean:.2f}", value.mean <= most))
    return found


def _over_peers(row: Tried, table: Sequence[Tried]) -> tuple[float, str] | None:
    """The largest mean gap to a peer over the seeds of both, and which peer that is."""

    def losses(of: Tried) -> dict[int, float]:
        return {seed: run.loss for seed, run in of.runs.items() if run.arrived}

    gaps = {peer.variant: relative_gaps(losses(row), losses(peer)) for peer in table if peer.variant in PEERS}
    found = [(statistics.mean(own.values()), title(variant)) for variant, own in gaps.items() if own]
    return max(found, default=None)


def _targets_table(targets: Sequence[Target]) -> list[str]:
    rows = [[target.what, target.bound, target.found, "yes" if target.holds else "**no**"] for target in targets]
    return markdown(["what", "target", "measured", "holds"], rows, left=1)


def _gaps(table: Sequence[Tried]) -> str:
    return "; ".join(
        f"{title(row.variant)} {gap_cell(row.gap())}" for row in table if row.idea == OURS and row.gap() is not None
    )
