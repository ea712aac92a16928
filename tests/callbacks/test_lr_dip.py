"""The learning rate dips where the taper begins, and neither a scheduler nor a checkpoint sees it."""

import lightning as L
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR
from toy import Noted, Stop, Toy, fit, rows, same, state_of

from taperlit import AlignmentFreeze, GateHold, GateSchedule, LearningRateDip
from taperlit.errors import TaperlitError
from taperlit.norm import shared_gate
from taperlit.schedule import gate_at

WARMUP, END, STEPS = 4, 9, 12
SCHEDULERS = {
    "none": None,
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.9),  # this and the next go on from the group's own
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, STEPS),
}


class Scheduled(Toy):
    """Two groups; its batches are known by their number, so that a resumed run sees what the unbroken one does."""

    def __init__(self, scheduler="none"):
        super().__init__()
        self.scheduler, self.after = scheduler, []

    def training_step(self, batch, batch_idx):
        return super().training_step(rows()[torch.arange(4 * batch_idx, 4 * batch_idx + 4) % 160], batch_idx)

    def configure_optimizers(self):
        head = [*self.head.parameters()]
        rest = [p for p in self.parameters() if not any(p is own for own in head)]
        self.optimizer = Noted([{"params": rest}, {"params": head, "lr": 3e-3}], "lr", lr=1e-2)
        make = SCHEDULERS[self.scheduler]
        if make is None:
            return self.optimizer
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": make(self.optimizer), "interval": "step"}}

    def on_train_batch_end(self, *_):
        self.after.append([group["lr"] for group in self.optimizer.param_groups])


class Gates(L.Callback):
    """Sets the gate of each step."""

    def __init__(self, *gates):
        self.gates = gates

    def on_train_batch_start(self, trainer, pl_module, *_):
        shared_gate(pl_module).set(self.gates[trainer.global_step])


def ratios(model, plain):
    """What each step's learning rates were multiplied with, which is the same in both groups."""
    pairs = zip(model.optimizer.used, plain.optimizer.used, strict=True)
    each = [[mine / theirs for mine, theirs in zip(*pair, strict=True)] for pair in pairs]
    assert all(one[0] == pytest.approx(one[1], rel=1e-12) for one in each)
    return [one[0] for one in each]


def dip(bottoms, factor, steps, count=STEPS):
    """The multipliers of steps 1 to ``count``, a dip beginning anew at each of ``bottoms``."""
    result = []
    for k in range(1, count + 1):
        past = [k - b for b in bottoms if b <= k]
        result.append(factor + (1 - factor) * past[-1] / steps if past and past[-1] < steps else 1.0)
    return result


def pair():
    return [GateSchedule(WARMUP, END), AlignmentFreeze()]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("factor", "steps"), [(0.1, 4), (0.0, 3), (0.5, 1)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_step_is_the_schedulers_times_the_dip(tmp_path, scheduler, factor, steps, accumulate):
    model, plain = Scheduled(scheduler), Scheduled(scheduler)
    options = {"accumulate_grad_batches": accumulate}
    fit(tmp_path, model, *pair(), LearningRateDip(factor, steps), **options)
    fit(tmp_path, plain, *pair(), **options)
    assert ratios(model, plain) == pytest.approx(dip([WARMUP + 1], factor, steps), rel=1e-12)
    assert model.after == plain.after  # to the last bit
    assert not same(state_of(model), state_of(plain))


@pytest.mark.parametrize("order", [1, -1])
def test_its_length_may_be_a_fraction_and_its_place_among_callbacks_any(tmp_path, order):
    model, plain = Scheduled(), Scheduled()
    fit(tmp_path, model, *[*pair(), LearningRateDip(0.2, 0.25)][::order])
    fit(tmp_path, plain, *pair())
    assert ratios(model, plain) == pytest.approx(dip([WARMUP + 1], 0.2, 3), rel=1e-12)


def test_it_waits_for_a_warm_up_that_waits(tmp_path):
    model, plain = Scheduled(), Scheduled()

    def auto():
        return [GateSchedule("auto", 10, settle=1e-9, least=2, latest=6), AlignmentFreeze()]

    fit(tmp_path, model, *auto(), LearningRateDip(0.1, 3))
    fit(tmp_path, plain, *auto())
    assert ratios(model, plain) == pytest.approx(dip([7], 0.1, 3), rel=1e-12)


def test_each_stage_has_its_own(tmp_path):
    """The second norm's gate begins to fall when the global one is below 0.5; the first dip is not over by then."""
    second = next(k for k in range(1, END) if gate_at(k, WARMUP, END) < 0.5)
    model, plain = Scheduled(), Scheduled()

    def staged():
        return [GateSchedule(WARMUP, END, stages="depth"), AlignmentFreeze()]

    fit(tmp_path, model, *staged(), LearningRateDip(0.1, 5))
    fit(tmp_path, plain, *staged())
    assert ratios(model, plain) == pytest.approx(dip([WARMUP + 1, second], 0.1, 5), rel=1e-12)


def test_a_gate_that_waits_or_goes_back_makes_no_second_dip(tmp_path):
    gates = (1, 1, 0.8, 0.8, 0.9, 1, 0.9, 0.7, 0.5, 0.2, 0, 0)
    model, plain = Scheduled(), Scheduled()
    fit(tmp_path, model, Gates(*gates), LearningRateDip(0.1, 2))
    fit(tmp_path, plain, Gates(*gates))
    assert ratios(model, plain) == pytest.approx(dip([3], 0.1, 2), rel=1e-12)


def test_it_works_beside_a_hold(tmp_path):
    model = Scheduled()
    fit(tmp_path, model, *pair(), GateHold(latest=11), LearningRateDip(0.1, 3))
    expected = [1e-2 * m for m in dip([WARMUP + 1], 0.1, 3)]
    assert [lr for lr, _ in model.optimizer.used] == pytest.approx(expected, rel=1e-12)


def test_weights_that_are_tapered_already_get_none(tmp_path):
    model = Scheduled()
    fit(tmp_path, model, *pair())
    fit(tmp_path, model, GateSchedule(WARMUP, END, closed="keep"), AlignmentFreeze(), LearningRateDip(0.1, 3))
    assert {lr for lr, _ in model.optimizer.used} == {1e-2}


@pytest.mark.parametrize("after", [3, 4, 5, 6, 8, 10])
@pytest.mark.parametrize("stages", [None, "depth"])
@pytest.mark.parametrize("scheduler", ["lambda", "exponential"])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, after, stages, scheduler):
    def callbacks():
        return [LearningRateDip(0.1, 4), GateSchedule(WARMUP, END, stages=stages), AlignmentFreeze()]

    whole, first, second = (Scheduled(scheduler) for _ in range(3))
    fit(tmp_path, whole, *callbacks())
    fit(tmp_path, first, *callbacks(), Stop(after)).save_checkpoint(tmp_path / "mid.ckpt")
    fit(tmp_path, second, *callbacks(), ckpt_path=tmp_path / "mid.ckpt")
    assert first.optimizer.used + second.optimizer.used == whole.optimizer.used
    assert same(state_of(whole), state_of(second))


