"""The monitor's tails of the scales at the norms' inputs, against float64 and numpy's quantiles."""

import csv

import lightning as L
import numpy as np
import pytest
import torch
from processes import on_two
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy import Toy, fit, rows

from taperlit import AlignmentFreeze, GateSchedule, TaperMonitor
from taperlit.callbacks.dashboard import layout
from taperlit.norm import tapered_norms
from taperlit.report.groups import MAIN, OTHERS, series_of

NORMS = ["layers.0.norm", "layers.1.norm"]


class Wide(Toy):
    """Enough rows that the 99.9th percentile is not the largest."""

    def __init__(self, *args, **words):
        super().__init__(*args, **words)
        self.batch_size = 1500

    def train_dataloader(self):
        x = torch.randn(6000, 4, generator=torch.Generator().manual_seed(1))
        return torch.utils.data.DataLoader(x, batch_size=self.batch_size)


class Inputs(L.Callback):
    """What each watched module is given, step by step, in float64."""

    def __init__(self, names):
        self.names, self.seen = names, {}

    def on_fit_start(self, trainer, pl_module):
        for name in self.names:
            pl_module.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: self.look(trainer, name, module, args[0])
            )

    def look(self, trainer, name, module, h):
        if module.training and torch.is_grad_enabled():
            h = h.detach().double()
            h = h - h.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else h
            step = self.seen.setdefault(trainer.global_step, {})
            step.setdefault(name, []).append(h.square().mean(-1).sqrt())

    def figures(self, step):
        expected = {}
        for name, parts in self.seen[step].items():
            s = torch.cat(parts).numpy()
            expected[f"taper/scale_max/{name}"] = s.max() / s.mean()
            expected[f"taper/scale_p999/{name}"] = np.quantile(s, 0.999, method="inverted_cdf") / s.mean()
        expected["taper/scale_max"] = max(value for tag, value in expected.items() if "max" in tag)
        return expected


def traces(tmp_path, model, *callbacks, name="logs", **options):
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name)
    fit(tmp_path, model, *callbacks, logger=logger, log_every_n_steps=1, **options)
    return read(tmp_path / name / "version_0")


def read(folder):
    seen = {}
    with open(f"{folder}/metrics.csv") as file:
        for row in csv.DictReader(file):
            for tag, value in row.items():
                if value and tag.startswith("taper/scale"):
                    seen.setdefault(int(row["step"]), {})[tag] = float(value)
    return seen


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_traces_are_the_formula_in_every_phase(tmp_path, norm, accumulate):
    inputs = Inputs([*NORMS, "head"])
    run = [GateSchedule(2, 4), AlignmentFreeze(), inputs, TaperMonitor(every=1, residual="head")]
    seen = traces(tmp_path, Wide(norm), *run, steps=6, accumulate_grad_batches=accumulate)
    assert list(seen) == list(range(6))
    for step, figures in seen.items():
        assert figures == pytest.approx(inputs.figures(step), rel=1e-5)
    assert seen[5]["taper/scale_p999/head"] < seen[5]["taper/scale_max/head"]


def test_a_plain_model_has_its_residuals(tmp_path):
    inputs = Inputs(["head"])
    seen = traces(tmp_path, Wide(tapered=False), inputs, TaperMonitor(every=1, residual="head"), steps=2)
    assert seen[1] == pytest.approx(inputs.figures(1), rel=1e-5)
    assert traces(tmp_path, Wide(tapered=False), TaperMonitor(every=1), name="none", steps=2) == {}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Counted(Wide):
    """Counts torch's operations of its forward pass, and the hooks on its norms."""

    def __init__(self):
        super().__init__()
        self.operations, self.hooks = [], []

    def training_step(self, batch, batch_idx):
        self.hooks.append(sum(len(norm._forward_pre_hooks) for norm in tapered_norms(self).values()))
        with Operations() as operations:
            loss = super().training_step(batch, batch_idx)
        self.operations.append(operations.count)
        return loss


def test_other_steps_do_no_work_and_recorded_ones_little(tmp_path):
    plain, watched = Counted(), Counted()
    fit(tmp_path, plain, GateSchedule(2, 4), AlignmentFreeze(), steps=8)
    run = [GateSchedule(2, 4), AlignmentFreeze(), TaperMonitor(every=4)]
    fit(tmp_path, watched, *run, steps=8, logger=L.pytorch.loggers.CSVLogger(tmp_path), log_every_n_steps=1)
    more = [b - a for a, b in zip(plain.operations, watched.operations, strict=True)]
    assert [b - a for a, b in zip(plain.hooks, watched.hooks, strict=True)] == [2, 0, 0, 0, 2, 0, 0, 0]
    assert [count for step, count in enumerate(more) if step % 4] == [0] * 6
    assert all(0 < count <= 2 * 8 for count in more[::4])  # of two norms: detached, squared, averaged, its root


def test_a_norm_in_a_compiled_graph_has_no_trace_and_is_not_compiled_again(tmp_path):
    from torch._dynamo.utils import counters

    graphs = []
    for every in (100, 1):
        torch._dynamo.reset()
        counters.clear()
        model = Wide()
        model.layers[0].compile(dynamic=False, backend="eager")
        run = [GateSchedule(2, 4), AlignmentFreeze(), TaperMonitor(every=every)]
        seen = traces(tmp_path, model, *run, name=f"every{every}", steps=6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    assert {tag for figures in seen.values() for tag in figures} == {
        "taper/scale_max", "taper/scale_max/layers.1.norm", "taper/scale_p999/layers.1.norm",
    }  # fmt: skip


def test_the_charts_have_them():
    tags = [*(f"taper/scale_{what}/{name}" for what in ("max", "p999") for name in NORMS), "taper/scale_max"]
    charts = layout(tags)["Scales at the norms' inputs, over their mean"]
    assert [pattern for _, (pattern,) in charts.values()] == [
        "(?:.*-)?taper/scale_max$", "(?:.*-)?taper/scale_max/", "(?:.*-)?taper/scale_p999/",
    ]  # fmt: skip
    points = {tag: [(0, 1.0), (5, 2.0)] for tag in tags}
    drawn = {group.title: series_of(group, points) for group in (*MAIN, *OTHERS)}
    assert list(drawn["largest scale over the mean"]) == ["taper/scale_max"]
    assert [s.name for s in drawn["largest scale over the mean, by norm"].values()] == ["0.norm", "1.norm"]
    assert len(drawn["99.9% scale over the mean, by norm"]) == 2


class Dealt(Toy):
    """Every process has its share of each batch of 8."""

    def train_dataloader(self):
        share = rows()[self.global_rank :: self.trainer.world_size]
        return torch.utils.data.DataLoader(share, batch_size=8 // self.trainer.world_size)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    def callbacks():
        return [GateSchedule(2, 4), AlignmentFreeze(), TaperMonitor(every=1, residual="head")]

    one = traces(tmp_path, Dealt(), *callbacks(), name="one", steps=6)
    two = traces(tmp_path, Dealt(), *callbacks(), name="two", steps=6, **on_two())
    largest = [{step: {t: v for t, v in f.items() if "p999" not in t} for step, f in run.items()} for run in (one, two)]
    for step, figures in largest[0].items():
        assert largest[1][step] == pytest.approx(figures, rel=1e-4)
    assert two[0].keys() == one[0].keys()
