"""What the page cannot tell yet, and the one command that makes each of it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paper_harness.experiments import EXPERIMENTS, Options
from paper_harness.records import PAPERS, TAPERED, Schedule, StoredRun, not_drawn
from paper_harness.runs import PAPER, Run
from paper_harness.sections import decode, finetune
from paper_harness.sizes import SIZES

PAPERS_SIZES = tuple(name for name in SIZES if name.startswith("small_"))
PAPERS_SEEDS = range(6)
GPT2 = ("small", "medium", "large", "xl")
PAPERS_CORPUS = "tinystories"


class Missing(NamedTuple):
    """Something that is not there.

    Args:
        what: it is.
        needs: to be made: a hub, a GPU; empty where two cores will do.
        command: that makes it.
    """

    what: str
    needs: str
    command: str


def missing(runs: Sequence[StoredRun], out: Path) -> list[Missing]:
    """What is missing, the runs of this page's own setups first.

    Args:
        runs: that are stored.
        out: folder of the results.
    """
    found = []
    runs = not_drawn(runs)
    own = dict.fromkeys((run.setup.size, run.setup.corpus) for run in runs)
    for size, corpus in own:
        if size in SIZES:
            found += _of_setup(runs, size, corpus)
    for size in PAPERS_SIZES:
        if (size, PAPERS_CORPUS) not in own:
            seeds = " ".join(map(str, PAPERS_SEEDS))
            command = f"tools/paper pretrain --size {size} --corpus {PAPERS_CORPUS} --seeds {seeds} --workers 1"
            found.append(Missing(f"the paper's {size}, on TinyStories", "a GPU, and a hub", command))
    if finetune.find(out) is None:
        found.append(Missing("fine-tuning SmolLM2", "", "tools/paper finetune"))
    for size in GPT2:
        command = f"taperlit fit --config configs/finetune/gpt2_{size}_owt.yaml --config configs/taper/all_aux.yaml"
        what = f"GPT-2 {size} on OpenWebText (the other variants by the other overlays of configs/taper)"
        found.append(Missing(what, "a GPU, and a hub", command))
    if not decode.find(out):
        found.append(Missing("decoding", "", "tools/paper decode"))
    if not any("cuda" in path.name for path in decode.find(out)):
        command = (
            "taperlit bench decode --device cuda --dtype bfloat16 --batch '[1, 4]' --prompt '[128, 256, 448]' "
            "--json docs/results/bench_decode_cuda.json"
        )
        found.append(Missing("decoding on a GPU, as the paper's", "a GPU", command))
    return found


def _of_setup(runs: Iterable[StoredRun], size: str, corpus: str) -> list[Missing]:
    """The runs of the experiments of one size and corpus that are not stored."""
    stored = {_key_of(run) for run in runs if run.setup.corpus == corpus}
    found = []
    # The others are views of the first, and what was tried is for whoever tries it.
    for name in ("ours",) if size.endswith("_unit") else ("pretrain", "length", "schedule"):
        wanted = {_key(run) for run in EXPERIMENTS[name](Options(size=size, corpus=corpus))}
        if left := wanted - stored:
            what = f"{len(left)} of the {len(wanted)} runs of `{name}` at {size} on {corpus}"
            needs = "a GPU, and a hub" if size in PAPERS_SIZES else ""
            found.append(Missing(what, needs, f"tools/paper {name} --size {size} --corpus {corpus}"))
    return found


def _key_of(run: StoredRun) -> Any:
    schedule = None if run.idea else run.schedule
    return run.setup.size, run.idea, run.variant, run.seed, run.length, run.setup.lr, schedule


def _key(run: Run) -> Any:
    """The same of a run to do."""
    schedule = None
    if run.variant in TAPERED and run.own_idea is None:
        schedule = Schedule(**{**PAPER, **run.method})
        if not run.variant.endswith("_aux"):
            schedule = schedule._replace(weight=None)
    lr = SIZES[run.size].lr if run.lr is None else run.lr
    return run.size, run.own_idea or "", run.variant, run.seed, float(run.tokens_per_parameter), float(lr), schedule


def dials() -> str:
    """The paper's, in words."""
    return (
        f"gate warm-up {PAPERS.warmup:.0%} and end {PAPERS.end:.0%} of the run, {PAPERS.shape}, EMA rate "
        f"{PAPERS.ema_rate:g}, lambda {PAPERS.weight:g}"
    )