def test_one_that_joins_a_run_under_way_dips_only_at_what_is_still_to_come(tmp_path):
    first, second = Scheduled(), Scheduled()
    fit(tmp_path, first, *pair(), Stop(6)).save_checkpoint(tmp_path / "mid.ckpt")
    fit(tmp_path, second, *pair(), LearningRateDip(0.1, 3), ckpt_path=tmp_path / "mid.ckpt")
    assert {lr for lr, _ in second.optimizer.used} == {1e-2}


def test_an_error_in_a_step_leaves_the_full_learning_rate(tmp_path):
    class Breaks(Scheduled):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == WARMUP:
                self.during = self.optimizer.param_groups[0]["lr"]
                raise RuntimeError("a bad batch")
            return super().training_step(batch, batch_idx)

    class Looks(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            self.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]

    model, looks = Breaks(), Looks()
    with pytest.raises(RuntimeError, match="a bad batch"):
        fit(tmp_path, model, *pair(), LearningRateDip(0.1, 3), looks)
    assert model.during == pytest.approx(1e-3)
    assert looks.rates == [1e-2, 3e-3]


def test_several_optimizers_of_ones_own_dip_by_the_global_step(tmp_path):
    """Two steps per batch: the gate falls with the third batch, in which steps 5 and 6 are."""

    class Manual(Scheduled):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            rest = [p for p in self.parameters() if not any(p is own for own in self.head.parameters())]
            self.both = Noted(rest, "lr", lr=1e-2), Noted(self.head.parameters(), "lr", lr=1e-2)
            self.optimizer = self.both[0]
            return self.both

        def training_step(self, batch, batch_idx):
            self.gates.append(shared_gate(self).value.item())
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    model = Manual()
    fit(tmp_path, model, *pair(), LearningRateDip(0.2, 4), steps=12)
    used = [lr for two in zip(*(one.used for one in model.both), strict=True) for (lr,) in two]
    assert used == pytest.approx([1e-2 * m for m in dip([5], 0.2, 4)], rel=1e-12)


@pytest.mark.parametrize("factor", [-0.1, 1.0, 1.5])
def test_a_factor_out_of_range_is_refused(factor):
    with pytest.raises(TaperlitError, match=r"factor is .*at least 0 and below 1"):
        LearningRateDip(factor)


@pytest.mark.parametrize("steps", [0, 0.0, -1])
def test_no_steps_are_refused(steps):
    with pytest.raises(TaperlitError, match=r"steps is .*(above 0|at least 1)"):
        LearningRateDip(0.1, steps)


def test_a_small_fraction_of_a_short_run_is_one_step(tmp_path):
    model, plain = Scheduled(), Scheduled()
    fit(tmp_path, model, *pair(), LearningRateDip(0.2, 0.01))
    fit(tmp_path, plain, *pair())
    assert ratios(model, plain) == pytest.approx(dip([WARMUP + 1], 0.2, 1), rel=1e-12)


def test_a_model_without_a_taper_is_refused(tmp_path):
    with pytest.raises(TaperlitError, match="LearningRateDip found no TaperNorm in Toy"):
        fit(tmp_path, Toy(tapered=False), LearningRateDip(0.1, 2))
