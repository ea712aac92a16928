"""AlignmentFreeze's fits over whole runs."""

import pytest
import torch
from sequences import Sequences, Sums
from toy import Stop, fit, scalars

from taperlit import AlignmentFreeze, GateSchedule
from taperlit.callbacks import RngState
from taperlit.errors import TaperlitError
from taperlit.norm import tapered_norms


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("how", "skip"), [("energy", 0), ("energy", 1), ("token", 0), ("token", 2)])
def test_the_scalars_are_those_of_the_formula(tmp_path, how, skip, accumulate):
    model, sums = Sequences(), Sums(how, slice(skip, None))
    freeze = AlignmentFreeze(ema_rate=0.3, fit=how, skip=skip)
    fit(tmp_path, model, GateSchedule(4, 6), freeze, sums, accumulate_grad_batches=accumulate, steps=7)
    expected = sums.scalars(0.3, [range(accumulate * k, accumulate * (k + 1)) for k in range(4)])
    assert scalars(model) == pytest.approx(expected, rel=1e-5)


def test_a_run_that_goes_on_with_its_fit_is_the_undisturbed_one(tmp_path):
    def callbacks():
        return [GateSchedule(4, 6), AlignmentFreeze(fit="token", skip=1), RngState()]

    whole, part, rest = Sequences(), Sequences(), Sequences(seed=5)
    fit(tmp_path, whole, *callbacks(), steps=8)
    fit(tmp_path, part, *callbacks(), Stop(2), steps=8).save_checkpoint(tmp_path / "last.ckpt")
    fit(tmp_path, rest, *callbacks(), steps=8, ckpt_path=tmp_path / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), rest.state_dict().values(), strict=True))
    assert all(norm.frozen for norm in tapered_norms(rest).values())


def test_a_resumed_run_with_another_fit_is_refused(tmp_path):
    run = fit(tmp_path, Sequences(), GateSchedule(4, 6), AlignmentFreeze(fit="token", skip=1), Stop(2), steps=8)
    run.save_checkpoint(tmp_path / "last.ckpt")
    other = AlignmentFreeze(skip=1)
    with pytest.raises(TaperlitError, match=r"fit='token' and skip=1, not of 'energy' and 1; give AlignmentFreeze"):
        fit(tmp_path, Sequences(), GateSchedule(4, 6), other, steps=8, ckpt_path=tmp_path / "last.ckpt")


def test_a_norm_whose_positions_cannot_be_told_is_named(tmp_path):
    class Flat(Sequences):
        def forward(self, x):
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    with pytest.raises(TaperlitError, match=r"layers\.0\.norm is given .* leave it untapered"):
        fit(tmp_path, Flat(), GateSchedule(4, 6), AlignmentFreeze(skip=1), steps=8)
    fit(tmp_path, Flat(), GateSchedule(4, 6), AlignmentFreeze(fit="token"), steps=8)


@pytest.mark.parametrize("words", [{"fit": "median"}, {"skip": -1}])
def test_a_fit_that_there_is_not_is_refused(words):
    with pytest.raises(TaperlitError, match=r"The alignment's|AlignmentFreeze\.skip is -1"):
        AlignmentFreeze(**words)
