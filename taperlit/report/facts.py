"""A run in a few words and figures."""

import math
from typing import Any

from taperlit.report.run import Run
from taperlit.report.scales import figure

PYTHON = "Python's standard library"  # what data.files null means


def facts_of(run: Run) -> list[tuple[str, str]]:
    """(what, how much) pairs; what the run's files do not tell is left out."""
    found = [
        ("model", _model(run)),
        ("norms tapered", _tapered(run)),
        ("text", _text(run)),
        ("tokens per step", _batch(run)),
        ("peak learning rate", _plain(run.option("model.lr"))),
        ("gradients clipped at", _plain(run.option("trainer.gradient_clip_val"))),
        ("precision", _plain(run.option("trainer.precision"))),
        ("seed", _plain(run.option("seed_everything"))),
        ("optimizer steps", _steps(run)),
        ("tokens seen", figure(_whole(run.last("train/tokens")))),
        ("tokens per second", figure(_whole(run.last("train/tokens_per_s")))),
        ("last validation loss", figure(run.last("val/loss"))),
        ("gate at the end", figure(run.last("taper/gate"))),
    ]
    return [(what, how) for what, how in found if how]


def _model(run: Run) -> str:
    source = run.option("model.pretrained") or run.option("model.preset")
    changes = run.option("model.overrides")
    if source is None:
        return ""
    if isinstance(changes, dict) and changes:
        return f"{source} with {', '.join(f'{name} {value}' for name, value in changes.items())}"
    return str(source)


def _tapered(run: Run) -> str:
    taper = run.option("model.taper")
    if taper is None:
        return ""
    return f"{taper}, with the scale loss" if run.option("taper.anchor") else str(taper)


def _text(run: Run) -> str:
    data = run.option("data")
    if not isinstance(data, dict):
        return ""
    files = data.get("files")
    return str(data.get("hub") or (", ".join(files) if isinstance(files, list) else files) or PYTHON)


def _batch(run: Run) -> str:
    try:
        blocks = run.option("data.batch_size") * (run.option("trainer.accumulate_grad_batches") or 1)
        return f"{blocks * run.option('data.block_size'):,} per process"
    except TypeError:
        return ""


def _steps(run: Run) -> str:
    most = run.option("trainer.max_steps")
    if not run.steps:
        return ""
    return f"{run.steps:,} of {most:,}" if isinstance(most, int) and most > 0 else f"{run.steps:,}"


def _plain(value: Any) -> str:
    return "" if value is None or isinstance(value, dict | list) else str(value)


def _whole(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else round(value)
