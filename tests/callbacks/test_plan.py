"""Callbacks meet at the norms: what they announce there, what they refuse, and that nothing of it stays."""

import itertools

import lightning as L
import pytest
import torch
from torch import nn
from toy import Moments, Toy, fit, scalars

from taperlit import AlignmentFreeze, GateSchedule, ScaleAnchor, taper
from taperlit.errors import TaperlitError
from taperlit.norm import GatePlan, Phase, shared_gate, tapered_norms


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("accumulate", [1, 3])
def test_no_forward_pass_below_gate_1_comes_before_the_freeze(tmp_path, order, accumulate):
    seen = []

    class Watch(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            for norm in tapered_norms(pl_module).values():
                norm.register_forward_pre_hook(lambda norm, args: seen.append((norm.gate.phase, bool(norm.frozen))))

    callbacks = [GateSchedule(4, 8), AlignmentFreeze(), ScaleAnchor("head")]
    fit(tmp_path, Toy(), *(callbacks[i] for i in order), Watch(), accumulate_grad_batches=accumulate)
    assert {phase for phase, _ in seen} == set(Phase) - {Phase.LINEAR_FIRST}
    assert all(frozen == (phase is not Phase.NORMALIZE) for phase, frozen in seen)


@pytest.mark.parametrize(("rate", "centred"), [(0.01, False), (0.3, True), (1.0, False)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_scalars_are_those_of_the_formula(tmp_path, rate, centred, accumulate):
    model = Toy(nn.LayerNorm if centred else nn.RMSNorm)
    moments = Moments()
    fit(
        tmp_path, model, GateSchedule(5, 8), AlignmentFreeze(ema_rate=rate), moments, accumulate_grad_batches=accumulate
    )
    steps = [range(accumulate * k, accumulate * (k + 1)) for k in range(5)]
    assert scalars(model) == pytest.approx(moments.scalars(rate, steps), rel=1e-5)


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(TaperlitError, match=r"ema_rate is .*above 0 and at most 1"):
        AlignmentFreeze(ema_rate=rate)


def test_scalars_frozen_before_need_nobody_to_freeze_them(tmp_path):
    model = Toy()
    fit(tmp_path, model, AlignmentFreeze(at=3), steps=3)
    assert not any(norm.frozen for norm in tapered_norms(model).values())  # the next step would have frozen them
    fit(tmp_path, model, AlignmentFreeze(at=3), steps=4)
    before = scalars(model)
    fit(tmp_path, model, GateSchedule(2, 5))
    assert scalars(model) == before
    assert shared_gate(model).phase is Phase.LINEAR


class Stale(L.Callback):
    """An announcement that an earlier run left at the gate."""

    def setup(self, trainer, pl_module, stage):
        shared_gate(pl_module).plan = GatePlan(warmup=3, alignment=True)


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (GateSchedule(2, 5), "GateSchedule without AlignmentFreeze: add"),
        (AlignmentFreeze(), "AlignmentFreeze needs to know when to freeze: add a GateSchedule"),
        (ScaleAnchor("head"), "ScaleAnchor needs to know when to freeze: add a GateSchedule"),
    ],
)
def test_an_earlier_runs_announcements_do_not_count(tmp_path, callback, words):
    model = Toy()
    with pytest.raises(TaperlitError, match=words):
        fit(tmp_path, model, Stale(), callback)
    assert model.gates == []


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_at_the_gate(tmp_path, fails):
    model = Toy()
    plans = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            plans.append(shared_gate(pl_module).plan)
            if fails:
                raise KeyError("an accident")

    callbacks = [GateSchedule(4, 8), AlignmentFreeze(), ScaleAnchor("head"), Look()]
    if fails:
        with pytest.raises(KeyError):
            fit(tmp_path, model, *callbacks)
    else:
        fit(tmp_path, model, *callbacks)
    assert plans[0] == GatePlan(warmup=4, end=8, alignment=True)
    assert shared_gate(model).plan == GatePlan()
    assert "training_step" not in vars(model)
    assert not model.head._forward_pre_hooks
    assert "plan" not in "".join(model.state_dict())


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ([GateSchedule(4, 8), AlignmentFreeze(at=5)], "AlignmentFreeze.at is step 5, after the gate's warm-up of 4"),
        ([AlignmentFreeze(at=0.01)], "no steps before its boundary; raise AlignmentFreeze.at to at least 1 step"),
    ],
)
def test_boundaries_that_make_no_sense_are_refused_before_the_first_step(tmp_path, callbacks, words):
    model = Toy()
    with pytest.raises(TaperlitError, match=words):
        fit(tmp_path, model, *callbacks)
    assert model.gates == []


class Forgetful(Toy):
    """Its optimizer was written for the model as it was."""

    def configure_optimizers(self):
        kept = [p for name, p in self.named_parameters() if "taper_" not in name]
        return torch.optim.AdamW(kept, lr=self.lr)


def test_an_optimizer_without_the_linear_branch_is_refused_before_the_first_step(tmp_path):
    model = Forgetful()
    with pytest.raises(TaperlitError, match=r"No optimizer holds layers\.0\.norm\.taper_weight, layers\.1") as error:
        fit(tmp_path, model, GateSchedule(4, 8), AlignmentFreeze())
    assert "\n" not in str(error.value)
    assert model.gates == []


class TapersLate(Toy):
    """Tapers when the optimizer exists, as the error says one can."""

    def __init__(self):
        super().__init__(tapered=False)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        taper(self, optimizers=optimizer)
        return optimizer


def test_the_mends_that_the_error_names_work(tmp_path):
    late, early = TapersLate(), Toy()
    for model in (late, early):
        fit(tmp_path, model, GateSchedule(4, 8), AlignmentFreeze())
    assert scalars(late) == scalars(early)
    a, b = (model.layers[0].norm.taper_weight for model in (late, early))
    assert torch.equal(a, b)
