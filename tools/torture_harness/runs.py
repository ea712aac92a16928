"""The third and fourth campaigns: runs that are killed at random moments, and commands that begin at once."""

import random
import time
from pathlib import Path

from taperlit.checkpoint.atomic import remove
from torture_harness.runner import Call, Runner
from torture_harness.specimens import Specimens, fit_args
from torture_harness.verdict import Allowed, Ended, Outcome, judge

STEPS = 24
MOST_KILLS = 5  # of one run
GO_ON = ("--ckpt_path", "last")


class Kills:
    """Cases by their number: a run that is killed -9 a few times and goes on; its end is the undisturbed run's.

    Args:
        specimens: the corpus and the token cache.
        runner: of the commands.
        seed: of the moments.
    """

    def __init__(self, specimens: Specimens, runner: Runner, seed: int) -> None:
        self.specimens, self.runner, self.seed = specimens, runner, seed
        self.whole: object = None
        self.seconds = 0.0
        self.done = 0  # kills

    def kind_of(self, number: int) -> str:
        """All are alike."""
        return "fit"

    def call(self, folder: Path, *extra: str) -> Call:
        """The run, in its own folder."""
        result = ("run_of", f"{folder}/run")
        args = fit_args(STEPS, *extra, saves=str(folder))
        return Call(args, self.specimens.folder, result, self.specimens.environment)

    def run(self, number: int, kills: int = MOST_KILLS) -> tuple[Outcome, str, str]:
        """One case: its outcome, what shows it, and the moments."""
        if self.whole is None:
            begun = time.monotonic()
            ended = self.runner.run(self.call(Path("work/whole")))
            if ended.status:
                raise RuntimeError(ended.stderr[-2000:])
            self.seconds, self.whole = time.monotonic() - begun, ended.result
        draw = random.Random(f"{self.seed}/kill/{number}")
        folder = Path(f"work/killed-{number}")
        remove(self.specimens.folder / folder)
        moments: list[float] = []
        while len(moments) < kills:
            moment = draw.uniform(0.05, 0.9) * self.seconds
            started = self.runner.start(self.call(folder, *GO_ON), limited=False)
            started.begin()
            started.process.join(moment)
            alive = started.process.is_alive()
            started.kill()
            started.process.join()
            if not alive:
                break
            moments.append(moment)
            self.done += 1
        outcome, words = judge(self.runner.run(self.call(folder, *GO_ON)), Allowed(self.whole))
        versions = sorted(path.name for path in (self.specimens.folder / folder / "run").glob("version_*"))
        if outcome is Outcome.SAME and versions != ["version_0"]:
            outcome, words = Outcome.WRONG, f"it is several runs: {versions}"
        if outcome is Outcome.REFUSED:  # a run that was killed can go on
            outcome = Outcome.WRONG
        remove(self.specimens.folder / folder)
        return outcome, words, f"killed after {', '.join(f'{moment:.2f}' for moment in moments)} s"


class Starts:
    """Cases by their number: commands that begin together, and want the same folder.

    Args:
        specimens: the corpus and the checkpoint.
        runner: of the commands.
        seed: of nothing: the system decides who is first.
    """

    def __init__(self, specimens: Specimens, runner: Runner, seed: int) -> None:
        self.specimens, self.runner = specimens, runner

    def kind_of(self, number: int) -> str:
        """What begins together."""
        return ("new runs and caches", "one run goes on", "folds")[number % 3]

    def run(self, number: int) -> tuple[Outcome, str, str]:
        """One case: its outcome, what shows it, and what was begun."""
        folder = f"work/together-{number}"
        base, environment = self.specimens.folder, self.specimens.environment
        kind = self.kind_of(number)
        if kind == "folds":
            args = ["fold", f"--ckpt={self.specimens.checkpoint}", f"--out={folder}/out", "--force"]
            (base / folder).mkdir(parents=True)
            calls, left = [Call(args, base)] * 2, ("folded", f"{folder}/out")
        elif kind == "new runs and caches":
            environment = {"TAPERLIT_CACHE": str(base / folder / "cache")}
            calls = [Call(fit_args(8, saves=folder), base, environment=environment)] * 3
            left = ("run_and_cache", f"{folder}/run", f"{folder}/cache")
        else:
            first = self.runner.run(Call(fit_args(8, saves=folder), base, environment=environment))
            if first.status:
                return Outcome.TRACEBACK, first.stderr[-300:], kind
            args = fit_args(10, *GO_ON, saves=folder)
            calls, left = [Call(args, base, environment=environment)] * 2, ("run_of", f"{folder}/run")
        ended = self.runner.run_together(calls)
        outcome, words = self._verdict(kind, ended, base / folder)
        if outcome.good:
            read = self.runner.run(Call([], base, left, function="torture_harness.results:nothing"))
            if read.status:
                outcome, words = Outcome.WRONG, f"what is left cannot be read: {read.stderr.strip()[-300:]}"
        remove(base / folder)
        return outcome, words, f"{len(calls)} times taperlit {calls[0].args[0]}: {kind}"

    def _verdict(self, kind: str, ended: list[Ended], folder: Path) -> tuple[Outcome, str]:
        judged = [judge(one, Allowed(one.result, edited=True)) for one in ended]
        if bad := [one for one in judged if not one[0].good]:
            return bad[0]
        fine = [one for one in ended if one.status == 0]
        if not fine:
            return Outcome.WRONG, f"none of {len(ended)} did it: {judged[0][1]}"
        if kind == "new runs and caches":
            made = list((folder / "run").glob("version_*/checkpoints/last.ckpt"))
            caches = [path for path in (folder / "cache").iterdir() if not path.name.startswith(".")]
            if len(fine) != len(ended) or len(made) != len(ended) or len(caches) != 1:
                return Outcome.WRONG, f"{len(ended)} runs made {len(made)} checkpoints and {len(caches)} caches"
        return Outcome.SAME, f"{len(fine)} of {len(ended)} did it"
