"""The stored runs as the page needs them: read, told apart, grouped into setups, and picked for an experiment."""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from paper_harness.experiments import FIVE, PEERS
from paper_harness.ideas import OURS
from paper_harness.runs import NO_EMBED_NORM, PAPER, hash_of
from paper_harness.sizes import SIZES
from taperlit.errors import TaperlitError

Record = dict[str, Any]
BASELINE = "baseline"
TITLES = {
    BASELINE: "baseline",
    "internal": "Internal-Taper",
    "internal_aux": "Internal-Taper +aux",
    "all": "All-Taper",
    "all_aux": "All-Taper +aux",
    "fakeln": "FakeLN",
    "dyt": "DyT",
    "derf": "Derf",
}
TAPERED = tuple(variant for variant in FIVE if variant != BASELINE)
WITH_FINAL_NORM = (BASELINE, "internal", "internal_aux")
PRETRAIN_LENGTH = 10.0  # tokens per parameter
ENOUGH_SEEDS = 3


class Schedule(NamedTuple):
    """What the taper's own dials were; boundaries are fractions of the run."""

    warmup: float | str  # or auto
    end: float | str
    shape: str
    ema_rate: float
    weight: float | None  # lambda; None without the scale loss


PAPERS = Schedule(**PAPER)


class Setup(NamedTuple):
    """What runs share that are compared with each other: all but the variant, its dials, the seed and the length."""

    size: str
    corpus: str
    corpus_sha256: str
    lr: float
    rest: str  # a digest of the options of model, data and trainer

    def title(self) -> str:
        """For a heading."""
        return f"{self.size}, {self.corpus}, learning rate {self.lr:g}"


@dataclass(frozen=True)
class StoredRun:
    """One record of a run that was done.

    Args:
        record: as it is stored.
    """

    record: Record

    @property
    def settings(self) -> Record:
        """What determines the result."""
        return self.record["settings"]

    @property
    def result(self) -> Record:
        """What came out."""
        return self.record["result"]

    @cached_property
    def key(self) -> str:
        """The hash of the settings, under which it is stored."""
        return hash_of(self.settings)

    @property
    def variant(self) -> str:
        """The overlay of ``configs/taper``."""
        return self.settings["variant"]

    @property
    def idea(self) -> str:
        """What it tries, a name in ``IDEAS``; empty of the paper's own settings."""
        return self.settings.get("idea", "")

    @property
    def draw(self) -> int | None:
        """Its number in `short`; None of all others."""
        return self.settings.get("draw")

    @property
    def seed(self) -> int:
        """Of the initial weights and the order of the data."""
        return self.settings["seed"]

    @property
    def length(self) -> float:
        """Tokens per parameter."""
        return float(self.settings["tokens_per_parameter"])

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.settings["steps"]

    @property
    def place(self) -> tuple[str, str, str, float, float]:
        """Size, corpus, its text's hash, learning rate and length: where an idea has its rivals."""
        return *self.setup[:4], self.length

    @cached_property
    def loss(self) -> float:
        """The last validation loss; NaN of a run that diverged."""
        curve = self.curve("val")
        return math.nan if self.result.get("diverged") or not curve else curve[-1][1]

    @property
    def arrived(self) -> bool:
        """Whether it came to its end with a finite loss."""
        return math.isfinite(self.loss)

    @cached_property
    def fate(self) -> str:
        """How it diverged, in a few words; empty of a run that arrived."""
        if self.arrived:
            return ""
        told = self.result.get("diverged")
        if not told:
            return "diverged: the last validation loss is not finite"
        gate = told.get("gate")
        return f"diverged at step {told['step']}" + ("" if gate is None else f", gate {gate:.2f}")

    def curve(self, name: str) -> list[tuple[float, float]]:
        """``val`` or ``train``, or a trace: (step, value) pairs; a value that is missing is NaN."""
        points = self.result.get(name) if name in ("val", "train") else self.result.get("traces", {}).get(name)
        return [(step, math.nan if value is None else float(value)) for step, value in points or ()]

    def tail(self, name: str) -> float | None:
        """A figure of LossTails, with or without the stage before its name."""
        tails = self.result.get("tails") or {}
        value = tails.get(name, tails.get(f"val/{name}"))
        return None if value is None or not self.arrived else float(value)

    def random(self, name: str) -> float | None:
        """A figure of the trained model on random tokens."""
        value = (self.result.get("random") or {}).get(name)
        return None if value is None or not self.arrived else float(value)

    @cached_property
    def setup(self) -> Setup:
        """What it shares with the runs it is compared with."""
        own = self.settings
        return Setup(own["size"], own["corpus"], own.get("corpus_sha256", ""), float(own["lr"]), self._rest())

    def _rest(self) -> str:
        config = self.settings.get("config") or {}
        own = {"model": ("taper", "taper_bias", "lr"), "data": ("seed", "max_tokens", "max_documents")}
        kept: dict[str, Any] = {
            section: {key: value for key, value in (config.get(section) or {}).items() if key not in left_out}
            for section, left_out in own.items()
        }
        shape = kept["model"].get("overrides") or {}
        if self.variant in NO_EMBED_NORM and "embed_norm" in shape:
            kept["model"]["overrides"] = {**shape, "embed_norm": True}  # which its rivals have
        trainer = config.get("trainer") or {}
        kept["trainer"] = {
            key: trainer.get(key) for key in ("precision", "gradient_clip_val", "accumulate_grad_batches")
        }
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]

    @cached_property
    def schedule(self) -> Schedule | None:
        """The taper's dials; None of a variant that has none. One that the config does not name is the paper's.

        A boundary in steps becomes a fraction of the run.
        """
        if self.variant not in TAPERED:
            return None
        taper = (self.settings.get("config") or {}).get("taper") or {}

        def dial(place: str, name: str, default: Any) -> Any:
            spec = taper.get(place) or {}
            value = (spec.get("init_args") or {}).get(name)
            return default if value is None else value

        def fraction(value: int | float | str) -> float | str:
            return (
                value if isinstance(value, str) else round(value / self.steps if isinstance(value, int) else value, 4)
            )

        return Schedule(
            fraction(dial("gate", "warmup", PAPERS.warmup)),
            fraction(dial("gate", "end", PAPERS.end)),
            dial("gate", "shape", PAPERS.shape),
            dial("alignment", "ema_rate", PAPERS.ema_rate),
            dial("anchor", "weight", PAPERS.weight) if self.variant.endswith("_aux") else None,
        )

    @property
    def standard(self) -> bool:
        """Whether the taper's dials are the paper's."""
        return not self.idea and self.schedule in (None, PAPERS, PAPERS._replace(weight=None))


