"""Steps that are none, few, repeated or spoilt: fast_dev_run, training_step returning None, LBFGS, one bad batch."""

import lightning as L
import pytest
import torch
from toy import Moments, Stop, Toy, fit, same, scalars, state_of

from taperlit import AlignmentFreeze, FoldOnEnd, GateSchedule, ScaleAnchor, TaperMonitor
from taperlit.callbacks import FiniteGuard, RngState, RunCheckpoint, TailPenalty
from taperlit.errors import TaperlitError
from taperlit.norm import shared_gate, tapered_norms


def everything(folder):
    return [
        GateSchedule(0.05, 0.5),
        AlignmentFreeze(),
        ScaleAnchor("head"),
        FoldOnEnd(str(folder)),
        TaperMonitor(residual="head", logits="head"),
        FiniteGuard(skip=True),
        RngState(),
    ]


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_fast_dev_run_goes_through_every_phase_and_writes_nothing(tmp_path, steps):
    model = Toy()
    (tmp_path / "last.ckpt").write_text("a run's")
    fit(
        tmp_path,
        model,
        *everything(tmp_path / "folded"),
        RunCheckpoint(dirpath=tmp_path),
        fast_dev_run=steps,
        enable_checkpointing=True,
    )
    assert len(model.gates) == steps
    assert model.gates[0] == 1.0
    if steps > 1:
        assert model.gates[-1] == 0.0
        assert all(norm.frozen for norm in tapered_norms(model).values())
    if steps > 2:
        assert 0 < model.gates[1] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert (tmp_path / "last.ckpt").read_text() == "a run's"


def test_fast_dev_run_takes_boundaries_that_are_meant_for_the_whole_run(tmp_path):
    model = Toy()
    fit(
        tmp_path, model, GateSchedule(1000, 5000), AlignmentFreeze(at=1000), ScaleAnchor("head", at=900), fast_dev_run=5
    )
    assert (model.gates[0], model.gates[-1]) == (1.0, 0.0)


class Leaves(Toy):
    """Runs forward on some batches, wild ones, and leaves them out."""

    def __init__(self, out, wild=1e6):
        super().__init__()
        self.out, self.wild, self.forwards = out, wild, 0

    def training_step(self, batch, batch_idx):
        self.forwards += 1
        if batch_idx in self.out:
            self.loss(batch * self.wild)
            return None
        return super().training_step(batch, batch_idx)


def test_a_step_without_a_loss_is_no_step_of_the_statistics(tmp_path):
    model, moments, anchor = Leaves({1, 3, 9}), Moments(), ScaleAnchor("head", ema_rate=0.3)
    callbacks = [GateSchedule(6, 9), AlignmentFreeze(ema_rate=0.3), anchor, FiniteGuard()]
    fit(tmp_path, model, *callbacks, moments)
    kept = [[0], [2], [4], [5]]
    assert scalars(model) == pytest.approx(moments.scalars(0.3, kept), rel=1e-5)
    assert anchor.target.item() == pytest.approx(moments.target(0.3, kept), rel=1e-5)


def test_the_guard_looks_before_a_step_whose_last_micro_batch_has_no_loss(tmp_path):
    class Bad(Leaves):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 4 else loss

    model = Bad({5, 11})
    with pytest.raises(TaperlitError, match=r"step 3 .*the loss is not finite; it began in the loss itself"):
        fit(tmp_path, model, FiniteGuard(), accumulate_grad_batches=2)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    guard = FiniteGuard(skip=True)
    fit(tmp_path, model := Bad({5, 11}), guard, accumulate_grad_batches=2)
    assert guard.skipped == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


class PoisonedEarly(Toy):
    """Every step's last micro-batch has no loss, and the third step's first one a bad one, of a wild batch."""

    def training_step(self, batch, batch_idx):
        if batch_idx % 2:
            return None
        bad = batch_idx == 4
        return super().training_step(batch * (20.0 if bad else 1.0), batch_idx) * (float("nan") if bad else 1.0)


