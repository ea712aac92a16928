"""The dashboard, as TensorBoard's own plug-ins read it from the event files, and what other loggers get."""

import csv
import json
import re
import string

import lightning as L
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin
from tensorboard.util.tensor_util import make_ndarray
from torch import nn
from toy import Stop, Toy, fit

from taperlit import AlignmentFreeze, GateSchedule, TaperMonitor, taper
from taperlit.callbacks.dashboard import PREFIX, layout
from taperlit.norm import tapered_norms
from taperlit.report.traces import tensorboard_scalars


class Board:
    """TensorBoard on a folder of runs, without its server."""

    def __init__(self, folder):
        self.events = EventMultiplexer(tensor_size_guidance={"scalars": 1000})
        self.events.AddRunsFromDirectory(str(folder))
        self.events.Reload()
        context = TBContext(logdir=str(folder), data_provider=MultiplexerDataProvider(self.events, str(folder)))
        context.plugin_name_to_instance = {"scalars": ScalarsPlugin(context)}
        self.plugin = CustomScalarsPlugin(context)

    def charts(self):
        """The regular expressions by category and title; a title that comes twice is an error."""
        found = {}
        for category in json.loads(self.plugin.layout_impl(RequestContext(), ""))["category"]:
            for chart in category["chart"]:
                assert (category["title"], chart["title"]) not in found
                found[category["title"], chart["title"]] = chart["multiline"]["tag"]
        return found

    def lines(self, run):
        """The tags on each chart, as the plug-in answers for a run."""
        return {
            chart: {tag for pattern in patterns for tag in self.answer(run, pattern)}
            for chart, patterns in self.charts().items()
        }

    def answer(self, run, pattern):
        answer = self.plugin.scalars_impl(RequestContext(), run, pattern, "")
        assert answer["regex_valid"]
        return answer["tag_to_events"]


