import csv
import itertools
import json
import math
import re
import shlex
import shutil
import statistics as standard
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from paper_harness import __main__ as command  # noqa: E402
from paper_harness import figures, page, records, statistics, tables  # noqa: E402
from paper_harness.experiments import PEERS  # noqa: E402
from paper_harness.ideas import IDEAS, OURS  # noqa: E402
from paper_harness.missing import missing  # noqa: E402
from paper_harness.records import PICK, StoredRun, title  # noqa: E402
from paper_harness.runs import PAPER, Run, hash_of  # noqa: E402
from paper_harness.sections import (  # noqa: E402
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
from paper_harness.sizes import SIZES  # noqa: E402
from paper_records import WEIGHT_TYPES, campaign, record  # noqa: E402

from taperlit.errors import TaperlitError  # noqa: E402

NANO = SIZES["nano"]
SEEDS = NANO.seeds
HIGH = NANO.lrs[-1] * NANO.lr


# ---- statistics


def integral_of_density(t, df):
    """P(abs(T) <= t) by the density, in float64."""
    x = np.linspace(-t, t, 200_001)
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = constant * (1 + x * x / df) ** (-(df + 1) / 2)
    return ((density[1:] + density[:-1]) / 2 * np.diff(x)).sum()


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 8, 29, 100])
@pytest.mark.parametrize("t", [0.1, 1.0, 2.5, 9.0])
def test_student_t_is_the_integral_of_its_density(df, t):
    assert statistics.t_probability(t, df) == pytest.approx(integral_of_density(t, df), abs=1e-7)


# Printed tables of Student's t.
@pytest.mark.parametrize(
    ("df", "confidence", "expected"),
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (4, 0.95, 2.776), (5, 0.99, 4.032), (10, 0.9, 1.812), (30, 0.95, 2.042)],
)
def test_quantiles_are_the_printed_ones(df, confidence, expected):
    assert statistics.t_quantile(df, confidence) == pytest.approx(expected, abs=5e-4)


def test_an_interval_by_hand():
    # Standard deviation 1 of three values: 4.30265 standard errors of 1 / sqrt(3).
    one = statistics.estimate([1.0, 2.0, 3.0])
    assert (one.mean, one.n) == (2.0, 3)
    assert (one.low, one.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)
    assert statistics.estimate([7.0]) == statistics.Estimate(7.0, None, None, 1)
    assert statistics.estimate([]) is None


def test_bad_statistics_are_refused():
    with pytest.raises(ValueError, match="degree of freedom"):
        statistics.t_probability(1.0, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        statistics.t_quantile(3, 1.0)


def test_gaps_are_of_pairs():
    gaps = statistics.relative_gaps({0: 3.3, 1: 4.0, 5: 1.0}, {0: 3.0, 1: 5.0, 2: 1.0})
    assert gaps == pytest.approx({0: 0.1, 1: -0.2})


def test_the_end_is_the_last_fifth():
    points = [(step, float(step)) for step in range(1, 101)]
    assert statistics.at_the_end(points, 100) == np.mean(range(80, 101))
    assert statistics.at_the_end(points[:70], 100) is None


def test_a_mean_curve_is_of_the_steps_that_all_have():
    assert statistics.mean_curve([[(1, 1.0), (2, 2.0), (3, 3.0)], [(2, 4.0), (3, 6.0), (9, 0.0)]]) == [(2, 3), (3, 4.5)]
    assert statistics.mean_curve([]) == []


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, -1), (100, 1)], [(10, True)]),
        ([(10, -3), (1, 1)], [(10**0.25, False)]),
        ([(1, 1), (10, 0), (100, 1)], []),  # it touches
        ([(1, 1), (10, 0), (100, -1)], [(10, False)]),
        ([(1, -1), (10, 0), (1000, 0), (10_000, 2)], [(100, True)]),  # it lies on zero
        ([(1, 0), (10, 0)], []),
        ([(1, 1), (100, -1), (10_000, 1)], [(10, False), (1000, True)]),
        ([], []),
    ],
)
def test_crossings_by_hand(points, expected):
    found = statistics.crossings(points)
    assert [one.rising for one in found] == [rising for _, rising in expected]
    assert [one.x for one in found] == pytest.approx([x for x, _ in expected])