def read_records(folder: Path) -> list[Record]:
    """The records under a folder, by name.

    Raises:
        TaperlitError: a file is not a record.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            known = isinstance(record["settings"], dict) and isinstance(record["result"], dict)
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise TaperlitError(f"{path} is not a record of a run; remove it, and its run is done again.")
        records.append(record)
    return records


class Picked(NamedTuple):
    """Runs without doubles, and those that newer ones stand for."""

    runs: list[StoredRun]
    superseded: list[StoredRun]


def without_doubles(runs: Iterable[StoredRun]) -> Picked:
    """Of runs that differ in nothing a table tells apart, the newest: they are one cell, and not each other's mean."""
    cells: dict[Any, list[StoredRun]] = defaultdict(list)
    for run in {run.key: run for run in runs}.values():
        cells[run.setup, run.length, run.variant, run.schedule, run.idea, run.seed, run.draw].append(run)
    picked = Picked([], [])
    for alike in cells.values():
        *older, newest = sorted(alike, key=lambda run: (run.record.get("ran", {}).get("date") or "", run.key))
        picked.runs.append(newest)
        picked.superseded.extend(older)
    return picked


def variants_of(runs: Iterable[StoredRun]) -> list[str]:
    """The variants there are, in the order of the titles; unknown ones last."""
    known = list(TITLES)
    return sorted({run.variant for run in runs}, key=lambda name: (known.index(name) if name in known else 99, name))


def title(variant: str) -> str:
    """A variant's name in tables and figures."""
    return TITLES.get(variant, variant)


def corpus_names(runs: Iterable[StoredRun]) -> dict[tuple[str, str], str]:
    """The name of each text by corpus and hash; one of several of a corpus has the first digits of its hash."""
    texts = {(run.setup.corpus, run.setup.corpus_sha256) for run in runs}
    several = Counter(corpus for corpus, _ in texts)
    return {(corpus, text): f"{corpus} {text[:8]}" if several[corpus] > 1 else corpus for corpus, text in texts}


def seeds_of(runs: Iterable[StoredRun]) -> list[int]:
    """The seeds there are, in order."""
    return sorted({run.seed for run in runs})