class Logs(Toy):
    """Logs losses as Lightning's users do."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss


def callbacks(every=1):
    return [GateSchedule(4, 8), AlignmentFreeze(), TaperMonitor(every, residual="head", logits="head")]


def run(folder, name, model, *more, logger=None, **options):
    logger = logger or TensorBoardLogger(folder, name, version="run")
    options = {"log_every_n_steps": 1, "limit_val_batches": 1, "val_check_interval": 5, **options}
    fit(folder, model, *more, logger=logger, **options)


GRADIENTS = "Gradient norms by weight type"


def test_every_trace_is_on_one_chart_and_no_chart_is_empty(tmp_path):
    run(tmp_path, "taper", Logs(), *callbacks())
    board = Board(tmp_path)
    lines = board.lines("taper/run")
    model = Toy()
    assert lines["Taper", "c of every norm"] == {f"taper/alignment/{name}" for name in tapered_norms(model)}
    assert lines["Taper", "gate"] == {"taper/gate"}
    assert lines["Pre-logit residual", "RMS"] == {"taper/pre_logit_rms"}
    assert lines["Pre-logit residual", "logit norm"] == {"taper/logit_norm"}
    assert lines["Pre-logit residual", "radial gradient"] == {"taper/radial_gradient"}
    assert lines["Losses", "training and validation"] == {"train_loss_step", "train_loss_epoch", "val/loss"}
    assert lines[GRADIENTS, "layers"] == {
        f"grad_norm/layers.{weight}" for weight in (
            "norm.weight", "norm.taper_weight", "linear.weight", "linear.bias",
        )
    }  # fmt: skip
    assert all(lines.values())
    tags = {tag for tag in board.events.Runs()["taper/run"]["tensors"] if tag.startswith(("taper/", "grad_norm/"))}
    shown = [tag for on_chart in lines.values() for tag in on_chart]
    assert {tag for tag in shown if "loss" not in tag} == tags
    assert len(shown) == len(set(shown))


def test_runs_of_all_kinds_share_one_dashboard(tmp_path):
    class Deep(Toy):
        def __init__(self):
            super().__init__(tapered=False)
            self.layers.append(Toy(tapered=False).layers[0])
            taper(self)

    run(tmp_path, "a_baseline", Logs(tapered=False), TaperMonitor(1, residual="head"), steps=2)
    run(tmp_path, "b_taper", Toy(), *callbacks())
    run(tmp_path, "c_deep", Deep(), *callbacks())
    board = Board(tmp_path)
    alone = {chart for name in ("a_baseline", "b_taper", "c_deep") for chart in Board(tmp_path / name).charts()}
    assert set(board.charts()) == alone  # and each once
    empty = {chart for chart, tags in board.lines("a_baseline/run").items() if not tags}
    assert empty == {("Taper", "gate"), ("Taper", "c of every norm"), ("Pre-logit residual", "logit norm")}
    assert all(Board(tmp_path / "a_baseline").lines("run").values())
    assert len(board.lines("c_deep/run")["Taper", "c of every norm"]) == 3


def test_a_resumed_run_keeps_its_dashboard_and_its_past(tmp_path):
    run(tmp_path / "whole", "", Toy(), *callbacks(), steps=12)
    first = TensorBoardLogger(tmp_path / "cut", "", version="run")
    fit(tmp_path, Toy(), *callbacks(), Stop(6), logger=first).save_checkpoint(tmp_path / "mid.ckpt")
    run(tmp_path / "cut", "", Toy(), *callbacks(), ckpt_path=tmp_path / "mid.ckpt", steps=12)
    whole, cut = Board(tmp_path / "whole"), Board(tmp_path / "cut")
    assert len(list((tmp_path / "cut/run").glob("events*"))) == 2
    assert cut.charts() == whole.charts()
    for tag in ("taper/gate", "taper/radial_gradient"):
        traces = [[(e.step, e.tensor_proto) for e in board.events.Tensors("run", tag)] for board in (cut, whole)]
        for trace in traces:  # two files of one second are read in the order of their numbers as text: 10 before 9
            trace.sort(key=lambda event: event[0])
        assert [step for step, _ in traces[0]] == list(range(12))
        assert traces[0][:6] == traces[1][:6]  # the rest has other batches: this loader does not resume
    for name in tapered_norms(Toy()):
        assert sorted(e.step for e in cut.events.Tensors("run", f"gain/{name}")) == list(range(12))


class Gains(L.Callback):
    """Keeps the gains in use by the formula in float64."""

    def __init__(self):
        self.seen = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, norm in tapered_norms(pl_module).items():
            gamma, twin = (p.detach().double() for p in (norm.weight, norm.taper_weight))
            g, c = norm.gate.value.double(), norm.alignment.double()
            self.seen[name, trainer.global_step] = (g * gamma + (1 - g) * c * twin).numpy()


def test_the_gains_are_histograms_and_for_other_loggers_numbers(tmp_path):
    gains = Gains()
    loggers = [TensorBoardLogger(tmp_path, "board", version="run"), CSVLogger(tmp_path, "table", version="run")]
    run(tmp_path, "", Toy(), *callbacks(), gains, logger=loggers)
    board = Board(tmp_path / "board")
    tags = board.events.Runs()["run"]["tensors"]
    assert not any("gain_" in tag for tag in tags)
    with open(tmp_path / "table/run/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["taper/gate"]]
    assert len(rows) == 12
    reported = tensorboard_scalars(tmp_path / "board/run")  # the report makes numbers of the histograms
    for name in tapered_norms(Toy()):
        events = board.events.Tensors("run", f"gain/{name}")
        assert reported[f"taper/gain_mean/{name}"] == [
            (step, pytest.approx(gains.seen[name, step].mean(), abs=1e-6)) for step in range(12)
        ]
        assert len(events) == 12
        for event, row in zip(events, rows, strict=True):
            left, right, count = make_ndarray(event.tensor_proto).T
            gain = gains.seen[name, event.step]
            assert count.sum() == gain.size
            inside = [((gain >= a - 1e-6) & (gain <= b + 1e-6)).sum() for a, b in zip(left, right, strict=True)]
            assert (inside >= count).all()
            assert float(row[f"taper/gain_mean/{name}"]) == pytest.approx(gain.mean(), abs=1e-6)
            assert float(row[f"taper/gain_std/{name}"]) == pytest.approx(gain.std(), abs=1e-6)
    shared = {tag for tag in tags if tag.startswith(("taper/", "grad_norm/"))}
    assert shared == {tag for tag in rows[0] if tag.startswith(("taper/", "grad_norm/")) and "gain_" not in tag}


def test_a_long_run_draws_two_hundred_histograms_and_short_ones_each(tmp_path, monkeypatch):
    monkeypatch.setattr("taperlit.callbacks.monitor.HISTOGRAMS", 4)
    run(tmp_path, "long", Toy(), *callbacks(), steps=12)
    run(tmp_path, "short", Toy(), *callbacks(every=5), steps=12)
    run(tmp_path, "open", Toy(), TaperMonitor(every=1), steps=-1, max_epochs=1, limit_train_batches=6)
    board, name = Board(tmp_path), "gain/layers.0.norm"
    assert [e.step for e in board.events.Tensors("long/run", name)] == [0, 3, 6, 9]
    assert [e.step for e in board.events.Tensors("short/run", name)] == [0, 5, 10]
    assert [e.step for e in board.events.Tensors("open/run", name)] == list(range(6))


def test_gains_that_are_not_finite_are_not_drawn(tmp_path):
    class Breaks(Toy):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.layers[0].norm.weight.data[3] = float("nan")

    run(tmp_path, "taper", Breaks(), TaperMonitor(every=1), steps=3)
    events = Board(tmp_path).events
    assert [e.step for e in events.Tensors("taper/run", "gain/layers.0.norm")] == [0]
    assert len(events.Tensors("taper/run", "taper/gate")) == 3


def test_a_prefix_of_the_logger_is_no_obstacle(tmp_path):
    run(tmp_path, "", Logs(), *callbacks(), logger=TensorBoardLogger(tmp_path, "a", version="run", prefix="mine"))
    lines = Board(tmp_path).lines("a/run")
    assert lines["Taper", "gate"] == {"mine-taper/gate"}
    assert all(lines.values())


def test_layers_without_gains_and_models_without_traces(tmp_path):
    class Bare(nn.RMSNorm):
        def __init__(self, width):
            super().__init__(width, elementwise_affine=False)

    run(tmp_path, "bare", Toy(Bare), TaperMonitor(every=1), steps=2)
    assert not any(tag.startswith("gain/") for tag in Board(tmp_path).events.Runs()["bare/run"]["tensors"])
    assert layout([]) == {"Losses": layout(["taper/gate"])["Losses"]}


names = st.text(string.ascii_letters + string.digits + "_-+()[]*?", min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(names, min_size=1, max_size=4).map(".".join), unique=True))
def test_any_weight_is_on_the_chart_of_its_part(weights):
    charts = layout([f"grad_norm/{weight}" for weight in weights]).get(GRADIENTS, {})
    for weight in weights:
        on = [title for title, (_, [pattern]) in charts.items() if re.match(pattern, f"grad_norm/{weight}")]
        assert on == [".".join(weight.split(".")[:-2]) or "outermost"]
    assert all(pattern.startswith(PREFIX) for _, [pattern] in charts.values())