@given(st.lists(st.floats(-1, 1).filter(lambda y: abs(y) > 1e-3), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_crossings_lie_where_the_signs_change(gaps):
    points = [(2.0**i, gap) for i, gap in enumerate(gaps)]
    found = statistics.crossings(points)
    changes = [i for i in range(1, len(gaps)) if gaps[i - 1] * gaps[i] < 0]
    assert len(found) == len(changes)
    for one, i in zip(found, changes, strict=True):
        assert 2.0 ** (i - 1) <= one.x <= 2.0**i
        assert np.interp(math.log2(one.x), range(len(gaps)), gaps) == pytest.approx(0, abs=1e-9)
        assert one.rising == (gaps[i] > 0)


def test_a_seed_matches_the_nearest_crossing_of_the_same_direction():
    curve = [(1, 1), (4, -1), (16, 1), (64, -1)]  # falls at 2 and 32, rises at 8
    assert statistics.matching_crossing(curve, statistics.Crossing(20, rising=False)) == pytest.approx(32)
    assert statistics.matching_crossing(curve, statistics.Crossing(20, rising=True)) == pytest.approx(8)
    assert statistics.matching_crossing(curve[:2], statistics.Crossing(20, rising=True)) is None


# ---- records


@cache
def stored():
    """The runs of a whole campaign at nano size."""
    return [StoredRun(one) for one in campaign()]


def names(runs, *fields):
    return {tuple(getattr(run, field) for field in fields) for run in runs}


def test_the_settings_of_a_record_are_understood():
    method = {"warmup": 0.2, "end": 0.25, "shape": "linear", "ema_rate": 0.1, "weight": 1.0}
    run = StoredRun(record(Run("nano", "gcide", "all_aux", 1, 2, 0.008, method)))
    assert run.schedule._asdict() == method
    assert (run.setup.size, run.setup.corpus, run.setup.lr, run.length, run.seed) == ("nano", "gcide", 0.008, 2.0, 1)
    assert not run.standard
    for variant in records.TITLES:
        assert StoredRun(record(Run("nano", "gcide", variant, 1, 2))).standard
    in_steps = json.loads(json.dumps(run.record))
    in_steps["settings"]["config"]["taper"]["gate"]["init_args"]["end"] = run.steps // 2
    assert StoredRun(in_steps).schedule.end == pytest.approx(0.5, abs=0.01)


def test_each_experiment_takes_its_own_runs():
    runs = stored()
    variants = set(records.TITLES)
    assert names(PICK["pretrain"](runs), "variant", "seed", "length") == {(v, s, 10.0) for v in variants for s in SEEDS}
    trio = ("baseline", "internal_aux", "all_aux")
    taken = PICK["length"](runs)
    assert names(taken, "variant", "seed", "length") == {(v, s, k) for v in trio for s in SEEDS for k in NANO.lengths}
    assert all(run.standard and run.setup.lr == NANO.lr for run in taken)
    assert len(PICK["gradnorm"](runs)) == 15
    scheduled = PICK["schedule"](runs)
    assert names(scheduled, "seed", "length") == {(0, NANO.schedule_tokens)}
    assert {run.setup.lr for run in scheduled} == {NANO.lr * factor for factor in NANO.lrs}
    assert set().union(*(names(PICK[name](runs), "key") for name in PICK)) == names(runs, "key")


def test_other_options_are_another_setup():
    plain = record(Run("nano", "gcide", "baseline", 0, 10))
    for section, key, value in (("data", "batch_size", 16), ("model", "warmup", 0.2), ("trainer", "precision", "bf16")):
        other = json.loads(json.dumps(plain))
        other["settings"]["config"][section][key] = value
        assert StoredRun(other).setup != StoredRun(plain).setup
    for change in ("variant", "seed", "tokens_per_parameter"):
        run = Run("nano", "gcide", "baseline", 0, 10)
        other = record(Run(**(run.__dict__ | {change: {"variant": "all_aux", "seed": 3}.get(change, 2)})))
        assert StoredRun(other).setup == StoredRun(plain).setup


def test_of_doubles_the_newest_counts_and_the_others_are_named():
    old, new = (record(Run("nano", "gcide", "baseline", 0, 10)) for _ in range(2))
    old["settings"]["format"] = 0
    old["result"]["val"][-1][1] = 99.0
    old["ran"]["date"], new["ran"]["date"] = "2026-01-01", "2026-02-01"
    text = "\n".join(pretrain.section([StoredRun(new), StoredRun(old)]).lines)
    assert "99.0000" not in text
    assert hash_of(old["settings"]) in text


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"settings": 1, "result": {}}', "\x00"])
def test_what_is_no_record_is_named(tmp_path, text):
    (tmp_path / "abc.json").write_text(text)
    with pytest.raises(TaperlitError, match=r"abc\.json is not a record.*remove it"):
        records.read_records(tmp_path)


# ---- sections


def table(lines, first):
    """A table's rows by their first cell: {row: {column: cell}}; ``first`` is its first column's name."""
    start = next(
        i for i, line in enumerate(lines) if line.startswith(f"| {first} |") and lines[i + 1].startswith("|---")
    )
    header = cells_of(lines[start])
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = cells_of(line)
        assert len(cells) == len(header)
        rows[cells[0]] = dict(zip(header, cells, strict=True))
    return rows


def cells_of(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.count("|") > 1 else []


def losses(runs, variant, length=10.0):
    return {r.seed: r.result["val"][-1][1] for r in runs if r.variant == variant and r.length == length and r.standard}


def test_pretrain_tells_means_gaps_and_intervals():
    runs = PICK["pretrain"](stored())
    rows = table(pretrain.section(runs).lines, "variant")
    own, base = losses(runs, "all_aux"), losses(runs, "baseline")
    gaps = np.array([own[seed] / base[seed] - 1 for seed in SEEDS])
    half = 4.302653 * gaps.std(ddof=1) / math.sqrt(3)
    row = rows["All-Taper +aux"]
    assert row["gap to the baseline (95%)"] == (
        f"{gaps.mean():+.2%} ({gaps.mean() - half:+.2%} to {gaps.mean() + half:+.2%})"
    )
    assert row["mean"] == f"{np.mean([*own.values()]):.4f}"
    assert row["seed 1"] == f"{own[1]:.4f}"
    assert (row["largest"], row["99.9%"], row["random tokens: RMS"]) == ("15.00", "10.00", "3.00")


def test_a_diverged_run_is_counted_and_in_no_mean():
    runs = PICK["pretrain"](stored())
    lines = pretrain.section(runs).lines
    row = table(lines, "variant")["All-Taper"]
    arrived = next(run for run in runs if run.variant == "all" and run.arrived)
    assert arrived.seed == 2
    assert row["mean"] == f"{arrived.loss:.4f}{tables.FEW} (2 of 3 diverged)"
    step = arrived.steps // 3
    assert row["seed 0"].startswith(f"diverged at step {step}, gate")
    assert row["gap to the baseline (95%)"].endswith(f"%{tables.FEW}")  # one pair: no interval, and marked
    assert tables.FOOTNOTE in lines
    assert any(line.startswith(f"Diverged: All-Taper 2 of 3 (seed 0 diverged at step {step}") for line in lines)


def test_without_a_baseline_of_the_seed_there_is_no_pair():
    runs = [run for run in PICK["pretrain"](stored()) if (run.variant, run.seed) != ("baseline", 1)]
    row = table(pretrain.section(runs).lines, "variant")["Internal-Taper"]
    own, base = losses(runs, "internal"), losses(runs, "baseline")
    mean = standard.fmean(own[seed] / base[seed] - 1 for seed in (0, 2))
    assert row["gap to the baseline (95%)"].startswith(f"{mean:+.2%} (")
    assert row["gap to the baseline (95%)"].endswith(tables.FEW)
    assert tables.FEW not in row["mean"]  # which is of three


def test_a_loss_that_is_not_finite_is_a_run_that_diverged():
    lost = record(Run("nano", "gcide", "baseline", 0, 10))
    lost["result"]["val"][-1][1] = math.nan
    row = table(pretrain.section([StoredRun(lost)]).lines, "variant")["baseline"]
    assert row["mean"] == "(1 of 1 diverged)"


def test_length_tells_the_gap_at_each_length_and_the_crossing():
    runs = PICK["length"](stored())
    rows = table(length.section(runs).lines, "variant")
    means, seeds = [], {seed: [] for seed in SEEDS}
    for at in NANO.lengths:
        own, base = losses(runs, "internal_aux", at), losses(runs, "baseline", at)
        gaps = {seed: own[seed] / base[seed] - 1 for seed in SEEDS}
        means.append((at, np.mean([*gaps.values()])))
        for seed, gap in gaps.items():
            seeds[seed].append((at, gap))
        assert rows["Internal-Taper +aux"][f"{at:g}"].startswith(f"{means[-1][1]:+.2%} (")

    def zero(curve):
        (place,) = [i for i in range(1, len(curve)) if curve[i - 1][1] < 0 < curve[i][1]]
        (x0, y0), (x1, y1) = curve[place - 1], curve[place]
        return x0 * (x1 / x0) ** (-y0 / (y1 - y0))

    places = [zero(curve) for curve in seeds.values()]
    span = f"{min(places):.2g} to {max(places):.2g}; 3 of 3 seeds cross"
    assert rows["Internal-Taper +aux"]["crossing"] == f"rises above at {zero(means):.2g} ({span})"
    assert rows["All-Taper +aux"]["crossing"] == "no crossing between 0.5 and 40, above it"


def test_length_counts_the_runs_that_diverged(tmp_path):
    def fate(run):
        return 9 if run.variant == "all_aux" and (run.length == 0.5 or (run.length, run.seed) == (2, 0)) else None

    runs = [run for run in PICK["length"](stored()) if fate(run) is None]
    lost = [Run("nano", "gcide", "all_aux", seed, at) for at, seed in ((0.5, 0), (0.5, 1), (0.5, 2), (2, 0))]
    section = length.section([*runs, *(StoredRun(record(run, diverged=9)) for run in lost)])
    row = table(section.lines, "variant")["All-Taper +aux"]
    assert row["0.5"] == "(3 of 3 diverged)"
    assert re.fullmatch(r"\+.*%\)† \(1 of 3 diverged\)", row["2"])
    assert row["crossing"] == "no crossing between 2 and 40, above it; 4 diverged left out"
    assert any(line.startswith("Diverged at 2: All-Taper +aux 1 of 3") for line in section.lines)
    section.draw(tmp_path / "length.png")


def test_gradnorm_tells_the_ratio_of_the_last_fifth():
    runs = PICK["gradnorm"](stored())
    rows = table(gradnorm.section(runs).lines, "weight type")
    assert not any("taper_weight" in name for name in rows)
    tag = WEIGHT_TYPES[2]

    def end(variant, seed):
        (run,) = [run for run in runs if (run.variant, run.seed) == (variant, seed)]
        values = [value for step, value in run.result["traces"][tag] if step >= 0.8 * run.steps]
        return np.mean(values)

    ratio = np.mean([end("all_aux", seed) / end("baseline", seed) for seed in SEEDS])
    assert rows["`attn.q_proj`"]["All-Taper +aux"] == f"{ratio:.2f}x"
    assert rows["`attn.q_proj`"]["All-Taper"].endswith(f"x{tables.FEW}")  # of one seed, since two diverged


def test_the_gains_of_both_branches_are_one_weight_type():
    runs = PICK["gradnorm"](stored())
    one, twin = WEIGHT_TYPES[1], WEIGHT_TYPES[-1]
    assert (one.endswith("attn_norm.weight"), twin.endswith("attn_norm.taper_weight")) == (True, True)

    def end(variant, seed):
        (run,) = [run for run in runs if (run.variant, run.seed) == (variant, seed)]
        traces = run.result["traces"]
        both = dict(traces[one]), dict(traces.get(twin, []))
        late = [step for step in both[0] if step >= 0.8 * run.steps]
        return np.mean([(both[0][step] ** 2 + both[1].get(step, 0) ** 2) ** 0.5 for step in late])

    ratio = np.mean([end("internal_aux", seed) / end("baseline", seed) for seed in SEEDS])
    assert ratio > 2
    rows = table(gradnorm.section(runs).lines, "weight type")
    assert rows["`attn_norm`"]["Internal-Taper +aux"] == f"{ratio:.2f}x"


def logit_chasing_text(change):
    runs = json.loads(json.dumps([run.record for run in PICK["logit_chasing"](stored())]))
    for one in runs:
        trace = one["result"]["traces"]["taper/radial_gradient"]
        change(one["settings"]["variant"], trace)
    return "\n".join(logit_chasing.section([StoredRun(one) for one in runs]).lines)


def test_logit_chasing_checks_both_propositions():
    text = logit_chasing_text(lambda variant, trace: None)
    assert re.search(r"4\.1.*: holds: at most", text)
    assert re.search(r"4\.2.*: holds: negative in (\d+) of \1 records", text)


def test_logit_chasing_tells_what_does_not_hold():
    def radial_with_norm(variant, trace):
        if variant == "internal":
            trace[-1][1] = -0.005

    assert re.search(r"4\.1.*: does not hold: at most 5\.0e-03", logit_chasing_text(radial_with_norm))

    def outward(variant, trace):
        if variant == "all_aux":
            trace[-1][1] = 0.003

    assert re.search(
        r"4\.2.*: not always, in this mean over all tokens: negative in \d+ of \d+.* to 3\.0e-03",
        logit_chasing_text(outward),
    )

    def early(variant, trace):  # before the gate is closed nothing is said
        trace[0][1] = 1.0

    assert re.search(r"4\.1.*: holds", logit_chasing_text(early))


def test_schedule_maps_the_dials_and_the_divergences():
    runs = PICK["schedule"](stored())
    section = schedule.section(runs)
    heading = f"### All-Taper +aux, nano, gcide, learning rate {HIGH:g}, "
    start = next(i for i, line in enumerate(section.lines) if line.startswith(heading))
    rows = table(section.lines[start:], "")
    (base,) = [run for run in runs if run.variant == "baseline" and run.setup.lr == HIGH]
    cells = 0
    for run in runs:
        if run.variant != "all_aux" or run.setup.lr != HIGH or run.schedule[2:] != records.PAPERS[2:]:
            continue
        cell = rows[f"warm-up {run.schedule.warmup:.0%}"][f"end {run.schedule.end:.0%}"]
        assert cell == (f"{run.loss / base.loss - 1:+.2%}" if run.arrived else run.fate)
        cells += 1
    assert cells == sum(cell != "" for row in rows.values() for column, cell in row.items() if column)
    assert {cell[:16] for row in rows.values() for cell in row.values() if "diverged" in cell} == {"diverged at step"}
    assert any("rests on 1 seed" in line for line in section.lines)


def test_schedule_tells_the_other_dials_one_at_a_time():
    runs = PICK["schedule"](stored())
    singles = table(schedule.section(runs).lines, "changed")
    names = {"ema_rate": "EMA rate", "weight": "lambda"}
    wanted = [
        f"{names.get(dial, dial)} {value if isinstance(value, str) else f'{value:g}'}"
        for dial, values in NANO.others.items()
        for value in values
        if value != PAPER[dial]
    ]
    assert [*singles] == ["the paper's", *wanted]


def test_schedule_says_where_the_baseline_diverged():
    runs = PICK["schedule"](stored())
    lost = record(Run("nano", "gcide", "baseline", 0, NANO.schedule_tokens, HIGH), diverged=30)
    kept = [run for run in runs if run.variant != "baseline" or run.setup.lr != HIGH]
    text = "\n".join(schedule.section([*kept, StoredRun(lost)]).lines)
    assert "no baseline that arrived" in text


def test_ideas_stand_beside_the_papers_settings():
    runs = PICK["ideas"](stored())
    assert {run.idea for run in runs} == {"", *IDEAS}
    text = ideas.section(runs).lines
    rows = [cells_of(line) for line in text if line.startswith("| end_100 |")]
    assert [row[1] for row in rows] == ["Internal-Taper +aux", "All-Taper +aux"]
    own = {run.seed: run for run in runs if (run.idea, run.variant) == ("end_100", "all_aux")}
    base = {run.seed: run for run in runs if run.setup.size == "nano" and (run.idea, run.variant) == ("", "baseline")}
    mean = np.mean([own[seed].loss / base[seed].loss - 1 for seed in SEEDS])
    assert rows[1][5].startswith(f"{mean:+.2%} (")
    gate = {seed: dict(run.curve("taper/gate")) for seed, run in own.items()}
    falls = {seed: [s for s, g in gate[seed].items() if 0 < g < 1] for seed in SEEDS}
    widest = [
        max(v / dict(base[seed].curve("val"))[s] - 1 for s, v in own[seed].curve("val") if s <= max(falls[seed]))
        for seed in SEEDS
    ]
    assert rows[1][8].startswith(f"{np.mean(widest):+.2%} (")


def test_an_idea_that_changes_the_model_has_its_own_baseline(monkeypatch):
    monkeypatch.setitem(IDEAS, "gelu", {"model": {"overrides": {"mlp": "gelu"}}})
    told = [
        StoredRun(record(Run("nano", "gcide", variant, 0, 10, idea=idea)))
        for idea in (None, "gelu")
        for variant in ("baseline", "all_aux")
    ]
    told[2].result["val"][-1][1] *= 1.1  # its own baseline is worse
    *_, row = (cells_of(line) for line in ideas.section(told).lines if line.startswith("| gelu |"))
    assert row[5] == f"{told[3].loss / told[2].loss - 1:+.2%}{tables.FEW}"
    assert row[7] == f"{told[3].loss / told[0].loss - 1:+.2%}{tables.FEW}"


@pytest.mark.parametrize("idea", IDEAS)
def test_every_idea_has_its_pair(idea):
    told = [StoredRun(record(Run("nano", "gcide", variant, 0, 10, idea=idea))) for variant in ("baseline", "all_aux")]
    (row,) = (row for row in ideas.tried_in(told) if row.variant == "all_aux")
    assert row.gaps() == {0: told[1].loss / told[0].loss - 1}


def of_two_texts(runs, diverged):
    """The runs on a text, and on another of the same corpus, where losses are higher by a fifth; the run of the idea
    ``diverged`` does so on the first."""
    found = []
    for text, factor in (("1" * 64, 1.0), ("2" * 64, 1.2)):
        for run in runs:
            lost = run.variant != "baseline" and run.idea == diverged and factor == 1
            made = record(run, 50 if lost else None, corpus_sha256=text)
            made["result"]["val"] = [[step, factor * loss] for step, loss in made["result"]["val"]]
            found.append(StoredRun(made))
    return found


def runs_of(section):
    return sorted(row[section.columns.index("run")] for row in section.rows)


TRIED = [
    Run("nano", "gcide", "baseline", 0, 10),
    Run("nano", "gcide", "all_aux", 0, 10),
    Run("nano", "gcide", "all_aux", 0, 10, idea="fade"),
]


@pytest.mark.parametrize("order", [1, -1])
def test_ideas_on_two_texts_of_a_corpus_are_told_apart(order):
    told = of_two_texts(TRIED, diverged="fade")
    untried = StoredRun(record(TRIED[0], corpus_sha256="3" * 64))
    section = ideas.section(PICK["ideas"]([*told, untried][::order]))
    headings = [line for line in section.lines if line.startswith("###")]
    assert [heading.split(", ")[1] for heading in headings] == ["gcide 11111111", "gcide 22222222"]
    first, second = (cells_of(line) for line in section.lines if line.startswith("| fade |"))
    assert first[2:8] == ["1", "1", "", "", "", ""]
    gap = f"{told[5].loss / told[3].loss - 1:+.2%}{tables.FEW}"
    assert (second[5], second[7]) == (gap, gap)
    assert runs_of(section) == sorted(run.key for run in told)


def test_of_one_text_the_heading_has_the_corpus_alone():
    lines = ideas.section([StoredRun(record(run)) for run in TRIED]).lines
    (heading,) = (line for line in lines if line.startswith("###"))
    assert heading.startswith("### nano, gcide, ")


def test_ideas_of_two_setups_do_not_hide_each_other():
    told = [StoredRun(record(run)) for run in TRIED]
    for run in json.loads(json.dumps([run.record for run in told])):
        run["settings"]["config"]["data"]["batch_size"] = 64
        run["result"]["val"][-1][1] *= 1.1 + 0.1 * len(told)
        told.append(StoredRun(run))
    assert runs_of(ideas.section(told)) == sorted(run.key for run in told)
    gaps = {row.gaps()[0] for row in ideas.tried_in(told) if row.idea}
    assert gaps == {told[2].loss / told[0].loss - 1, told[5].loss / told[3].loss - 1}


def test_a_lost_idea_is_counted(tmp_path):
    told = [StoredRun(record(Run("nano", "gcide", "baseline", 0, 10)))]
    told.append(StoredRun(record(Run("nano", "gcide", "all_aux", 0, 10, idea="linear"), diverged=40)))
    section = ideas.section(told)
    (row,) = (cells_of(line) for line in section.lines if line.startswith("| linear |"))
    assert row[2:6] == ["1", "1", "", ""]
    section.draw(tmp_path / "ideas.png")


def test_ours_stands_beside_the_papers_settings():
    runs = PICK["ours"](stored())
    assert {run.setup.size for run in runs} == {"nano", "nano_unit"}
    assert {run.idea for run in runs if run.variant != "baseline"} == {"", OURS}
    section = ours.section(runs)
    rows = [cells_of(line) for line in section.lines if line.startswith("| nano")]
    told = [(row[0], row[1], row[2]) for row in rows[:9]]
    peers = [("nano_unit", "", title(variant)) for variant in PEERS]
    assert sorted(told) == sorted(peers + [
        (size, settings * (variant != "baseline"), title(variant))
        for size, settings in (("nano", "the paper's"), ("nano_unit", "ours"))
        for variant in ("baseline", "internal_aux", "all_aux")
    ])  # fmt: skip
    assert all(re.match(r"[+-]\d", row[8]) for row in rows[:9] if row[2] != "baseline")  # each has its gap
    assert {row[section.columns.index("run")] for row in section.rows} == {run.key for run in runs}
    (claim,) = section.claims
    assert "nano_unit, gcide, 20 tokens per parameter: Internal-Taper +aux" in claim.ours


def test_the_peers_of_ours_are_in_its_tables_alone(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(ours, "draw_gaps", lambda places, path: drawn.extend(places))
    runs = PICK["ours"](stored())
    ours.section(runs).draw(tmp_path / "ours.png")
    assert {row.variant for _, rows in drawn for row in rows} == {"internal_aux", "all_aux"}
    peers = [run for run in stored() if run.setup.size == "nano_unit" and run.variant in PEERS]
    assert peers
    assert not {run.key for run in PICK["pretrain"](stored())} & {run.key for run in peers}
    longer = [Run("nano_unit", "gcide", run.variant, run.seed, 40) for run in peers]
    more = [StoredRun(record(run)) for run in (*longer, Run("nano_unit", "gcide", "internal_aux", 0, 20))]
    assert not {run.variant for run in PICK["length"]([*stored(), *more])} & {*PEERS}
    # Without ours nothing else would tell them.
    alone = [run for run in stored() if run.setup.size == "nano" or run.variant in ("baseline", *PEERS)]
    assert {run.key for run in peers} <= {run.key for run in PICK["pretrain"](alone)}


def changed_by(change):
    """The targets of ours at 20 tokens per parameter that hold, and those that do not, of changed results."""
    runs = [run for run in PICK["ours"](stored()) if run.setup.size == "nano_unit" and run.length == 20]
    made = [StoredRun(json.loads(json.dumps(run.record))) for run in runs]
    bases = {run.seed: run.loss for run in made if run.variant == "baseline"}
    for run in made:
        if run.idea == OURS:
            run.result["val"] = [[step, loss] for step, loss in run.curve("val")]
            run.result["val"][-1][1] = bases[run.seed] * 0.99
            change(run)
    lines = ours.section(made).lines
    rows = [cells_of(line) for line in lines if line.endswith((" yes |", " **no** |"))]
    return {row[0] for row in rows if row[3] == "yes"}, {row[0] for row in rows if row[3] == "**no**"}


@pytest.mark.parametrize(
    ("variant", "change", "broken"),
    [
        ("internal_aux", lambda r: r.result.update(diverged={"step": 7, "gate": 0.5}), "runs that diverge"),
        ("internal_aux", lambda r: r.result["val"][-1].__setitem__(1, r.result["val"][-1][1] * 1.02), "mean gap"),
        ("internal_aux", lambda r: r.result["val"][-1].__setitem__(1, r.result["val"][-1][1] * (1 + r.seed / 50)),
         "its 95% upper end"),
        ("all_aux", lambda r: r.result["val"][-1].__setitem__(1, r.result["val"][-1][1] * (1 - r.seed / 50)),
         "spread between seeds"),
        ("all_aux", lambda r: r.result["val"][-1].__setitem__(1, r.result["val"][-1][1] * 1.2),
         "mean gap to the lowest of FakeLN, DyT and Derf"),
        ("all_aux", lambda r: r.result["val"][3].__setitem__(1, 9.0), "widest gap while the gate falls"),
        ("all_aux", lambda r: r.result["tails"].update(loss_max=99.0), "largest token loss over the baseline's"),
        ("internal_aux", lambda r: r.result["random"].update(largest_loss=99.0), "the same on random tokens"),
        ("internal_aux", lambda r: r.result["random"].update(ratio=3.5), "RMS over the median on random tokens"),
    ],
)  # fmt: skip
def test_a_target_that_is_missed_is_told(variant, change, broken):
    held, _ = changed_by(lambda run: None)
    assert f"{title(variant)}: {broken}" in held
    _, missed = changed_by(lambda run: change(run) if run.variant == variant else None)
    assert f"{title(variant)}: {broken}" in missed
    assert all(what.startswith(title(variant)) for what in missed)


def test_ours_is_held_to_the_peer_that_is_lowest_at_the_seeds_of_both():
    runs = [run for run in PICK["ours"](stored()) if run.setup.size == "nano_unit" and run.length == 20]
    seeds = {"baseline": (0, 1), "internal_aux": (0, 1), "fakeln": (1, 2), "dyt": (0, 1), "derf": (2,)}
    losses = {"internal_aux": 2.0, "fakeln": 2.5, "dyt": 2.2, "derf": 1.0}
    made = []
    for run in runs:
        if run.seed in seeds.get(run.variant, ()):
            made.append(StoredRun(json.loads(json.dumps(run.record))))
            made[-1].result["val"][-1][1] = losses.get(run.variant, 3.0) + (run.variant == "fakeln") * (run.seed - 1)
    targets = table(ours.section(made).lines, "what")
    row = targets["Internal-Taper +aux: mean gap to the lowest of FakeLN, DyT and Derf"]
    assert (row["measured"], row["holds"]) == (f"{2.0 / 2.2 - 1:+.2%} (DyT)", "yes")


def test_a_short_run_is_held_to_the_baseline_of_its_draw():
    drawn = [run for run in stored() if run.draw is not None]
    others = {run.key for name, pick in PICK.items() if name != "short" for run in pick(stored())}
    assert not others & {run.key for run in drawn}
    runs = [run for run in drawn if run.draw < 3 and run.variant in ("baseline", "all_aux")]
    made = {(run.variant, run.draw): StoredRun(json.loads(json.dumps(run.record))) for run in runs}
    made["all_aux", 1].result["val"][-1][1] = 1.1 * made["baseline", 1].loss
    made["all_aux", 2].result["diverged"] = {"step": 7, "gate": 0.5, "why": "not finite"}
    lines = short.section([*made.values()]).lines
    (row,) = (cells_of(line) for line in lines if line.startswith("| the paper's |"))
    assert row[2:5] == ["3", "1", "1"]
    assert row[6] == "+10.00%"
    gaps = [cells_of(line)[5] for line in lines if re.match(r"\| [012] \|", line)]
    assert gaps[0] == f"{made['all_aux', 0].loss / made['baseline', 0].loss - 1:+.2%}"
    assert gaps[1:] == ["+10.00%", "diverged at step 7, gate 0.50"]


def test_short_runs_of_two_sizes_are_told_apart():
    drawn = [run for run in stored() if run.draw is not None]
    others = [StoredRun({**run.record, "settings": {**run.settings, "size": "other"}}) for run in drawn]
    one, both = (short.section(runs).lines for runs in (drawn, [*drawn, *others]))
    rows = [line for line in one if line.startswith("|")]
    assert rows
    assert [line for line in both if line.startswith("|")] == 2 * rows
    assert [line for line in both if line.startswith("###")] == [f"### {drawn[0].setup.size}", "### other"]


SHORT = [Run("nano_unit", "gcide", variant, 3, 2.0, draw=3) for variant in ("baseline", "all_aux")]


@pytest.mark.parametrize("order", [1, -1])
def test_short_runs_on_two_texts_of_a_corpus_are_told_apart(order):
    told = of_two_texts(SHORT, diverged=None)
    section = short.section(told[::order])
    rows = [cells_of(line) for line in section.lines if line.startswith("| 3 |")]
    assert [row[1] for row in rows] == ["gcide 11111111", "gcide 22222222"]
    assert [row[4] for row in rows] == [f"{told[at].loss:.4f}" for at in (0, 2)]
    assert rows[0][5].startswith("diverged at step 50")
    assert rows[1][5] == f"{told[3].loss / told[2].loss - 1:+.2%}"
    (way,) = (cells_of(line) for line in section.lines if line.startswith("| the paper's |"))
    assert way[2:4] == ["2", "1"]
    assert runs_of(section) == sorted(run.key for run in told)


def test_a_short_baseline_that_diverged_is_told():
    lines = short.section([StoredRun(record(SHORT[0], diverged=50)), StoredRun(record(SHORT[1]))]).lines
    (row,) = (cells_of(line) for line in lines if line.startswith("| 3 |"))
    assert row[4].startswith("diverged at step 50")
    assert row[5] == ""


def test_finetune_and_decode_read_what_our_commands_wrote():
    told = json.loads((ROOT / "docs/results/smollm2.json").read_text())
    section = finetune.section(ROOT / "docs/results/smollm2.json")
    assert len(section.rows) == len(told["runs"])
    rows = table(section.lines, "variant")
    kept = told["runs"]["finetune-seed0"]["tails"]
    assert rows["fine-tuning, all norms kept"]["loss"] == f"{kept['loss']:.4f}{tables.FEW}"
    for run in told["runs"].values():
        if "lost" in run:
            assert any(row["loss"] == run["lost"] for row in rows.values())
    paths = sorted((ROOT / "docs/results").glob("bench_decode*.json"))
    section = decode.section(paths)
    assert len(section.rows) == sum(len(json.loads(path.read_text())["rows"]) for path in paths)
    assert "x to " in section.claims[0].ours


def test_decoding_on_two_devices_is_not_mixed(tmp_path):
    told = json.loads((ROOT / "docs/results/bench_decode.json").read_text())
    (tmp_path / "bench_decode.json").write_text(json.dumps(told))
    for row in told["rows"]:
        if row["variant"] == "folded":
            row["ratio"] = 9.5
    (tmp_path / "bench_decode_cuda.json").write_text(json.dumps({**told, "device": "a GPU"}))
    paths = decode.find(tmp_path / "paper")
    skipped = {
        **told,
        "rows": [{**told["rows"][0], "tokens_per_s": None, "ttft_ms": None, "ratio": None, "skipped": "no engine"}],
    }
    (tmp_path / "bench_decode_skipped.json").write_text(json.dumps(skipped))
    assert any("| no engine |" in line for line in decode.section([tmp_path / "bench_decode_skipped.json"]).lines)
    (tmp_path / "bench_decode_skipped.json").unlink()
    section = decode.section(paths)
    devices = {row[1] for row in section.rows if row[section.columns.index("ratio")] == 9.5}
    assert devices == {"a GPU"}
    assert "a GPU" in section.claims[0].ours
    section.draw(tmp_path / "decode.png")


# ---- the page


def store(folder, runs):
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for run in runs:
        (folder / "runs" / f"{run.key}.json").write_text(json.dumps(run.record))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The whole page of a whole campaign."""
    out = tmp_path_factory.mktemp("results") / "paper"
    store(out, stored())
    for path in (ROOT / "docs/results").glob("*.json"):
        (out.parent / path.name).write_bytes(path.read_bytes())
    page.write_report(out)
    return out


def test_the_page_has_every_experiment_and_its_links_resolve(written):
    text = (written / "README.md").read_text()
    headings = {page._anchor(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 20
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (written / link).exists(), link
    for name in page.NAMES:
        assert {(written / f"{name}.{kind}").exists() for kind in ("csv", "png", "md")} == {True}
        assert (written / f"{name}.md").read_text().strip() in text
    lost = sum(not run.arrived for run in stored())
    hours = sum(run.record["ran"]["cpu_seconds"] for run in stored()) / 3600
    assert lost > 2
    assert f"{len(stored())} runs, {lost} of them diverged, in {hours:.2f} hours" in text
    assert "a machine; python 3.11.7, torch 2.13.0" in text


def test_every_row_of_the_csv_is_a_run(written):
    for name in ("pretrain", "length", "schedule"):
        with (written / f"{name}.csv").open() as file:
            rows = [*csv.DictReader(file)]
        runs = {run.key: run for run in PICK[name](stored())}
        assert {row["run"] for row in rows} == set(runs)
        assert len(rows) == len(runs)
        for row in rows:
            run = runs[row["run"]]
            assert float(row["val_loss"]) == run.loss if run.arrived else row["val_loss"] == "" and row["diverged_step"]


def test_figures_have_the_pages_width_and_ink(written):
    for name in page.NAMES:
        pixels = pyplot.imread(written / f"{name}.png")
        assert pixels.shape[1] == figures.WIDTH * figures.DPI
        colors = (pixels[::3, ::3, :3] * 255).astype(int) @ (1, 256, 65536)
        assert len(np.unique(colors)) > 20


def test_the_commands_for_what_is_missing_are_taken(written):
    text = (written / "README.md").read_text().partition("## What is missing")[2]
    commands = [shlex.split(line) for line in re.findall(r"`((?:tools/paper|taperlit) [^`]+)`", text)]
    assert len([words for words in commands if "tinystories" in words]) == 4
    assert len([words for words in commands if any("gpt2" in word for word in words)]) == 4
    for words in commands:
        if words[0] == "tools/paper":
            command.parse(words[1:])
        for path in words:
            assert not path.startswith("configs/") or (ROOT / path).exists()


def test_runs_that_are_missing_are_counted(tmp_path):
    runs = [run for run in stored() if (run.variant, run.seed, run.length) != ("derf", 2, 10.0)]
    told = {one.command: one.what for one in missing(runs, tmp_path)}
    assert told["tools/paper pretrain --size nano --corpus gcide"] == "1 of the 24 runs of `pretrain` at nano on gcide"
    assert "tools/paper length --size nano --corpus gcide" not in told
    assert not any("runs of" in what for what in (one.what for one in missing(stored(), tmp_path)))


def test_the_papers_sizes_stand_beside_ours_once_they_are_run(tmp_path):
    there = {"size": "small_1m", "corpus": "tinystories"}
    paper = [record(Run("nano", "gcide", variant, 0, 10), **there) for variant in ("baseline", "internal")]
    runs = [*PICK["pretrain"](stored()), *map(StoredRun, paper)]
    (claim, *_) = pretrain.section(runs).claims
    assert re.search(r"nano, gcide.*<br>small_1m, tinystories.*Internal-Taper", claim.ours)
    told = missing(runs, tmp_path)
    assert not any(one.what.startswith("the paper's small_1m") for one in told)
    assert any("`pretrain` at small_1m on tinystories" in one.what for one in told)


def test_an_experiment_is_written_from_what_is_stored(tmp_path):
    out = tmp_path / "paper"
    (out / "runs").mkdir(parents=True)
    for run in stored():
        (out / f"runs/{run.key}.json").write_text(json.dumps(run.record))
    page.write_experiments(["pretrain"], out)
    assert {path.name for path in out.iterdir()} == {"runs", "pretrain.csv", "pretrain.md", "pretrain.png"}
    rows = list(csv.DictReader((out / "pretrain.csv").open()))
    assert len(rows) == len(pretrain.section(PICK["pretrain"](stored())).rows) > 5
    shutil.rmtree(out / "runs")
    page.write_experiments(["pretrain"], out)  # a picture of what is gone would be wrong
    assert {path.name for path in out.iterdir()} == {"pretrain.csv", "pretrain.md"}
    assert "No runs yet" in (out / "pretrain.md").read_text()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_subset_of_runs_gives_tables(data):
    runs = data.draw(st.lists(st.sampled_from(stored()), max_size=12, unique_by=lambda run: run.key))
    for name, pick in PICK.items():
        section = page.OF_RUNS[name](pick(runs))
        for line in section.lines:
            assert not re.search(r"\b(nan|None)\b", line), line
        assert all(len(row) == len(section.columns) for row in section.rows)


@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_any_subset_of_runs_gives_a_page(data, tmp_path_factory):
    runs = data.draw(st.lists(st.sampled_from(stored()), max_size=6, unique_by=lambda run: run.key))
    out = tmp_path_factory.mktemp("subset") / "paper"
    store(out, runs)
    page.write_report(out)
    assert f"{len(runs)} runs, " in (out / "README.md").read_text() or not runs


def test_a_run_that_diverged_at_once_leaves_nothing_to_draw(tmp_path):
    lost = record(Run("nano", "gcide", "all", 0, 10), diverged=1)
    lost["result"] |= {"val": [], "train": [], "traces": {}}
    out = tmp_path / "paper"
    store(out, [StoredRun(lost)])
    page.write_report(out)
    assert "All-Taper 1 of 1 (seed 0 diverged at step 1" in (out / "README.md").read_text()


# ---- figures


@given(st.lists(st.floats(0, 1), max_size=9), st.floats(0.01, 0.1))
@settings(max_examples=60, deadline=None)
def test_names_stand_apart_and_in_order(wanted, gap):
    wanted = sorted(wanted)
    placed = figures._apart(wanted, gap)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(placed))
    assert sum(placed) == pytest.approx(sum(wanted))  # none is pushed further than the others need
    if all(b - a >= gap for a, b in itertools.pairwise(wanted)):
        assert placed == pytest.approx(wanted)


def test_every_variant_looks_unlike_the_others():
    looks = [(style["color"], str(style["linestyle"])) for style in map(figures.style, records.TITLES)]
    assert len(set(looks)) == len(records.TITLES)
    assert len({color for color, _ in looks}) == len(records.TITLES)


@pytest.mark.parametrize("high", [0.001, 0.09, 0.5, 12.0])
def test_gaps_of_any_size_have_labels(high):
    figure, axis = pyplot.subplots()
    axis.plot([0, 1], [-0.004, high])
    figures.gap_scale(axis, -0.004, high)
    figure.canvas.draw()
    low, top = axis.get_ylim()
    assert low < -0.004
    assert top > high
    shown = [label.get_text() for label in axis.get_yticklabels() if low <= label.get_position()[1] <= top]
    assert len([text for text in shown if text.endswith("%")]) >= 3
    pyplot.close(figure)
