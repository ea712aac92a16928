"""The callbacks on two processes against one process that sees both batches."""

import lightning as L
import pytest
import torch
from processes import on_two
from torch import nn
from toy import Toy, fit, rows, scalars, state_of

from taperlit import AlignmentFreeze, FoldOnEnd, GateSchedule, ScaleAnchor, TaperMonitor, load_folded
from taperlit.callbacks import FiniteGuard

pytestmark = pytest.mark.slow


def callbacks(folder):
    return [
        GateSchedule(4, 8),
        AlignmentFreeze(ema_rate=0.3),
        ScaleAnchor("head", ema_rate=0.3),
        FoldOnEnd(str(folder / "folded")),
        TaperMonitor(every=1, residual="head", logits="head"),
        FiniteGuard(),
    ]


class Dealt(Toy):
    """Every process has its share of each batch of 8."""

    def train_dataloader(self):
        share = rows()[self.global_rank :: self.trainer.world_size]
        return torch.utils.data.DataLoader(share, batch_size=8 // self.trainer.world_size)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_are_one(tmp_path, accumulate):
    one, two = Dealt(), Dealt()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    fit(tmp_path / "one", one, *callbacks(tmp_path / "one"), accumulate_grad_batches=accumulate)
    fit(tmp_path / "two", two, *callbacks(tmp_path / "two"), accumulate_grad_batches=accumulate, **on_two())
    assert scalars(two) == pytest.approx(scalars(one), rel=1e-5)
    for name, value in state_of(one).items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    folded = load_folded(tmp_path / "two/folded", build=lambda: Dealt(tapered=False))
    with torch.no_grad():
        torch.testing.assert_close(folded(rows()), two.eval()(rows()), rtol=1e-5, atol=1e-6)


class BadOnOne(Dealt):
    """Only the second process meets the bad batch."""

    def training_step(self, batch, batch_idx):
        bad = self.global_rank == 1 and batch_idx == 5
        return super().training_step(batch * (float("nan") if bad else 1.0), batch_idx)


def test_what_one_process_meets_stops_both_with_one_line(tmp_path):
    with pytest.raises(Exception, match=r"TaperlitError: step 6 .*the loss is not finite; it began in embed\."):
        fit(tmp_path, BadOnOne(), GateSchedule(4, 8), AlignmentFreeze(), ScaleAnchor("head"), FiniteGuard(), **on_two())


class Kept(L.Callback):
    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            (anchor,) = (callback for callback in trainer.callbacks if isinstance(callback, ScaleAnchor))
            (guard,) = (callback for callback in trainer.callbacks if isinstance(callback, FiniteGuard))
            torch.save([anchor.target, guard.skipped], f"{trainer.default_root_dir}/kept.pt")


class Sometimes(Dealt):
    """Its side head runs on the first process only."""

    def __init__(self):
        super().__init__()
        self.side = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_rank == 0 or batch_idx == 0:
            loss = loss + self.side(self.embed(batch)).square().mean()
        return loss


def test_an_anchored_module_that_runs_on_one_process(tmp_path):
    model = Sometimes()
    run = [GateSchedule(4, 8), AlignmentFreeze(), ScaleAnchor("side", weight=0.1), FiniteGuard(), Kept()]
    fit(tmp_path, model, *run, **on_two(find_unused_parameters=True))
    target, skipped = torch.load(tmp_path / "kept.pt")
    assert target.isfinite()
    assert skipped == 0


def test_a_step_that_one_process_spoils_is_left_out_on_both(tmp_path):
    model = BadOnOne()
    run = [GateSchedule(4, 8), AlignmentFreeze(), ScaleAnchor("head"), FiniteGuard(skip=True), Kept()]
    fit(tmp_path, model, *run, **on_two())
    assert torch.load(tmp_path / "kept.pt")[1] == 1
    assert all(value.isfinite().all() for value in state_of(model).values())