def grouped(runs: Sequence[StoredRun], key: Callable[[StoredRun], Any]) -> dict[Any, list[StoredRun]]:
    """The runs by a key, the largest group first."""
    groups: dict[Any, list[StoredRun]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def pretrain_runs(runs: Iterable[StoredRun]) -> list[StoredRun]:
    """The runs at the paper's dials, of a length at which the variants were compared.

    That is ten tokens per parameter, or a length where more variants ran than `length` asks for. A setup without such
    a length gives all that are not a part of `schedule`. A baseline with nothing but peers beside it, where `ours` ran,
    is left to that.
    """
    runs = [*runs]
    places = {run.place for run in runs if run.idea == OURS}

    def for_ours(own: Sequence[StoredRun]) -> bool:
        return own[0].place in places and {run.variant for run in own} <= {BASELINE, *PEERS}

    every = [run for run in runs if not run.idea]
    tried = {(run.setup, run.length) for run in every if not run.standard}
    standard = [run for run in every if run.standard]
    chosen: list[StoredRun] = []
    for alike in grouped(standard, lambda run: run.setup).values():
        lengths = {length: own for length, own in grouped(alike, lambda run: run.length).items() if not for_ours(own)}
        compared = [
            own
            for length, own in lengths.items()
            if length == PRETRAIN_LENGTH or {run.variant for run in own} - {BASELINE, "internal_aux", "all_aux"}
        ]
        others = [
            own
            for length, own in lengths.items()
            if (own[0].setup, length) not in tried and {run.variant for run in own} != {BASELINE}
        ]
        chosen += [run for own in compared or others for run in own]
    return chosen or standard


def five_variants(runs: Iterable[StoredRun]) -> list[StoredRun]:
    """`pretrain`'s runs of the paper's own variants."""
    return [run for run in pretrain_runs(runs) if run.variant in FIVE]


def length_runs(runs: Iterable[StoredRun]) -> list[StoredRun]:
    """The runs at the paper's dials of the variants that ran at two lengths at least, or all of them where none did.

    Peers are left to `pretrain` and `ours`; a baseline whose rivals all try something, or are peers, is theirs.
    """
    standard = [run for run in runs if run.standard and run.variant not in PEERS]
    rivals = {run.setup for run in standard if run.variant != BASELINE}
    standard = [run for run in standard if run.setup in rivals] or standard
    lengths: dict[Any, set[float]] = defaultdict(set)
    for run in standard:
        lengths[run.setup, run.variant].add(run.length)
    return [run for run in standard if len(lengths[run.setup, run.variant]) > 1] or standard


def schedule_runs(runs: Iterable[StoredRun]) -> list[StoredRun]:
    """The variants that were run at other dials than the paper's, at those seeds, and the baselines beside them.

    Other seeds of the paper's own dials are left to the other experiments: a cell is compared with a cell.
    """
    every = [run for run in runs if not run.idea and (run.schedule is not None or run.variant == BASELINE)]
    tried = {(run.setup, run.length, run.seed, run.variant) for run in every if not run.standard}
    places = {place[:3] for place in tried}
    return [
        run
        for run in every
        if (run.setup, run.length, run.seed, run.variant) in tried
        or (run.variant == BASELINE and (run.setup, run.length, run.seed) in places)
    ]


def idea_runs(runs: Iterable[StoredRun]) -> list[StoredRun]:
    """The runs that try something, and those at the paper's own settings beside them."""
    every = [*runs]
    places = {run.place for run in every if run.idea}
    return [run for run in every if run.place in places and (run.idea or run.standard) and run.variant in FIVE]


def our_runs(runs: Iterable[StoredRun]) -> list[StoredRun]:
    """The runs of ours, their baselines and peers, and those of the plain size at the paper's own settings beside
    them."""
    every = [*runs]
    places = {run.place for run in every if run.idea == OURS and run.variant in FIVE}
    plain = {(SIZES[size].plain, corpus, length) for size, corpus, _, _, length in places if size in SIZES}
    return [
        run
        for run in every
        if (run.place in places and (run.idea == OURS or (run.standard and run.variant in (BASELINE, *PEERS))))
        or ((run.settings["size"], run.settings["corpus"], run.length) in plain and _beside_ours(run))
    ]


def _beside_ours(run: StoredRun) -> bool:
    """A run of a plain size at its own learning rate, with the paper's settings."""
    own_rate = run.setup.lr == SIZES[run.setup.size].lr
    return own_rate and run.standard and run.variant in (BASELINE, "internal_aux", "all_aux")


def drawn_runs(runs: Iterable[StoredRun]) -> list[StoredRun]:
    """The runs that were drawn at random; no other experiment has them."""
    return [run for run in runs if run.draw is not None]


def not_drawn(runs: Iterable[StoredRun]) -> list[StoredRun]:
    """All others."""
    return [run for run in runs if run.draw is None]


Pick = Callable[[Iterable[StoredRun]], list[StoredRun]]


def _of_not_drawn(pick: Pick) -> Pick:
    return lambda runs: pick(not_drawn(runs))


PICK: dict[str, Pick] = {
    "pretrain": _of_not_drawn(pretrain_runs),
    "length": _of_not_drawn(length_runs),
    "gradnorm": _of_not_drawn(five_variants),
    "logit_chasing": _of_not_drawn(five_variants),
    "schedule": _of_not_drawn(schedule_runs),
    "ideas": _of_not_drawn(idea_runs),
    "ours": _of_not_drawn(our_runs),
    "short": drawn_runs,
}
