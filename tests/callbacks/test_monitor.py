"""The monitor's traces against the formulas, and the steps at which they stand."""

import csv

import lightning as L
import pytest
import torch
from torch import nn
from toy import Stop, Toy, fit

from taperlit import AlignmentFreeze, GateSchedule, TaperMonitor
from taperlit.callbacks import FiniteGuard
from taperlit.errors import TaperlitError
from taperlit.norm import tapered_norms


class OffsetRMSNorm(nn.Module):
    """Gains are 1 + weight, as in Gemma."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(0.1 * torch.randn(width)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class Bare(nn.RMSNorm):
    def __init__(self, width):
        super().__init__(width, elementwise_affine=False)


def traces(tmp_path, model, *callbacks, **options):
    logger = L.pytorch.loggers.CSVLogger(tmp_path, "logs")
    fit(tmp_path, model, *callbacks, logger=logger, log_every_n_steps=1, **options)
    seen = {}
    with open(f"{logger.log_dir}/metrics.csv") as file:
        for row in csv.DictReader(file):
            for tag, value in row.items():
                if value:
                    seen.setdefault(tag, {})[int(row["step"])] = float(value)
    return seen


@pytest.mark.parametrize(("norm", "offset"), [(nn.RMSNorm, 0), (nn.LayerNorm, 0), (OffsetRMSNorm, 1)])
def test_the_gains_are_those_in_use(tmp_path, norm, offset):
    expected = {}

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for name, norm in tapered_norms(pl_module).items():
                weight, taper_weight = (p.detach().double() + offset for p in (norm.weight, norm.taper_weight))
                g, c = norm.gate.value.double(), norm.alignment.double()
                gain = g * weight + (1 - g) * c * taper_weight
                expected.setdefault(f"taper/gain_mean/{name}", {})[trainer.global_step] = gain.mean().item()
                expected.setdefault(f"taper/gain_std/{name}", {})[trainer.global_step] = gain.std(correction=0).item()

    seen = traces(tmp_path, Toy(norm), GateSchedule(4, 8), AlignmentFreeze(), Watch(), TaperMonitor(every=1))
    for tag, values in expected.items():
        assert seen[tag] == pytest.approx(values, rel=1e-5, abs=1e-6)


def test_a_norm_without_gains_has_no_trace_of_them(tmp_path):
    seen = traces(tmp_path, Toy(Bare), GateSchedule(4, 8), AlignmentFreeze(), TaperMonitor(every=1))
    assert not any("gain" in tag for tag in seen)
    assert len(seen["taper/gate"]) == 12


@pytest.mark.parametrize("at", [3, 4, 5])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_records_at_the_same_steps(tmp_path, at, accumulate):
    def callbacks():
        return [GateSchedule(4, 8), AlignmentFreeze(), TaperMonitor(every=4)]

    options = {"accumulate_grad_batches": accumulate}
    whole = traces(tmp_path / "whole", Toy(), *callbacks(), **options)["taper/gate"]
    assert list(whole) == [0, 4, 8]
    fit(tmp_path, Toy(), *callbacks(), Stop(at), **options).save_checkpoint(tmp_path / "mid.ckpt")
    rest = traces(tmp_path / "rest", Toy(), *callbacks(), ckpt_path=tmp_path / "mid.ckpt", **options)["taper/gate"]
    assert rest == {step: value for step, value in whole.items() if step >= at}


def test_a_step_that_the_guard_leaves_out_is_recorded_as_one(tmp_path):
    class Bad(Toy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 2 else 1)

    seen = traces(tmp_path, Bad(), TaperMonitor(every=1), FiniteGuard(skip=True), steps=4)
    assert [value == 0 for value in seen["grad_norm/head.weight"].values()] == [False, False, True, False]
    assert list(seen["train/skipped_steps"].values()) == [0, 0, 1, 1]


def test_inputs_by_keyword_and_outputs_that_are_no_tensor(tmp_path):
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 1)

        def forward(self, scale=1.0, hidden=None):
            return self.linear(hidden * scale)

    class Model(Toy):
        def __init__(self):
            super().__init__()
            self.head = Keyword()
            self.pair = nn.Identity()

        def forward(self, x):
            return self.pair((self.head(scale=2.0, hidden=self.layers(self.embed(x))), None))[0]

    seen = traces(tmp_path, Model(), TaperMonitor(every=1, residual="head"), steps=2)
    assert len(seen["taper/pre_logit_rms"]) == 2
    with pytest.raises(TaperlitError, match="'pair' returns a tuple; name the module whose output is the logits"):
        traces(tmp_path / "other", Model(), TaperMonitor(every=1, logits="pair"), steps=2)
