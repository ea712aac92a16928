"""A fit begins fresh: whatever a tuner, an earlier fit or another model left in callbacks and norms does not count."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import nn
from toy import Moments, Stop, Toy, fit, same, scalars, state_of

from taperlit import AlignmentFreeze, GateSchedule, ScaleAnchor, TaperMonitor
from taperlit.callbacks import FiniteGuard, RngState, TokenThroughput
from taperlit.norm import shared_gate


def callbacks():
    return [GateSchedule(0.25, 0.75), AlignmentFreeze(), ScaleAnchor("head"), FiniteGuard(), TaperMonitor(every=2)]


def finder(kind):
    if kind == "learning rate":
        return LearningRateFinder(num_training_steps=9, update_attr=False)
    return BatchSizeFinder(steps_per_trial=3, init_val=2, max_trials=2)  # it ends at 4


@pytest.mark.filterwarnings("ignore:.*LearningRateFinder", "ignore:Failed to compute suggestion")
@pytest.mark.parametrize("kind", ["learning rate", "batch size"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_tuner_before_the_run_changes_nothing(tmp_path, kind, place):
    plain, tuned = Toy(), Toy()
    mine, theirs = callbacks(), callbacks()
    fit(tmp_path, plain, *mine)
    fit(tmp_path, tuned, *([finder(kind), *theirs] if place == "first" else [*theirs, finder(kind)]))
    assert tuned.batch_size == plain.batch_size
    assert len(tuned.gates) > len(plain.gates)  # it did train
    assert tuned.gates[-12:] == plain.gates
    assert scalars(tuned) == scalars(plain)
    assert all(c not in (0.0, 1.0) for c in scalars(plain).values())
    assert theirs[2].target == mine[2].target
    assert same(state_of(tuned), state_of(plain))


@pytest.mark.parametrize("after", [12, 2])  # past the boundary, and not yet there
def test_callbacks_that_served_another_model_begin_anew(tmp_path, after):
    used, fresh = callbacks(), callbacks()
    fit(tmp_path, Toy(seed=5), *used, Stop(after))
    models = [Toy(nn.LayerNorm), Toy(nn.LayerNorm)]
    for model, run in zip(models, (used, fresh), strict=True):
        fit(tmp_path, model, *run, steps=16)
    assert models[0].gates == models[1].gates
    assert used[2].target == fresh[2].target
    assert same(*map(state_of, models))


def test_a_second_run_of_the_same_weights_measures_anew(tmp_path):
    used = AlignmentFreeze(at=3, ema_rate=0.5)
    model = Toy()
    fit(tmp_path, model, used, steps=6)
    first = scalars(model)
    twin = Toy()
    twin.load_state_dict(model.state_dict())
    fit(tmp_path, model, used, steps=6)
    assert scalars(model) != first
    assert used.frozen
    moments = Moments()
    fit(tmp_path, twin, AlignmentFreeze(at=3, ema_rate=0.5), moments, steps=6)
    assert scalars(model) == scalars(twin)
    assert scalars(twin) == pytest.approx(moments.scalars(0.5, [[0], [1], [2]]), rel=1e-5)


@pytest.mark.parametrize("weight", ["energy", "token"])
def test_a_run_that_stopped_in_its_warm_up_leaves_no_averages(tmp_path, weight):
    class Scaled(Toy):
        scale = 30.0

        def loss(self, x):
            return super().loss(x * self.scale)

    model, moments = Scaled(), Moments()
    fit(tmp_path, model, GateSchedule(6, 9), AlignmentFreeze(ema_rate=0.3, fit=weight), Stop(4))
    model.scale = 1.0
    fit(tmp_path, model, GateSchedule(6, 9), AlignmentFreeze(ema_rate=0.3), moments)
    assert scalars(model) == pytest.approx(moments.scalars(0.3, [[k] for k in range(6)]), rel=1e-5)


def test_the_anchor_takes_each_models_own_kind(tmp_path):
    anchor = ScaleAnchor("layers.1.norm", at=3)
    targets = []
    for norm in (nn.LayerNorm, nn.RMSNorm):
        for run in (anchor, ScaleAnchor("layers.1.norm", at=3)):
            fit(tmp_path, Toy(norm), run)
            targets.append(run.target)
    assert targets[0] == targets[1]
    assert targets[2] == targets[3]
    assert targets[0] != targets[2]
    assert anchor.kind is None


class Blocks(Toy):
    """Trained on (B, T + 1) blocks of numbers, which count as tokens."""

    def training_step(self, batch, batch_idx):
        bad = batch_idx == 1
        return super().training_step(batch, batch_idx) * (float("nan") if bad else 1.0)


def test_counts_begin_at_0(tmp_path):
    guard, throughput = FiniteGuard(skip=True), TokenThroughput()
    for _ in range(2):
        fit(tmp_path, Blocks(), guard, throughput, steps=5)
        assert guard.skipped == 1
        assert throughput.tokens == 5 * 4 * 3


def test_a_resumed_run_counts_on(tmp_path):
    guard, throughput = FiniteGuard(skip=True), TokenThroughput()
    fit(tmp_path, Blocks(), guard, throughput, steps=5).save_checkpoint(tmp_path / "mid.ckpt")
    fit(tmp_path, Blocks(), guard, throughput, steps=8, ckpt_path=tmp_path / "mid.ckpt")
    assert guard.skipped == 1
    assert throughput.tokens == 8 * 4 * 3


def test_generators_of_a_checkpoint_that_began_no_step_are_forgotten(tmp_path):
    class Noisy(Toy):
        draws = ()

        def training_step(self, batch, batch_idx):
            self.draws = (*self.draws, torch.rand(()).item())
            return super().training_step(batch, batch_idx)

    rng = RngState()
    fit(tmp_path, Noisy(), rng, steps=5).save_checkpoint(tmp_path / "end.ckpt")
    fit(tmp_path, Noisy(), rng, steps=5, ckpt_path=tmp_path / "end.ckpt")  # its end: no step is left
    again = Noisy()
    torch.manual_seed(7)
    fit(tmp_path, again, rng, steps=1)
    torch.manual_seed(7)
    other = Noisy()
    torch.manual_seed(7)
    fit(tmp_path, other, RngState(), steps=1)
    assert again.draws == other.draws


def test_hooks_of_a_fit_that_failed_are_gone(tmp_path):
    class Fails(Toy):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise KeyError("an accident")

    model = Fails()
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    with pytest.raises(KeyError):
        fit(tmp_path, model, *callbacks(), TaperMonitor(1, "head", "head"), logger=logger)
    assert not model.head._forward_pre_hooks
    assert not model.head._forward_hooks
    assert "training_step" not in vars(model)
    assert shared_gate(model).plan.warmup is None
