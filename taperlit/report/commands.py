"""The commands that make what a run's folder lacks."""

import shlex
from pathlib import Path

from taperlit.report.run import Run


def can_go_on(run: Run) -> bool:
    """Whether a run left what it takes to train on, or to evaluate it: its config and a checkpoint."""
    return run.checkpoint is not None and "config.yaml" in run.configs


def go_on(run: Run) -> str:
    """Train on from the last checkpoint."""
    return f"taperlit fit {_from_config(run)}"


def watch(run: Run) -> str:
    """Train again with the callback that logs what a taper does."""
    return f"taperlit fit --config {_quoted(run.folder / 'config.yaml')} --taper.monitor=true"


def fold(run: Run) -> str:
    """Fold the last checkpoint."""
    return f"taperlit fold --ckpt {_quoted(run.checkpoint)}"


def predict(run: Run) -> str:
    """Write the log-probability of every held-out token, from which this page has the tails."""
    return f"taperlit predict {_from_config(run)}"


def measure(run: Run) -> str:
    """Measure decoding before and after folding."""
    return f"taperlit report {_quoted(run.folder)} --measure"


def export(run: Run) -> str:
    """Write the folded model for transformers."""
    return f"taperlit export --to transformers --model {_quoted(run.folded[0])}"


def _from_config(run: Run) -> str:
    return f"--config {_quoted(run.folder / 'config.yaml')} --ckpt_path {_quoted(run.checkpoint)}"


def _quoted(path: Path | None) -> str:
    return shlex.quote(str(path))
