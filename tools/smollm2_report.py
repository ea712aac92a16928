"""The table, the plot and the figures of tools/smollm2."""

import json
import math
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

Result = dict[str, Any]
HEAD = (
    "", "before", "gate closed", "end", "against fine-tuning", "largest", "99.9%", "position 0", "risen by > 5",
    "export: largest logit difference", "export: KL", "norms removed", "tokens/s", "minutes",
)  # fmt: skip


def write_report(
    out: Path, titles: dict[str, str], original: Result, results: dict[str, Result], settings: Result, command: str
) -> None:
    """Write ``smollm2.md``, ``smollm2.json`` and ``smollm2.png``.

    Args:
        out: the folder.
        titles: of the variants.
        original: what was measured before any training.
        results: of the variants' runs so far, by ``<variant>-seed<seed>``.
        settings: that all runs share.
        command: that made them.
    """
    out.mkdir(parents=True, exist_ok=True)
    known = {key: value for key, value in settings.items() if key != "config"}
    machine = {
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        **{name: version(name) for name in ("torch", "lightning", "transformers", "taperlit")},
    }
    runs = {name: _without_settings(run) for name, run in results.items()}
    everything = {"command": command, "machine": machine, "settings": known, "original": _without_settings(original)}
    (out / "smollm2.json").write_text(json.dumps({**everything, "runs": runs}, indent=1) + "\n")
    text = [
        f"# {settings['model']}: its norms removed, and what that costs",
        "",
        *_losses(titles, original, results, settings),
        "",
        "![Losses over the steps, and the residual before each norm](smollm2.png)",
        "",
        *_activations(titles, original, results),
        "",
        "## What they write",
        "",
        *_samples(titles, results),
        f"`{command.strip()}`  \non {', '.join(f'{key} {value}' for key, value in machine.items())}",
        "",
    ]
    (out / "smollm2.md").write_text("\n".join(text))
    _plot(out / "smollm2.png", titles, original, results, settings)


def _without_settings(result: Result) -> Result:
    """The same without what all runs share."""
    return {key: value for key, value in result.items() if key != "settings"}


