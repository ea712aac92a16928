#!/usr/bin/env python3
"""Draw what folding gains over width and batch, from what `taperlit bench decode --json` wrote.

tools/plot_decode.py docs/results/decode_curves.json docs/decode_curves.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from taperlit.transformer import TransformerConfig

STYLES = {"folded": "-", "explicit": ":"}


def main() -> None:
    """One panel per backend: a line per batch, over the width of the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("png", type=Path)
    args = parser.parse_args()
    written = json.loads(args.json.read_text())
    rows = [row for row in written["rows"] if row["variant"] in STYLES and row["ratio"] is not None]
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    figure, panels = pyplot.subplots(
        1, len(backends), figsize=(5 * len(backends), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, backend in zip(panels[0], backends, strict=True):
        for color, batch in enumerate(batches):
            for variant, style in STYLES.items():
                own = [r for r in rows if (r["backend"], r["batch"], r["variant"]) == (backend, batch, variant)]
                points = sorted((TransformerConfig.from_preset(r["preset"]).d_model, r) for r in own)
                widths = [width for width, _ in points]
                label = f"batch {batch}" if variant == "folded" else None
                panel.plot(widths, [r["ratio"] for _, r in points], style, color=f"C{color}", marker="o", label=label)
                if variant == "folded":
                    low, high = ([r[key] for _, r in points] for key in ("low", "high"))
                    panel.fill_between(widths, low, high, color=f"C{color}", alpha=0.1)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("d_model")
        panel.set_title(f"{backend}, {rows[0]['dtype']}")
    panels[0][0].set_ylabel("tokens/s by that of the normalized model\n(solid: folded, dotted: explicit)")
    panels[0][-1].legend()
    figure.savefig(args.png, dpi=120)


if __name__ == "__main__":
    main()
