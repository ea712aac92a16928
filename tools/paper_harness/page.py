"""The files of one experiment, and the page that has them all, from what is stored."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from paper_harness.missing import dials, missing
from paper_harness.records import PICK, StoredRun, grouped, not_drawn, read_records, seeds_of
from paper_harness.runs import EMBEDDING_SCALE
from paper_harness.sections import (
    decode,
    finetune,
    gradnorm,
    ideas,
    length,
    logit_chasing,
    ours,
    pretrain,
    schedule,
    short,
)
from paper_harness.tables import Section, markdown, write_csv

OF_RUNS = {
    "ours": ours.section,
    "pretrain": pretrain.section,
    "length": length.section,
    "gradnorm": gradnorm.section,
    "logit_chasing": logit_chasing.section,
    "schedule": schedule.section,
    "ideas": ideas.section,
    "short": short.section,
}
NAMES = (*OF_RUNS, "finetune", "decode")
PAPER = "arXiv:2602.10408"


def write_experiments(names: Iterable[str], out: Path) -> None:
    """Write ``<name>.csv``, ``<name>.md`` and, where there is something to draw, ``<name>.png`` from what is stored.

    Args:
        names: of ``NAMES``. ``finetune`` and ``decode`` are read from the files of tools/smollm2 and `taperlit bench
            decode` beside ``out``, the others from ``out/runs/*.json``.
        out: folder.

    Raises:
        TaperlitError: a file of results cannot be read.
    """
    runs = _stored(out)
    for name in names:
        _write(_section(name, runs, out), out)


def write_report(out: Path) -> None:
    """Write the files of every experiment anew, and ``README.md`` with all of them.

    Args:
        out: folder.

    Raises:
        TaperlitError: a file of results cannot be read.
    """
    runs = _stored(out)
    sections = [_section(name, runs, out) for name in NAMES]
    texts = [_write(section, out) for section in sections]
    page = [
        *_head(sections),
        *_data([run for run in not_drawn(runs) if not run.idea]),
        *(line for text in texts for line in text),
        *_rest(runs, out),
    ]
    (out / "README.md").write_text("\n".join(page) + "\n")


def _stored(out: Path) -> list[StoredRun]:
    return [StoredRun(record) for record in read_records(out / "runs")]


def _section(name: str, stored: list[StoredRun], out: Path) -> Section:
    if name == "finetune":
        return finetune.section(finetune.find(out))
    if name == "decode":
        return decode.section(decode.find(out))
    runs = PICK[name](stored)
    if not runs:
        return Section(name, OF_RUNS[name]([]).title, ["No runs yet.", ""])
    return OF_RUNS[name](runs)


def _write(section: Section, out: Path) -> list[str]:
    """Write a section's files; return its text."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / f"{section.name}.csv", section.columns, section.rows)
    picture = out / f"{section.name}.png"
    text = [f"## {section.title}", ""]
    if section.draw is None:
        picture.unlink(missing_ok=True)  # of earlier results
    else:
        section.draw(picture)
        text += [f"![{section.title}]({picture.name})", "", f"*{section.caption}*", ""]
    text += [
        *section.lines,
        f"Every row: [{section.name}.csv]({section.name}.csv), by `tools/paper report` of the stored runs.",
    ]
    (out / f"{section.name}.md").write_text("\n".join(text) + "\n")
    return [*text, ""]


def _head(sections: Sequence[Section]) -> list[str]:
    """What the page is, and the table of claims."""
    rows = [
        [claim.claim, claim.papers, claim.ours or "not run yet", f"[{section.name}](#{_anchor(section.title)})"]
        for section in sections
        for claim in section.claims
    ]
    return [
        f"# The paper, reproduced: {PAPER}",
        "",
        "Made by `tools/paper report` from the runs in [runs](runs), each stored under the hash of its settings. Every "
        "number is of runs that are there; a run that diverged (a loss or gradient that is not finite, or a validation "
        "loss that ends over a uniform guess's) is counted, and in no mean.",
        "",
        "## Ours beside the paper's",
        "",
        *(markdown(["claim", "paper", "ours", "more"], rows, left=4) if rows else ["No results yet.", ""]),
    ]


def _anchor(title: str) -> str:
    """A heading's anchor, as Markdown viewers make it."""
    kept = "".join(sign for sign in title.lower() if sign.isalnum() or sign in " -_")
    return kept.replace(" ", "-")


def _data(runs: Sequence[StoredRun]) -> list[str]:
    """What was trained on what, and how that differs from the paper."""
    rows = [["the paper", "1M to 30M, 8 layers", "TinyStories", "10,000 / 512", "", "bfloat16", "6", "", ""]]
    for setup, own in grouped(list(runs), lambda run: run.setup).items():
        config = own[0].settings.get("config") or {}
        data, trainer = config.get("data") or {}, config.get("trainer") or {}
        layers = ((config.get("model") or {}).get("overrides") or {}).get("n_layer")
        sizes: set[int] = {run.result["parameters"] for run in own if run.result.get("parameters")}
        lost = sum(not run.arrived for run in own)
        lengths = sorted({run.length for run in own})
        rows.append([
            setup.size,
            ", ".join(f"{size:,}" for size in sorted(sizes)) + ("" if layers is None else f", {layers} layers"),
            setup.corpus,
            f"{_number(data.get('vocab_size'))} / {_number(data.get('block_size'))}",
            f"{lengths[0]:g}" if len(lengths) == 1 else f"{lengths[0]:g} to {lengths[-1]:g}",
            {"32-true": "float32"}.get(str(trainer.get("precision")), str(trainer.get("precision", ""))),
            str(len(seeds_of(own))),
            f"{setup.lr:g}",
            f"{len(own)}" + (f" ({lost} diverged)" if lost else ""),
        ])  # fmt: skip
    header = [
        "size", "parameters", "corpus", "vocabulary / context", "tokens per parameter", "precision", "seeds",
        "learning rate", "runs",
    ]  # fmt: skip
    return [
        "## What differs",
        "",
        f"The taper is the paper's throughout, but where `schedule` says otherwise: {dials()}. Text, size and length "
        "are not; hold signs and orders against the paper's, not digits. A seed fixes the initial weights and the "
        "order of the data for every variant, so that gaps are of pairs. DyT and Derf begin with a scalar of "
        f"{EMBEDDING_SCALE:g} after the embedding, since from the authors' sqrt(d_model) they learn nothing at nano's "
        "width. The sizes named `_unit` are the same models with `embed_norm` and `init: fan_in`, their learning rate "
        "held to half of the run.",
        "",
        *markdown(header, rows, left=3),
    ]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def _rest(runs: Sequence[StoredRun], out: Path) -> list[str]:
    """What is missing, and where the runs were made."""
    lines = ["## What is missing", ""]
    for what, needs, command in missing(runs, out):
        lines.append(f"- {what}{f' (needs {needs})' if needs else ''}: `{command}`")
    return [*lines, "", "## Machines and time", "", *_machines(runs)]


def _machines(runs: Sequence[StoredRun]) -> list[str]:
    if not runs:
        return ["No runs yet."]
    ran = [run.record.get("ran") or {} for run in runs]
    seconds = [one["cpu_seconds"] for one in ran if one.get("cpu_seconds") is not None]
    resumed = sum(bool(one.get("resumed")) for one in ran)
    dates = sorted({one["date"] for one in ran if one.get("date")})
    lines = [
        f"{len(runs)} runs, {sum(not run.arrived for run in runs)} of them diverged, in {sum(seconds) / 3600:.2f} "
        f"hours of processor time" + (f" ({resumed} that were resumed count for their last part)" if resumed else "")
        + (f", from {dates[0]} to {dates[-1]}." if dates else "."),
        "",
    ]  # fmt: skip
    places = _counted(
        f"{one.get('machine', 'unknown machine')}; "
        + ", ".join(f"{name} {version}" for name, version in (one.get("versions") or {}).items())
        for one in ran
    )
    return [*lines, *(f"- {count} runs: {place}" for place, count in places.items())]


def _counted(words: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return counts
