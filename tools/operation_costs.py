#!/usr/bin/env python3
"""What a norm and a product of one row cost here, and what the choice of layouts gives a whole decode step.

tools/operation_costs.py --out docs/results/operation_costs.md
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from taperlit.bench.machine import about, command_line
from taperlit.bench.models import folded, random_model, tapered
from taperlit.bench.turns import seconds, take_turns
from taperlit.decode import Engine
from taperlit.decode.layout import in_words, shapes_of
from taperlit.decode.norms import LayerNorm, rms_norm
from taperlit.decode.product import layouts_for, make_product
from taperlit.transformer import TransformerConfig

CPU = torch.device("cpu")
PRESET, WIDTHS, BYTES, PROMPT, STEPS = "small_30m", (64, 512), 150 << 20, 128, 48


def medians(works: dict[str, Callable[[], Any]], times: int, rounds: int = 9) -> dict[str, float]:
    """Seconds per call of each alternative, in turns of so many calls."""

    def turn(work: Callable[[], Any]) -> float:
        return seconds(lambda: [work() for _ in range(times)], CPU) / times

    return {
        k: statistics.median(v) for k, v in take_turns({k: partial(turn, w) for k, w in works.items()}, rounds).items()
    }


def norms(dtype: torch.dtype, width: int) -> str:
    """A row: microseconds per norm of one row."""
    x, weight = torch.randn(1, width).to(dtype), torch.ones(width, dtype=dtype)
    kinds = {form: rms_norm(weight, 1e-5, x, form) for form in ("fused", "composed")}
    kinds["layernorm"] = LayerNorm(weight, weight, 1e-5)
    costs = medians({name: partial(kind, x) for name, kind in kinds.items()}, 500)
    return f"| {dtype} | {width} | " + " | ".join(f"{1e6 * cost:.1f}" for cost in costs.values()) + " |"


def products(dtype: torch.dtype, name: str, d_out: int, d_in: int) -> str:
    """A row: GB/s of one product in every layout, over so many matrices that no cache holds them."""
    size = d_out * d_in * dtype.itemsize
    count, x = max(2, BYTES // size), torch.randn(1, d_in).to(dtype)
    cells = {}
    for layout in ("rows", "columns", "split", "packed"):
        if layout in layouts_for(d_in, d_out, CPU, dtype, compiled=False):
            kept = [make_product(torch.randn(d_out, d_in).to(dtype), None, layout) for _ in range(count)]
            cost = medians({layout: lambda kept=kept: [product(x) for product in kept]}, 1, 5)[layout]
            cells[layout] = f"{count * size / cost / 1e9:.0f}"
    cells = {layout: cells.get(layout, "-") for layout in ("rows", "columns", "split", "packed")}
    return f"| {dtype} | {name}, {d_in} to {d_out} | " + " | ".join(cells.values()) + " |"


def engines(dtype: torch.dtype, model: torch.nn.Module) -> str:
    """A row: tokens per second of the folded model with one layout, and with those that the engine chooses."""
    made = {layout: Engine(model, length=PROMPT + STEPS, dtype=dtype, layout=layout) for layout in ("columns", "auto")}
    prompt = torch.randint(1000, (1, PROMPT))

    def run(engine: Engine) -> float:
        tokens = engine.prefill(prompt).argmax(-1)

        def steps() -> None:
            nonlocal tokens
            for _ in range(STEPS):
                tokens = engine.step(tokens).argmax(-1)

        return STEPS / seconds(steps, CPU)

    rates = take_turns({name: partial(run, engine) for name, engine in made.items()}, 7)
    one, chosen = (statistics.median(rates[name]) for name in ("columns", "auto"))
    return f"| {dtype} | {one:.0f} | {chosen:.0f} | {in_words(made['auto'].layout)} |"


@torch.inference_mode()
def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    facts = about(command_line("", []), CPU)
    config = TransformerConfig.from_preset(PRESET)
    with torch.inference_mode(False):
        model = folded(tapered(random_model(config), "all"))
    dtypes = (torch.float32, torch.bfloat16)
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("python", "torch"))
    lines = ["# What the operations of a decode step cost", "", f"{facts['device']}; {versions}; {facts['commit']}."]
    lines += ["", "Microseconds per norm of one row:", "", "| dtype | width | F.rms_norm | composed | F.layer_norm |"]
    lines += ["|---|---|---|---|---|", *(norms(dtype, width) for dtype in dtypes for width in WIDTHS)]
    lines += [
        "",
        "GB/s of one row's product, by the matrix's layout:",
        "",
        "| dtype | product | rows | columns | split | packed |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    lines += [products(dtype, name, *shape) for dtype in dtypes for name, shape in shapes_of(config).items()]
    lines += ["", f"Tokens/s of {PRESET}, folded, one layout and the chosen ones:", ""]
    lines += ["| dtype | columns | chosen | which |", "|---|---|---|---|", *(engines(dtype, model) for dtype in dtypes)]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out is not None:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
