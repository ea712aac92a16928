"""What was measured, as a table, as JSON and as a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taperlit.checkpoint.atomic import write_file
from taperlit.errors import TaperlitError

Row = dict[str, Any]


def shown(value: Any) -> str:
    """A value as a table has it: three significant digits, and nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Rows as aligned text.

    Args:
        rows: any mappings.
        columns: the heading of each key that is shown, in order. A column that no row has is left out. ``ratio`` is
            shown with its spread.
    """
    keys = [key for key in columns if any(row.get(key) is not None for row in rows)]
    lines = [[columns[key] for key in keys]]
    for row in rows:
        cells = [shown(row.get(key)) for key in keys]
        if "ratio" in keys and row.get("ratio") is not None:
            text = f"{row['ratio']:.2f}x"
            if row.get("low") is not None:
                text += f" ({row['low']:.2f} to {row['high']:.2f})"
            cells[keys.index("ratio")] = text
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    numbers = [any(isinstance(row.get(key), int | float) for row in rows) and key != "ratio" for key in keys]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in lines
    )


def write_json(path: str | Path, about: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write what was measured, whole or not at all.

    Args:
        path: of the file.
        about: see :func:`taperlit.bench.machine.about`.
        rows: see the commands.

    Raises:
        TaperlitError: it cannot be written.
    """
    content = json.dumps({**about, "rows": list(rows)}, indent=1, allow_nan=False) + "\n"
    write_file(Path(path), lambda partial: partial.write_text(content))


def write_png(path: str | Path, title: str, rows: Sequence[Row], groups: Sequence[str]) -> None:
    """Draw the ratios as bars with their spread, whole or not at all.

    Args:
        path: of the file.
        title: above the picture.
        rows: with ``variant``, ``ratio``, ``low`` and ``high``.
        groups: keys by whose values rows stand together.

    Raises:
        TaperlitError: matplotlib is missing, or it cannot be written.
    """
    pyplot = _pyplot()
    measured = [row for row in rows if row.get("ratio") is not None]
    names = list(dict.fromkeys(", ".join(str(row[key]) for key in groups if key in row) for row in measured))
    variants = list(dict.fromkeys(row["variant"] for row in measured))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.2 + 0.35 * len(measured)), 4.5), layout="constrained")
    width = 0.8 / max(1, len(variants))
    for i, variant in enumerate(variants):
        own = [row for row in measured if row["variant"] == variant]
        places = [names.index(", ".join(str(row[key]) for key in groups if key in row)) for row in own]
        ratio = [row["ratio"] for row in own]
        below = [row["ratio"] - row["low"] for row in own]
        above = [row["high"] - row["ratio"] for row in own]
        axes.bar(
            [place + (i - (len(variants) - 1) / 2) * width for place in places],
            ratio,
            width,
            yerr=[below, above],
            label=variant,
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set_ylabel(f"rate / {variants[0]}" if variants else "ratio")
    axes.set_title(title)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    write_file(Path(path), lambda partial: figure.savefig(partial, format="png", dpi=120))
    pyplot.close(figure)


def check_paths(json_path: str | None, png_path: str | None) -> None:
    """Refuse files that could not be written, before anything is measured.

    Raises:
        TaperlitError: one is a folder, or its folder is missing, or matplotlib is and a picture is asked for.
    """
    for path in (json_path, png_path):
        if path is not None and Path(path).is_dir():
            raise TaperlitError(f"{path} is a folder; name a file.")
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise TaperlitError(f"{path}: there is no folder {Path(path).absolute().parent}; make it first.")
    if png_path is not None:
        _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise TaperlitError("--png needs matplotlib; pip install 'taperlit[plot]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
