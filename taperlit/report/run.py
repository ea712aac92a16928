"""One run as its folder has it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from taperlit.checkpoint.plain import damaged, read_text
from taperlit.errors import TaperlitError
from taperlit.report.locate import find_run
from taperlit.report.phases import Phases, Zone, find_phases
from taperlit.report.traces import Points, read_traces

CONFIGS = ("config.yaml", "config.resumed.yaml", "hparams.yaml")  # the last where the command line did not write one
CHECKPOINTS = ("checkpoints/last.ckpt", "checkpoints/best.ckpt")
MEND = "the page is without it"
FOLDED = ("checkpoints/last-folded", "folded", "checkpoints/best-folded")


@dataclass(frozen=True)
class Run:
    """What a report tells of a run.

    Args:
        folder: of the run.
        configs: the text of each config by its file's name, as it stands there.
        config: the newest of them as plain data; empty where it cannot be read.
        traces: see :func:`taperlit.report.traces.read_traces`.
        phases: of its gate, or None.
        checkpoint: the newest weights, or None.
        steps: the last optimizer step that a trace has, counted from 1; 0 without traces.
        problems: a line each on what could not be read.
    """

    folder: Path
    configs: dict[str, str]
    config: Mapping[str, Any]
    traces: dict[str, Points]
    phases: Phases | None
    checkpoint: Path | None
    steps: int
    problems: list[str] = field(default_factory=list)

    def option(self, path: str) -> Any:
        """A config's value by its dotted name; None where it has none."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def last(self, tag: str) -> float | None:
        """The last value of a trace; None where there is none."""
        points = self.traces.get(tag)
        return points[-1][1] if points else None

    def earlier(self, step: int | None) -> str:
        """Words for what was made of the run before its last step; nothing where it was not, or that is not known."""
        return f", of step {step:,} of {self.steps:,}" if step is not None and step < self.steps else ""

    @property
    def zones(self) -> list[Zone]:
        """Its phases, as far as it got."""
        return [] if self.phases is None else self.phases.zones(self.steps)

    @property
    def folded(self) -> list[Path]:
        """Its folded models, the one first that ``taperlit fold`` compared on the run's own text."""
        return [path for name in FOLDED if (path := self.folder / name).is_dir()]


def read_run(path: str | Path) -> Run:
    """Read a run.

    Args:
        path: see :func:`taperlit.report.locate.find_run`.

    Raises:
        TaperlitError: there is no run, or its traces are damaged.
    """
    folder = find_run(path)
    traces = read_traces(folder)
    problems: list[str] = []
    configs = _read_configs(folder, problems)
    config = _parse(folder, configs, problems)
    checkpoint = next((folder / name for name in CHECKPOINTS if (folder / name).exists()), None)
    saved = None if checkpoint is None else _boundaries(checkpoint, problems)
    phases = find_phases(config, saved, traces.get("taper/gate", []))
    steps = max((points[-1][0] + 1 for points in traces.values() if points), default=0)
    return Run(folder, configs, config, traces, phases, checkpoint, steps, problems)


def names_of(runs: Iterable[Run]) -> list[str]:
    """A short name per run that tells it from the others: its logger's, with its version where that is needed."""
    folders = [run.folder.absolute() for run in runs]
    for parts in (slice(-2, -1), slice(-2, None), slice(-3, None)):
        names = ["/".join(folder.parts[parts]) or folder.name for folder in folders]
        if len({*names}) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read_configs(folder: Path, problems: list[str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name in CONFIGS:
        if (path := folder / name).is_file() and not (name == CONFIGS[-1] and texts):
            try:
                texts[name] = read_text(path, MEND)
            except TaperlitError as error:
                problems.append(str(error))
    return texts


def _parse(folder: Path, configs: dict[str, str], problems: list[str]) -> Mapping[str, Any]:
    for name, text in reversed(configs.items()):
        try:
            config = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problems.append(str(damaged(folder / name, error, MEND)))
            continue
        if isinstance(config, Mapping):
            return config
    return {}


def _boundaries(checkpoint: Path, problems: list[str]) -> tuple[int, int] | None:
    """The steps between which a checkpoint's run takes its gate from 1 to 0."""
    from taperlit.checkpoint.reader import open_checkpoint

    try:
        callbacks = open_checkpoint(checkpoint, verify=False).get("callbacks", {})
    except TaperlitError as error:
        problems.append(str(error))
        return None
    pair = callbacks.get("GateSchedule", {}).get("boundaries") or None
    return None if pair is None else (int(pair[0]), int(pair[1]))
