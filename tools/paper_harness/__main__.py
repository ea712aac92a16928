"""``tools/paper``: the command line."""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from paper_harness import commands, corpus, experiments, runs, workers
from paper_harness.ideas import IDEAS
from paper_harness.runs import POLICIES
from paper_harness.sizes import SIZES
from taperlit.errors import TaperlitError

ROOT = Path(__file__).resolve().parents[2]
USAGE = """Reproduce the figures and tables of arXiv:2602.10408, each by its name.

    tools/paper pretrain                     # 8 variants, 3 seeds, on two cores; then docs/results/paper/pretrain.md
    tools/paper pretrain length schedule     # these together, a whole seed before the next
    tools/paper all --budget 120             # everything that can be begun within two hours, and the page
    tools/paper all --size small_30m --corpus tinystories --workers 1    # the paper's, on a GPU
    tools/paper report                       # the page again, from the stored records
    tools/paper length --list                # what would run, what is remembered, how long it takes

Every run is remembered under a hash of its settings, in runs/ of --out, and never done twice: run a command again to go
on where it was stopped, or with more seeds."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    names = [*experiments.EXPERIMENTS, *commands.COMMANDS]
    parser = argparse.ArgumentParser(
        prog="paper", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=[*names, "all", "report"], metavar="NAME", help=", ".join(names))
    parser.add_argument("--size", default="nano", choices=list(SIZES), help="of the model (default: nano)")
    parser.add_argument("--corpus", default="gcide", choices=list(corpus.CORPORA), help="(default: gcide)")
    parser.add_argument("--seeds", nargs="+", type=int, help="(default: the size's); schedule takes the first")
    parser.add_argument("--lengths", nargs="+", type=float, help="of length, ideas and ours, in tokens per parameter")
    parser.add_argument("--tokens-per-parameter", type=float, help="of pretrain, gradnorm, logit_chasing and ideas")
    parser.add_argument(
        "--lr",
        type=float,
        help="peak learning rate (default: the size's); short draws its own, and the plain size of ours keeps its",
    )
    parser.add_argument("--variants", nargs="+", choices=list(POLICIES), help="none but these, and the baseline")
    parser.add_argument(
        "--ideas", nargs="+", choices=list(IDEAS), help="of ideas (default: the size's) and short (default: none)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that train at once (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="of each of them (default: 1)")
    parser.add_argument("--accelerator", default="auto", help="as Lightning names it (default: auto)")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile, which pays in long runs")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="begin no run after these")
    parser.add_argument("--out", type=Path, help="folder of the results (default: docs/results/paper)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/paper", help="folder of runs under way")
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    args = parser.parse_args(argv)
    if "all" in args.names:
        args.names = [*names, "report"]
    if args.workers < 1 or args.threads < 1:
        parser.error("--workers and --threads must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Do what was asked for.

    Raises:
        TaperlitError: whatever the user can mend.
    """
    args = parse(argv)
    begun = time.time()
    out = args.out or ROOT / ("runs/paper/toy/paper" if args.size == "toy" else "docs/results/paper")
    options = experiments.Options(
        size=args.size,
        corpus=args.corpus,
        seeds=args.seeds and tuple(args.seeds),
        lengths=args.lengths and tuple(args.lengths),
        tokens_per_parameter=args.tokens_per_parameter,
        lr=args.lr,
        variants=args.variants and tuple(args.variants),
        ideas=args.ideas and tuple(args.ideas),
    )
    chosen = [name for name in experiments.EXPERIMENTS if name in args.names]
    wanted = {name: by_hash(experiments.EXPERIMENTS[name](options)) for name in chosen}
    together = in_order(wanted)
    if args.list:
        print("\n".join(listed(together, out, args.workers)))
        return
    for name, vocab_size in {
        (s["corpus"], s["config"]["data"]["vocab_size"]) for s in workers.remaining(together, out)
    }:
        corpus.data_of(name, vocab_size).prepare_data()  # once, before the workers would each do it
    until = None if args.budget is None else begun + 60 * args.budget
    place = workers.Place(out, args.work, args.accelerator, args.threads, args.compile, until)
    workers.do_all(together, place, args.workers)
    from paper_harness import page  # matplotlib, which nothing before needs

    page.write_experiments(chosen, out)
    for name in commands.COMMANDS:
        if name in args.names and (until is None or time.time() < until):
            commands.COMMANDS[name](args.size, out, args.work)
            page.write_experiments([name], out)
    if "report" in args.names:
        page.write_report(out)
    left = len(workers.remaining(together, out))
    if left:
        print(f"paper: {left} of {len(together)} runs are left; the same command goes on.", file=sys.stderr)


def by_hash(some: list[runs.Run]) -> dict[str, dict[str, Any]]:
    """The settings of runs by their hash, each once."""
    return {runs.hash_of(settings): settings for settings in (run.settings() for run in some)}


def in_order(wanted: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The settings of all experiments, each once; a whole seed before the next, so that what is stopped is whole as far
    as it goes."""
    unique = {key: settings for some in wanted.values() for key, settings in some.items()}
    return sorted(unique.values(), key=lambda settings: settings["seed"])


def listed(wanted: list[dict[str, Any]], out: Path, workers_at_once: int) -> list[str]:
    """A line per run: done, or how long it takes by the stored runs of its size; then the sum."""
    rates = _rates(out)
    lines, minutes, unknown = [], 0.0, 0
    for settings in wanted:
        path = runs.record_path(out, runs.hash_of(settings))
        tokens = settings["steps"] * SIZES[settings["size"]].tokens_per_step
        if path.exists():
            told = "done"
        elif settings["size"] in rates:
            minutes += (each := tokens / rates[settings["size"]] / 60)
            told = f"{each:.1f} minutes"
        else:
            unknown += 1
            told = f"{tokens:,} tokens"
        lines.append(f"{workers.title(settings)}: {told}")
    left = len(workers.remaining(wanted, out))
    total = f"{len(wanted)} runs, {left} left"
    if left and not unknown:
        total += f": about {minutes / min(workers_at_once, left):.0f} minutes with {workers_at_once} workers"
    elif unknown:
        total += "; no stored run of this size tells how long they take"
    return [*lines, total]


def _rates(out: Path) -> dict[str, float]:
    """Tokens per second of a size, the median of the stored runs, validation and start included."""
    found = defaultdict(list)
    for path in (out / "runs").glob("*.json"):
        record = runs.read(path)
        if not record["result"]["diverged"] and not record["ran"].get("resumed"):
            found[record["settings"]["size"]].append(record["result"]["tokens"] / record["ran"]["seconds"])
    return {size: statistics.median(each) for size, each in found.items()}


if __name__ == "__main__":
    try:
        main()
    except TaperlitError as error:
        sys.exit(f"paper: {error}")
    except KeyboardInterrupt:
        sys.exit("paper: interrupted; the same command goes on.")
