"""What stands on a page about a run beside its traces, or one line on why it does not."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar
from xml.etree.ElementTree import Element

from taperlit.errors import TaperlitError
from taperlit.report.benches import Bench, find_benches, read_bench
from taperlit.report.folds import Fold, read_fold
from taperlit.report.markup import missing
from taperlit.report.run import CHECKPOINTS, Run
from taperlit.report.samples import Sample, make_samples
from taperlit.report.tails import Tails, tails_logged, tails_predicted

T = TypeVar("T")
PREDICTED = "checkpoints/last-predictions.jsonl"


class Wish(NamedTuple):
    """What samples are wanted.

    Args:
        samples: any at all.
        prompt: to continue; None continues the run's validation text.
        new_tokens: most tokens of each.
        seed: of the draws.
    """

    samples: bool = True
    prompt: str | None = None
    new_tokens: int = 120
    seed: int = 0


@dataclass
class Parts:
    """The parts of a page about one run; each is empty where the run has none.

    Args:
        folds: the records of its folded models.
        tails: of its token losses.
        samples: texts of its model.
        sampled: the model that they are of, in words.
        benches: measurements in its folder.
        problems: a line for each that is there and could not be read, by the part's name.
    """

    folds: list[Fold] = field(default_factory=list)
    tails: list[Tails] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    sampled: str = ""
    benches: list[Bench] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)

    def read(self, part: str, readers: Iterable[Callable[[], T]]) -> list[T]:
        """What the readers return; the error of one that fails becomes a problem of the part."""
        found = []
        for reader in readers:
            try:
                found.append(reader())
            except TaperlitError as error:
                self.problems.setdefault(part, []).append(str(error))
        return found

    def complaints(self, part: str) -> list[Element]:
        """A line for each problem of a part."""
        return [missing(line) for line in self.problems.get(part, [])]


def read_parts(run: Run, wish: Wish) -> Parts:
    """Read what a run's folder has, and make its samples."""
    parts = Parts()
    parts.folds = parts.read("fold", (partial(read_fold, path) for path in run.folded))
    parts.benches = parts.read("bench", (partial(read_bench, path) for path in find_benches(run.folder)))
    parts.tails = tails_logged(run.traces)
    if (predicted := run.folder / PREDICTED).exists():
        parts.tails += parts.read("tails", [partial(tails_predicted, predicted)])
    models = [*run.folded, *([run.checkpoint] if run.checkpoint is not None else [])]
    if wish.samples and models:
        last = run.folder / CHECKPOINTS[0]
        text = last if last.exists() else run.checkpoint
        made = parts.read("samples", [partial(make_samples, models[0], text, wish.prompt, wish.new_tokens, wish.seed)])
        step = next((each.step for each in parts.folds if each.folder == models[0]), None)
        parts.samples = [sample for each in made for sample in each]
        parts.sampled = f"{models[0].name}{run.earlier(step)}"
    return parts