def _closed(run: Result) -> float:
    """The validation loss at the first validation after the norms are gone: half of them."""
    losses = run["logged"]["validation"]
    return losses[len(losses) // 2 - 1][1]


def _losses(titles: dict[str, str], original: Result, results: dict[str, Result], settings: Result) -> list[str]:
    tokens = settings["steps"] * settings["batch_size"] * settings["block_size"]
    held_out = settings["val_blocks"] * settings["block_size"]
    before = original["tails"]
    rows = [f"| {' | '.join(HEAD)} |", "|---" + "|---:" * (len(HEAD) - 1) + "|"]
    start = [f"{before['loss']:.4f}", "", "", "", *_tail_cells(before), "", "", "", f"0 of {original['norms']}", "", ""]
    rows.append(f"| before any training | {' | '.join(start)} |")
    seeds = len({run["seed"] for run in results.values()})
    for run in results.values():
        name = titles[run["variant"]] + (f", seed {run['seed']}" if seeds > 1 else "")
        if "lost" in run:
            rows.append(f"| {name} | {before['loss']:.4f} | {run['lost']} |{' |' * (len(HEAD) - 3)}")
            continue
        end = run["tails"]["loss"]
        reference = results.get(f"finetune-seed{run['seed']}", {}).get("tails")
        exported = run.get("export")
        speeds = [value for _, value in run["logged"].get("tokens_per_s", ())]
        speed = statistics.median(speeds) if speeds else None
        cells = [
            f"{before['loss']:.4f}",
            f"{_closed(run):.4f}",
            f"{end:.4f}",
            "" if reference in (None, run["tails"]) else f"{end - reference['loss']:+.4f}",
            *_tail_cells(run["tails"]),
            f"{run['tails']['share_risen']:.3%}",
            f"{exported['largest_difference']:.2e}" if exported else "",
            f"{exported['kl']:.2e}" if exported else "",
            f"{run['norms_removed']} of {original['norms']}",
            *((f"{speed:.0f}", f"{tokens / speed / 60:.1f}") if speed else ("", "")),
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return [
        f"{settings['steps']} steps of {settings['batch_size']} x {settings['block_size']} tokens ({tokens:,} in all) "
        "of the Python standard library's source, the same in the same order for each. Losses are in nats per token on "
        f"{held_out:,} held-out tokens, in float32; `gate closed` is the fit's own, in its precision, at the first "
        "validation without the norms, after half of the steps. `largest`, `99.9%` and `position 0` are of single "
        "tokens' losses at the end; `risen` is the share of tokens that lost more than 5 to the model before training. "
        "The export's logits are those of stock `transformers` on the exported folder against the folded model's, in "
        "float32. Tokens/s are the median of the training's, and minutes are made of it: no validation, no pauses.",
        "",
        *rows,
    ]


def _tail_cells(tails: Result) -> list[str]:
    return [f"{tails['loss_max']:.2f}", f"{tails['loss_p999']:.2f}", f"{tails['loss_at/0']:.3f}"]


def _first_seed(results: dict[str, Result]) -> dict[str, Result]:
    """One run per variant, of those that came to their end."""
    first: dict[str, Result] = {}
    for run in results.values():
        if "lost" not in run:
            first.setdefault(run["variant"], run)
    return first


def _activations(titles: dict[str, str], original: Result, results: dict[str, Result]) -> list[str]:
    runs = {"before": original, **{titles[name]: run for name, run in _first_seed(results).items()}}
    rows = [f"| norm | {' | '.join(runs)} |", "|---" + "|---:" * len(runs) + "|"]
    for norm in original["activations"]:
        cells = []
        for run in runs.values():
            one = run["activations"].get(norm)
            cells.append(f"{one['first']:.4g} / {one['median']:.4g} / {one['high']:.4g}" if one else "")
        rows.append(f"| {norm.removeprefix('model.')} | {' | '.join(cells)} |")
    return [
        "## Massive activations",
        "",
        "Root mean square of what each norm is given (or what stands in its place after folding): mean at position 0 / "
        "median / 99.9th percentile over positions from 1 on.",
        "",
        *rows,
    ]


def _samples(titles: dict[str, str], results: dict[str, Result]) -> list[str]:
    lines = []
    for name, run in _first_seed(results).items():
        lines += [f"{titles[name]}:", "", "```python", *run["sample"].rstrip().splitlines(), "```", ""]
    return lines


def _plot(path: Path, titles: dict[str, str], original: Result, results: dict[str, Result], settings: Result) -> None:
    """Three panels: training loss, validation loss, and the residual before each norm."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    colors = dict(zip(titles, ("black", *plt.cm.viridis([0.0, 0.3, 0.6, 0.85])), strict=True))
    named: set[str] = set()
    for run in results.values():
        color = colors[run["variant"]]
        label = None if run["variant"] in named else titles[run["variant"]]
        named.add(run["variant"])
        finite = [(step, loss) for step, loss in run["logged"]["train"] if math.isfinite(loss)]
        axes[0].plot(*zip(*finite, strict=True), color=color, label=label, linewidth=0.8)
        points = [(0, original["tails"]["loss"]), *run["logged"].get("validation", ())]
        axes[1].plot(*zip(*points, strict=True), color=color, label=label, marker="o", markersize=3)
    for axis, title in zip(axes, ("training loss", "validation loss", "residual before each norm"), strict=True):
        axis.set_title(title)
    for axis in axes[:2]:
        for step in (settings["steps"] // 6, settings["steps"] // 2):
            axis.axvline(step, color="grey", linewidth=0.6, linestyle=":")
        axis.set_yscale("log")
        axis.set_xlabel("optimizer step (the norms go between the dotted lines)")
    before = [*original["activations"].values()]
    axes[2].plot([one["first"] for one in before], color="grey", linestyle="--", label="before, position 0")
    axes[2].plot([one["median"] for one in before], color="grey", label="before, others' median")
    for name, run in _first_seed(results).items():
        after = [*run["activations"].values()]
        axes[2].plot([one["first"] for one in after], color=colors[name], linestyle="--")
        axes[2].plot([one["median"] for one in after], color=colors[name])
    axes[2].set_yscale("log")
    axes[2].set_xlabel("norm")
    for axis in axes:
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
