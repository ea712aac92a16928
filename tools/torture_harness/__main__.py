"""``tools/torture``: the command line."""

import argparse
import shlex
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torture_harness.faults import Faults
from torture_harness.mutations import Mutations
from torture_harness.runner import Runner, import_beforehand
from torture_harness.runs import MOST_KILLS, Kills, Starts
from torture_harness.specimens import make
from torture_harness.verdict import Outcome

USAGE = """Kill, damage and misuse taperlit in every way that is known, and count what comes of it.

    tools/torture                            # 1,000 mutations, 200 faults, 50 kills, 9 starts together
    tools/torture --mutations 30 --faults 10 --kills 1 --starts 1          # the short form, which is a test
    tools/torture --seed 3 --case mutation/17                              # one case again

A tiny run is made first, and its files are damaged in copies. Each command runs in a process of its own, which is
stopped after --limit seconds of processor time (six times as many of the clock). The exit status is 1 where a case
ended as none may: those columns are in capitals."""


class Campaign(Protocol):
    """Cases by their number."""

    def kind_of(self, number: int) -> str: ...  # noqa: D102
    def run(self, number: int) -> tuple[Outcome, str, str]: ...  # noqa: D102


@dataclass
class Tally:
    """What came of the cases so far.

    Args:
        seed: of them all, to tell how a case is done again.
        counts: of each row of the table, by outcome.
        bad: the cases that ended as none may, in words.
    """

    seed: int
    counts: dict[str, Counter] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def add(self, case: str, kind: str, outcome: Outcome, words: str, told: str) -> None:
        """Count a case; one that may not be is told at once."""
        name = case.partition("/")[0]
        self.counts.setdefault(f"{name} {kind}", Counter())[outcome] += 1
        if not outcome.good:
            line = f"{outcome.value}: {told}\n    {words}\n    {again(self.seed, case)}"
            self.bad.append(line)
            print(line, file=sys.stderr, flush=True)

    def table(self) -> str:
        """Rows by campaign and kind, the outcomes that there were as columns."""
        seen = [outcome for outcome in Outcome if any(row[outcome] for row in self.counts.values())]
        total = sum(self.counts.values(), Counter())
        rows = [["", *(outcome.value for outcome in seen), "all"]]
        for name, row in [*sorted(self.counts.items()), ("all", total)]:
            rows.append([name, *(str(row[outcome] or "") for outcome in seen), str(row.total())])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if not i else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def again(seed: int, case: str) -> str:
    """The command that does one case again."""
    return shlex.join(["tools/torture", "--seed", str(seed), "--case", case])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="torture", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: 0)")
    parser.add_argument("--mutations", type=int, default=1000, help="of files (default: 1000)")
    parser.add_argument("--faults", type=int, default=200, help="options out of range (default: 200)")
    parser.add_argument("--kills", type=int, default=50, help="-9 at random moments (default: 50)")
    parser.add_argument("--starts", type=int, default=9, help="of several commands at once (default: 9)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after these")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds after which a command hangs (default: 20)")
    parser.add_argument("--case", help="one case alone, such as mutation/17, fault/3, kill/0 or start/1")
    args = parser.parse_args(argv)
    if min(args.mutations, args.faults, args.kills, args.starts) < 0 or not args.limit >= 1 or not args.minutes > 0:
        parser.error("counts must not be negative, --limit at least 1, and --minutes above 0")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the campaign: 0 where every case ended as it may, else 1."""
    args = parse(argv)
    until = time.monotonic() + 60 * args.minutes
    tally = Tally(args.seed)
    import_beforehand()
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as scratch:
        runner = Runner(Path(scratch) / "logs", args.limit)
        specimens = make(Path(scratch) / "files", runner)
        campaigns: dict[str, Campaign] = {
            "mutation": Mutations(specimens, runner, args.seed),
            "fault": Faults(specimens, runner, args.seed),
            "start": Starts(specimens, runner, args.seed),
        }
        kills = Kills(specimens, runner, args.seed)
        if args.case:
            name, _, number = args.case.partition("/")
            one = {**campaigns, "kill": kills}.get(name)
            if one is None or not number.isdigit():
                sys.exit(f"torture: there is no case {args.case!r}; such as mutation/17, fault/3, kill/0 or start/1")
            outcome, words, told = one.run(int(number))
            print(f"{outcome.value}: {told}\n    {words}")
            return int(not outcome.good)
        wanted = {"mutation": args.mutations, "fault": args.faults, "start": args.starts}
        for name, campaign in campaigns.items():
            for number in range(wanted[name]):
                if time.monotonic() >= until:
                    break
                tally.add(f"{name}/{number}", campaign.kind_of(number), *campaign.run(number))
        number = 0
        while kills.done < args.kills and time.monotonic() < until and number < 2 * args.kills:
            left = min(MOST_KILLS, args.kills - kills.done)
            tally.add(f"kill/{number}", kills.kind_of(number), *kills.run(number, left))
            number += 1
        seconds = runner.seconds
    print(tally.table())
    print(f"{kills.done} kills, seed {args.seed}, {seconds:.0f} s of processor time")
    if tally.bad:
        print(f"\n{len(tally.bad)} cases ended as none may:\n" + "\n".join(tally.bad))
    return int(bool(tally.bad))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("torture: interrupted")