class PoisonedByHand(Toy):
    """The same with manual optimization: two batches per step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        else:
            bad = batch_idx == 4
            loss = super().training_step(batch * (20.0 if bad else 1.0), batch_idx)
            self.manual_backward(loss * (float("nan") if bad else 1.0))


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize("manual", [True, False])
def test_what_the_guard_skips_counts_for_nobody_wherever_it_stands(tmp_path, manual, turn):
    model, moments, guard = (PoisonedByHand if manual else PoisonedEarly)(), Moments(), FiniteGuard(skip=True)
    counting = [AlignmentFreeze(ema_rate=0.3)]
    if not manual:
        counting += [ScaleAnchor("head", ema_rate=0.3), TailPenalty(model="", ema_rate=0.3)]
    run = [GateSchedule(5, 9), *counting, guard][::turn]
    options = {} if manual else {"accumulate_grad_batches": 2}
    stood = fit(tmp_path, model, *run, moments, **options).callbacks
    assert guard.skipped == 1
    kept = [[0], [2], [6], [8]]
    assert scalars(model) == pytest.approx(moments.scalars(0.3, kept), rel=1e-5)
    if not manual:
        assert counting[1].target.item() == pytest.approx(moments.target(0.3, kept), rel=1e-5)
        assert all(ema[1] == pytest.approx(1 - 0.7**11) for ema in counting[2]._ema)  # 12 steps but for that one
    assert [callback for callback in stood if callback is not guard][:-1] == [c for c in run if c is not guard]


def test_the_guard_still_looks_after_those_who_mend(tmp_path):
    class Mend(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            for parameter in pl_module.parameters():
                parameter.grad.nan_to_num_(0, 0, 0)

    class Bad(Toy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.head.weight.register_hook(lambda grad: grad * float("inf")) if batch_idx == 2 else None
            return loss

    guard = FiniteGuard(skip=True)
    fit(tmp_path, Bad(), Mend(), GateSchedule(4, 8), AlignmentFreeze(), guard)
    assert guard.skipped == 0


def test_lbfgs_counts_a_step_once(tmp_path):
    class Searches(Toy):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    class First(Moments):
        """The moments of each step's first forward pass."""

        def scalars(self, rate, steps):
            self.batches = [{name: passes[:1] for name, passes in batch.items()} for batch in self.batches]
            return super().scalars(rate, steps)

    model, moments, anchor = Searches(), First(), ScaleAnchor("head", ema_rate=0.3)
    fit(tmp_path, model, GateSchedule(4, 8), AlignmentFreeze(ema_rate=0.3), anchor, FiniteGuard(), moments)
    assert max(len(passes) for passes in moments.residuals) > 1
    assert scalars(model) == pytest.approx(moments.scalars(0.3, [[k] for k in range(4)]), rel=1e-5)
    moments.residuals = [passes[:1] for passes in moments.residuals]
    assert anchor.target.item() == pytest.approx(moments.target(0.3, [[k] for k in range(4)]), rel=1e-5)


class OneBadBatch(Toy):
    """One warm-up batch overflows its activations; its loss is patched up."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            return super().training_step(batch * self.number, batch_idx).nan_to_num(0, 0, 0) * 0
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30])
def test_one_bad_warm_up_batch_does_not_poison_the_averages(tmp_path, number):
    moments, anchor = Moments(), ScaleAnchor("head", ema_rate=0.3)

    class Mend(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            for parameter in pl_module.parameters():
                parameter.grad.nan_to_num_(0, 0, 0)

    model = OneBadBatch(number)
    fit(tmp_path, model, Mend(), GateSchedule(6, 9), AlignmentFreeze(ema_rate=0.3), anchor, moments)
    good = [[0], [1], [3], [4], [5]]
    assert scalars(model) == pytest.approx(moments.scalars(0.3, good), rel=1e-5)
    assert anchor.target.item() == pytest.approx(moments.target(0.3, good), rel=1e-5)


def test_an_anchored_module_that_runs_now_and_then(tmp_path):
    class Sometimes(Toy):
        def __init__(self):
            super().__init__()
            self.side = torch.nn.Linear(8, 1)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + self.side(self.embed(batch)).square().mean() if batch_idx % 2 == 0 else loss

    losses = {}

    class Watch(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            losses[trainer.global_step] = loss.item()

    runs = []
    for weight in (0.0, 0.5):
        anchor = ScaleAnchor("side", weight=weight)
        fit(tmp_path, Sometimes(), GateSchedule(4, 8), AlignmentFreeze(), anchor, Watch())
        runs.append((dict(losses), anchor.target))
    (without, target), (with_it, other) = runs
    assert target == other
    assert with_it[4] > without[4]  # the first step with a penalty
    assert with_it[3] == without[3]


def test_every_callback_leaves_a_step_without_any_loss_alone(tmp_path):
    class Nothing(Toy):
        def training_step(self, batch, batch_idx):
            return None

    model = Nothing()
    before = state_of(model)
    fit(tmp_path, model, GateSchedule(3, 8), *everything(tmp_path / "folded")[1:], Stop(1))
    assert same(before, state_of(model))
    assert shared_gate(model).value == 1
