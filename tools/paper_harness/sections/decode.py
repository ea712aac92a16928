"""`decode`: decoding with norms, with explicit scales and folded, from what `taperlit bench decode` wrote."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from paper_harness.figures import canvas
from paper_harness.tables import Claim, Section, markdown

PATTERN = "bench_decode*.json"
SHOWN = {"explicit": ("explicit scales", "#E69F00", "s"), "folded": ("folded", "#D55E00", "o")}
COLUMNS = (
    "file", "device", "preset", "batch", "prompt", "new_tokens", "dtype", "backend", "variant", "rounds",
    "tokens_per_s", "ratio", "low", "high", "ttft_ms", "kernels_per_token", "step_ms", "tokens", "norm",
)  # fmt: skip
CASE = ("preset", "batch", "dtype", "backend", "prompt", "new_tokens")
Row = dict[str, Any]


def find(out: Path) -> list[Path]:
    """What the benchmark wrote, beside the folder of the results."""
    return sorted(out.parent.glob(PATTERN))


def section(paths: Sequence[Path]) -> Section:
    """The table, the rows and the figure of the benchmark's files; an empty section without any."""
    name, head = "decode", "Decoding"
    if not paths:
        return Section(name, head, ["No results yet.", ""], COLUMNS)
    files = [(path.name, json.loads(path.read_text())) for path in paths]
    rows = [(file, told, row) for file, told in files for row in told["rows"]]
    lines = [
        "Greedy decoding with a key-value cache: tokens per second over those of the normalized model, measured in "
        "turns in one process; the median over the rounds, and the least and the largest ratio of a round. "
        "`normalized-fused` is the same model with torch's fused norm. The tokens of all variants were compared.",
        "",
        *_table(rows),
    ]
    shown = [(told["device"], row) for _, told, row in rows if row["variant"] in SHOWN and row["ratio"] is not None]
    for file, told in files:
        versions = ", ".join(f"{key} {value}" for key, value in told["versions"].items())
        lines.append(f"- `{told['command']}` ([{file}](../{file}); {told['device']}; {versions})")
    return Section(
        name,
        head,
        [*lines, ""],
        COLUMNS,
        [[file, told["device"], *(row.get(column) for column in COLUMNS[2:])] for file, told, row in rows],
        "Tokens per second over the normalized model's: the median of the rounds, and their range.",
        partial(_draw, shown) if shown else None,
        _claims(rows),
    )


def _table(rows: Sequence[tuple[str, Row, Row]]) -> list[str]:
    header = ["model", "batch", "type", "engine", "variant", "tokens/s", "over normalized", "first token"]
    header += ["kernels per step", "rounds"]
    cells = []
    for _, _, row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x ({row['low']:.2f} to {row['high']:.2f})"
        count = row.get("kernels_per_token")
        kernels = "" if count is None else f"{count:g}"
        rate, first = ("", "") if "skipped" in row else (f"{row['tokens_per_s']:.0f}", f"{row['ttft_ms']:.1f} ms")
        cells.append([
            row["preset"], str(row["batch"]), row["dtype"], row["backend"], row["variant"], rate,
            row.get("skipped", ratio), first, kernels, str(row["rounds"]),
        ])  # fmt: skip
    return markdown(header, cells, left=5)


def _claims(rows: Sequence[tuple[str, Row, Row]]) -> list[Claim]:
    devices = ", ".join(dict.fromkeys(table["device"] for _, table, _ in rows))
    decoding, first = [], []
    for variant, (name, *_) in SHOWN.items():
        own = [(file, row) for file, _, row in rows if row["variant"] == variant]
        decoding += _span(name, [row["ratio"] for _, row in own if row["ratio"] is not None])
        plain = {(file, _case(row)): row["ttft_ms"] for file, _, row in rows if row["variant"] == "normalized"}
        pairs = [(plain.get((file, _case(row))), row["ttft_ms"]) for file, row in own if "30m" in row["preset"]]
        first += _span(name, [base / other for base, other in pairs if base and other])
    return [
        Claim(
            "Decoding with a key-value cache, over the norms",
            "up to 1.14x explicit, up to 1.18x folded",
            f"{devices}: {'; '.join(decoding)}" if decoding else "",
        ),
        Claim(
            "Last-token logits of a prompt, 30M: time to the first token",
            "1.08x to 1.15x explicit, 1.13x to 1.22x folded (B 1 and 4, T 128 to 512)",
            f"{devices}: {'; '.join(first)}" if first else "",
        ),
    ]


def _span(name: str, ratios: Sequence[float]) -> list[str]:
    return [f"{name} {min(ratios):.2f}x to {max(ratios):.2f}x in {len(ratios)} rows"] if ratios else []


def _case(row: Row) -> tuple:
    return tuple(row[key] for key in CASE)


def _draw(rows: Sequence[tuple[str, Row]], path: Path) -> None:
    cases: dict[tuple, dict[str, list[Row]]] = {}
    for device, row in rows:
        cases.setdefault((device, *_case(row)), {}).setdefault(row["variant"], []).append(row)
    devices = {device for device, _ in rows}
    height = 1.1 + 0.42 * len(cases)
    with canvas(path, 1, 1, height) as (figure, ((axis,),)):
        for place, variants in enumerate(reversed(cases.values())):
            for index, (variant, (name, color, marker)) in enumerate(SHOWN.items()):
                for row in variants.get(variant, ()):
                    y = place + 0.14 * (1 - 2 * index)
                    axis.plot([row["low"], row["high"]], [y, y], color=color, linewidth=1.6, alpha=0.55)
                    label = name if name not in axis.get_legend_handles_labels()[1] else None
                    axis.plot(row["ratio"], y, marker=marker, color=color, markersize=6, linestyle="none", label=label)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_yticks(
            range(len(cases)),
            [f"{preset}, {backend}, {dtype}, batch {batch}, {prompt} + {new} tokens"
             + (f"\n{device}" if len(devices) > 1 else "")
             for device, preset, batch, dtype, backend, prompt, new in reversed(cases)],
        )  # fmt: skip
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.set_xlabel("tokens per second over those of the normalized model")
        figure.legend(loc="outside upper center", ncols=len(SHOWN))
