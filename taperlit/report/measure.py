"""Measure what folding brought to a run's model: equal logits, and tokens a second."""

from pathlib import Path

from taperlit.errors import TaperlitError
from taperlit.report.benches import BEFORE_AND_AFTER
from taperlit.report.run import Run

ROUNDS = 7
ANOTHER_MODEL = 1e-2  # of the largest logit: far above what float32 rounds


def measure_fold(run: Run, command: str) -> Path:
    """Compare a run's folded model with its checkpoint, and write the figures into the run's folder.

    Logits are compared on the validation blocks that the checkpoint keeps; the decoding of both takes turns.

    Args:
        run: with a ``last.ckpt`` and a folded model.
        command: as it was typed, for the record.

    Returns:
        The file.

    Raises:
        TaperlitError: one of them is missing, unreadable, or of a model that is not decoded.
    """
    if not run.folded or run.checkpoint is None or run.checkpoint.name != "last.ckpt":
        missing = "checkpoints/last.ckpt" if run.folded else "folded model"
        raise TaperlitError(f"{run.folder} has no {missing}, so there is nothing to measure; leave --measure out.")
    import torch

    from taperlit.bench.decode import compare_decoding
    from taperlit.bench.machine import about
    from taperlit.bench.results import Row, write_json
    from taperlit.checkpoint.folded import load_checkpoint, load_model
    from taperlit.compare import largest_difference
    from taperlit.hub.families import as_transformer

    before, after = load_checkpoint(run.checkpoint), load_model(run.folded[0])
    if before.sample is None:
        raise TaperlitError(f"{run.checkpoint} keeps no validation text to compare on; leave --measure out.")
    models = {"before folding": as_transformer(before.model), "after folding": after.model}
    tokens = before.sample[:, :-1].long()
    with torch.no_grad():
        difference = largest_difference(*(model(tokens) for model in models.values()))
    if not difference < ANOTHER_MODEL:
        raise TaperlitError(
            f"{run.folded[0]} is not {run.checkpoint} folded: their logits differ by {difference:.2g} of the largest; "
            "fold that checkpoint again, with `taperlit fold --force`."
        )
    compared = compare_decoding(models, rounds=ROUNDS)
    rows: list[Row] = [
        {
            "variant": each.name,
            "tokens_per_s": each.rate,
            "ratio": each.ratio,
            "low": each.low,
            "high": each.high,
            "rounds": ROUNDS,
        }
        for each in compared
    ]
    rows[-1].update(logit_difference=difference, compared_tokens=tokens.numel())
    path = run.folder / BEFORE_AND_AFTER
    write_json(path, about(command, torch.device("cpu")), rows)
    return path
