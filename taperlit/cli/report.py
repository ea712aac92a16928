"""``taperlit report``: runs as one self-contained HTML page, and the same in a few lines."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path

from taperlit.cli.options import Texts, call
from taperlit.errors import TaperlitError

_command: str = "taperlit report"  # as it was typed, for the record


def report(name: str, args: Sequence[str]) -> None:
    """Write a page about runs, whose folders stand among the options without a name.

    Raises:
        TaperlitError: as :func:`write_report`.
    """
    import shlex

    global _command
    _command = shlex.join(["taperlit", name, *args])
    call(write_report, name, [*_named(args)])


def write_report(
    runs: Texts | None = None,
    out: str | None = None,
    samples: bool = True,
    prompt: str | None = None,
    new_tokens: int = 120,
    seed: int = 0,
    measure: bool = False,
) -> None:
    """Write one self-contained HTML page about runs, and print the same in a few lines.

    Example::

        taperlit report runs/quickstart runs/baseline/version_2 --out report.html

    Args:
        runs: folders of runs, of loggers (their newest run is taken) or of checkpoints; ``--runs`` need not be written.
            The others are compared with the first.
        out: the page; by default report.html in the first run's folder. A report that is there is replaced.
        samples: put short texts of each model into it.
        prompt: what these texts continue; by default the run's own validation text.
        new_tokens: most tokens of each text.
        seed: of the draws.
        measure: compare each folded model with its checkpoint first, their logits and their decoding in turns, and keep
            the figures in the run's folder as bench_before_after.json.

    Raises:
        TaperlitError: no run, traces that are damaged, nothing to measure, or a page that cannot be written.
    """
    if not runs:
        raise TaperlitError("There is nothing to report on; name a run's folder, such as runs/quickstart/version_0.")
    if new_tokens < 1:
        raise TaperlitError(f"new_tokens is {new_tokens}; give 1 or more.")
    from taperlit.report.locate import find_run
    from taperlit.report.page import build_page, check_page, write_page
    from taperlit.report.parts import Wish, read_parts
    from taperlit.report.run import names_of, read_run
    from taperlit.report.summary import comparison_lines, lines_of

    folders = [find_run(run) for run in runs]
    page = Path(out) if out is not None else folders[0] / "report.html"
    check_page(page)
    read = [read_run(folder) for folder in folders]
    if measure:
        from taperlit.report.measure import measure_fold

        foldable = [run for run in read if run.folded] or read  # where none can be measured, the first says why
        for run in foldable:
            measure_fold(run, _command)
    wish = Wish(samples, prompt, new_tokens, seed)
    parts = [read_parts(run, wish) for run in read]
    write_page(page, build_page(read, parts, wish))
    names = names_of(read)
    for name, run, part in zip(names, read, parts, strict=True):
        print("\n".join([*([f"== {name}"] if len(read) > 1 else []), *lines_of(run, part)]))
    if len(read) > 1:
        print("\n".join(["== last validation loss", *comparison_lines(names, read)]))
    print(f"{'report':<26} {page}")


def _named(args: Sequence[str]) -> Iterator[str]:
    """The arguments with ``--runs`` before each that stands alone, wherever it does: argparse takes them in one row."""
    parameters = inspect.signature(write_report).parameters
    waiting = [*args]
    while waiting:
        arg = waiting.pop(0)
        option = parameters.get(arg.removeprefix("--")) if arg.startswith("--") else None
        switch = option is not None and option.annotation is bool
        if arg == "--":
            yield from (f"--runs={run}" for run in waiting)
            return
        if not arg.startswith("-"):
            yield f"--runs={arg}"
            continue
        yield arg
        if waiting and (arg == "--config" or (option is not None and (not switch or waiting[0] in ("true", "false")))):
            yield waiting.pop(0)
