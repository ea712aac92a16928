"""The tails of a run's token losses: as its traces have them, or from what ``taperlit predict`` wrote."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from taperlit.checkpoint.plain import cannot_be_read, check_file
from taperlit.errors import TaperlitError
from taperlit.report.traces import Points

FIGURES = {  # as taperlit.metrics.TokenLossTails names them
    "loss_mean": "mean",
    "loss_median": "median",
    "loss_p999": "99.9%",
    "loss_max": "largest",
    "loss_nonfinite": "not finite",
    "tokens_risen": "risen against the reference",
    "share_risen": "share of them",
    "rise_mean": "mean rise",
    "rise_max": "largest rise",
}
BY_POSITION = "loss_at/"
BLOCKS_AT_ONCE = 256
MEND = "run it again"


class Tails(NamedTuple):
    """Figures of a split's token losses, in nats.

    Args:
        source: where they come from, in words.
        figures: by the keys of :data:`FIGURES`.
        by_position: the mean loss in each range of positions, such as ``2-3``.
        step: optimizer steps that the run had taken, or None where that was not stored, or where ``source`` says it.
    """

    source: str
    figures: dict[str, float]
    by_position: dict[str, float]
    step: int | None = None


def tails_logged(traces: Mapping[str, Points]) -> list[Tails]:
    """The last figures of each split that a run logged with LossTails."""
    found = []
    for split in ("val", "test"):
        if points := traces.get(f"{split}/loss_max"):
            last = {tag.removeprefix(f"{split}/"): each[-1][1] for tag, each in traces.items() if each}
            if means := traces.get(f"{split}/loss"):
                last["loss_mean"] = means[-1][1]
            found.append(_sorted(f"logged as {split}/ at step {points[-1][0] + 1:,}", last))
    return found


def tails_predicted(path: Path) -> Tails:
    """The figures of the log-probabilities that ``taperlit predict`` wrote.

    Args:
        path: of the first process's file; those of the others lie beside it, with a number behind the name.

    Raises:
        TaperlitError: a line that is no block's, or lines of different steps.
    """
    import torch

    from taperlit.metrics import TokenLossTails

    tails = TokenLossTails()
    paths = [path, *sorted(path.parent.glob(f"{path.name}.[0-9]*"))]
    lots: dict[int, list[list[float]]] = {}
    steps: set[int | None] = set()

    def count(lot: list[list[float]]) -> None:
        losses = -torch.tensor(lot)  # (B, T)
        tails.update(losses, torch.zeros(len(lot), losses.shape[1] + 1, dtype=torch.long))

    for step, logprobs in (block for each in paths for block in _blocks(each)):
        steps.add(step)
        lot = lots.setdefault(len(logprobs), [])
        lot.append(logprobs)
        if len(lot) == BLOCKS_AT_ONCE:
            count(lots.pop(len(logprobs)))
    for lot in lots.values():
        count(lot)
    figures = {key: value.item() for key, value in tails.compute().items() if value.dim() == 0}
    if "loss_mean" not in figures:
        raise TaperlitError(f"{path} has no tokens; run `taperlit predict` again.")
    if len(steps) > 1:
        raise TaperlitError(f"{path} and the files beside it are of different steps; run `taperlit predict` again.")
    found = _sorted(f"{figures['tokens']:,} tokens in {path.name}, by taperlit predict", figures)
    return found._replace(step=steps.pop())


def _sorted(source: str, figures: Mapping[str, float]) -> Tails:
    by_position = {
        key.removeprefix(BY_POSITION): value for key, value in figures.items() if key.startswith(BY_POSITION)
    }
    return Tails(source, {key: figures[key] for key in FIGURES if key in figures}, by_position)


def _blocks(path: Path) -> Iterator[tuple[int | None, list[float]]]:
    """The step and the log-probabilities of each line."""
    check_file(path, MEND)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    # Not parse_json, which takes no NaN: a model that is not finite has predicted some.
                    block = json.loads(line.decode("utf-8"))
                    step = block.get("step")
                    yield None if step is None else int(step), [float(value) for value in block["logprobs"]]
                except (AttributeError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                    raise TaperlitError(f"{path}, line {number}, is no block of `taperlit predict`; {MEND}.") from error
    except OSError as error:
        raise cannot_be_read(path, error, MEND) from error
