"""`finetune`: a pretrained model whose norms are tapered away, from what tools/smollm2 wrote."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from paper_harness.comparison import finite
from paper_harness.figures import canvas, draw_line, legend_of, log_scale, mark_lost
from paper_harness.records import BASELINE, ENOUGH_SEEDS, title
from paper_harness.tables import Claim, Section, few, markdown, percent

FILE = "smollm2.json"
KEPT = "finetune"  # the variant that keeps its norms: the baseline
COLUMNS = (
    "model", "variant", "seed", "steps", "loss_before", "loss", "over_finetuning", "loss_max", "loss_p999",
    "share_risen", "norms_removed", "norms", "lost",
)  # fmt: skip
Result = dict[str, Any]


def find(out: Path) -> Path | None:
    """What tools/smollm2 wrote, beside the folder of the results."""
    path = out.parent / FILE
    return path if path.exists() else None


def section(path: Path | None) -> Section:
    """The table, the rows and the figure of a file of tools/smollm2; an empty section without one."""
    name, head = "finetune", "Fine-tuning without norms"
    if path is None:
        return Section(name, head, ["No results yet.", ""], COLUMNS)
    told = json.loads(path.read_text())
    settings, runs = told["settings"], [*told["runs"].values()]
    tokens = settings["steps"] * settings["batch_size"] * settings["block_size"]
    rows = [_row(run, told) for run in runs]
    lines = [
        f"{settings['model']}, {settings['steps']} steps of {settings['batch_size']} x {settings['block_size']} tokens "
        f"({tokens:,} in all), each variant the same in the same order: `{told['command'].strip()}`. Losses are in "
        f"nats per token on held-out text; before any training it is {told['original']['tails']['loss']:.4f}.",
        "",
        *_table(runs, told),
    ]
    return Section(
        name,
        head,
        lines,
        COLUMNS,
        rows,
        "Training and validation loss; a cross is where a run stopped, since its loss was not finite.",
        partial(_draw, told) if runs else None,
        _claims(runs, told),
    )


def _variant(run: Result) -> str:
    return BASELINE if run["variant"] == KEPT else run["variant"]


def _name(run: Result) -> str:
    return {KEPT: "fine-tuning, all norms kept", "attention": "norms before attention alone"}.get(
        run["variant"], title(run["variant"])
    )


def _gap(run: Result, told: Result) -> float | None:
    """Over fine-tuning with norms, of the same seed: a relative loss."""
    base = told["runs"].get(f"{KEPT}-seed{run['seed']}", {}).get("tails")
    if base is None or "tails" not in run or run["variant"] == KEPT:
        return None
    return run["tails"]["loss"] / base["loss"] - 1


def _row(run: Result, told: Result) -> list[Any]:
    tails = run.get("tails", {})
    return [
        told["settings"]["model"], run["variant"], run["seed"], told["settings"]["steps"],
        told["original"]["tails"]["loss"], tails.get("loss"), _gap(run, told), tails.get("loss_max"),
        tails.get("loss_p999"), tails.get("share_risen"), run.get("norms_removed"), told["original"]["norms"],
        run.get("lost"),
    ]  # fmt: skip


def _table(runs: Sequence[Result], told: Result) -> list[str]:
    seeds: dict[str, int] = {}
    for run in runs:
        seeds[run["variant"]] = seeds.get(run["variant"], 0) + 1
    rows = []
    for run in runs:
        mark = few(seeds[run["variant"]])
        if "lost" in run:
            rows.append([_name(run), str(run["seed"]), run["lost"], *[""] * 5])
            continue
        tails, gap = run["tails"], _gap(run, told)
        rows.append([
            _name(run), str(run["seed"]), f"{tails['loss']:.4f}{mark}", "" if gap is None else f"{percent(gap)}{mark}",
            f"{tails['loss_max']:.2f}", f"{tails['loss_p999']:.2f}", f"{tails['share_risen']:.3%}",
            f"{run['norms_removed']} of {told['original']['norms']}",
        ])  # fmt: skip
    header = ["variant", "seed", "loss", "against fine-tuning", "largest", "99.9%", "risen by > 5", "norms removed"]
    return markdown(header, rows)


def _claims(runs: Sequence[Result], told: Result) -> list[Claim]:
    parts = []
    for run in runs:
        gap = _gap(run, told)
        if "lost" in run or gap is not None:
            parts.append(f"{_name(run)}: {run['lost'] if gap is None else percent(gap)}")
    if not parts:
        return []
    seeds = len({run["seed"] for run in runs})
    rests = f" ({seeds} {'seed' if seeds == 1 else 'seeds'})" if seeds < ENOUGH_SEEDS else ""
    return [
        Claim(
            "Fine-tuning without norms, against FakeLN",
            "GPT-2 S to XL on OpenWebText: about level, in places better",
            f"{told['settings']['model']}{rests}: {'; '.join(parts)}",
        )
    ]


def _draw(told: Result, path: Path) -> None:
    runs = told["runs"].values()
    with canvas(path, 1, 2, 3.6) as (figure, panels):
        legend_of(figure, panels[0, 0], {_variant(run): _name(run) for run in runs})
        for axis, which, name in zip(
            panels[0], ("train", "validation"), ("training loss", "validation loss"), strict=True
        ):
            _draw_losses(axis, told, which)
            axis.set_title(name)


def _draw_losses(axis: Axes, told: Result, which: str) -> None:
    start = [(0, told["original"]["tails"]["loss"])] if which == "validation" else []
    for run in told["runs"].values():
        variant = _variant(run)
        curve = [(step, loss) for step, loss in [*start, *run["logged"].get(which, ())] if finite(loss)]
        if not curve:
            continue
        look: dict[str, Any] = {"marker": "o", "markersize": 3} if start else {"linewidth": 1.1}
        draw_line(axis, curve, variant, **look)
        if "lost" in run:
            mark_lost(axis, curve[-1], variant)
    log_scale(axis)
    axis.set_xlim(0, told["settings"]["steps"] * 1.02)
    axis.set_xlabel("optimizer step")
