"""FirstPosition: the second scalar over whole runs."""

import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from sequences import Sequences, Sums, blocks
from toy import Stop, fit, same, scalars, state_of

from taperlit import AlignmentFreeze, FirstPosition, FoldOnEnd, GateSchedule, fold, taper
from taperlit.callbacks import RngState
from taperlit.errors import TaperlitError
from taperlit.norm import Phase, shared_gate, tapered_norms
from taperlit.schedule import gate_at
from taperlit.surgery import separate_first


class Shares(L.Callback):
    """The gate and the share in every batch, as the forward pass sees them."""

    def __init__(self):
        self.seen = []

    def on_fit_start(self, trainer, pl_module):
        def look(norm, args):
            if norm.training and torch.is_grad_enabled():
                self.seen.append((norm.gate.value.item(), norm.gate.first.item(), norm.gate.phase))

        next(iter(tapered_norms(pl_module).values())).register_forward_pre_hook(look)


def callbacks(end=10):
    return [GateSchedule(4, 7), AlignmentFreeze(ema_rate=0.3), FirstPosition(end)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_share_falls_once_the_gate_has_closed(tmp_path, order, accumulate):
    shares, mine = Shares(), callbacks()
    fit(tmp_path, Sequences(), *(mine[i] for i in order), shares, accumulate_grad_batches=accumulate)
    steps = [k for k in range(1, 13) for _ in range(accumulate)]
    assert [s for _, s, _ in shares.seen] == pytest.approx([gate_at(k, 7, 10) for k in steps])
    assert [g for g, _, _ in shares.seen] == pytest.approx([gate_at(k, 4, 7) for k in steps])
    assert {phase for _, _, phase in shares.seen} == set(Phase)
    assert shares.seen[-1][2] is Phase.LINEAR


def test_both_scalars_are_those_of_the_formula(tmp_path):
    model, first, others = Sequences(torch.nn.LayerNorm), Sums("energy", slice(0, 1)), Sums("energy", slice(1, None))
    fit(tmp_path, model, *callbacks(), first, others)
    steps = [[k] for k in range(4)]
    assert scalars(model) == pytest.approx(others.scalars(0.3, steps), rel=1e-5)
    mine = {name: norm.first_alignment.item() for name, norm in tapered_norms(model).items()}
    assert mine == pytest.approx(first.scalars(0.3, steps), rel=1e-5)
    assert all(one.isfinite().all() for one in state_of(model).values())


@pytest.mark.parametrize("stop", [2, 4, 5, 7, 8, 11])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, stop):
    whole, part, rest = Sequences(), Sequences(), Sequences(seed=3)
    fit(tmp_path, whole, *callbacks(), RngState())
    fit(tmp_path, part, *callbacks(), RngState(), Stop(stop)).save_checkpoint(tmp_path / "last.ckpt")
    # The end is the first run's, whatever is said now.
    fit(tmp_path, rest, *callbacks(end=11), RngState(), ckpt_path=tmp_path / "last.ckpt")
    assert same(state_of(whole), state_of(rest))
    assert shared_gate(rest).phase is Phase.LINEAR


def test_it_folds_at_the_end_and_not_before(tmp_path):
    model, x = Sequences(), blocks()[:4]
    fit(tmp_path, model, *callbacks(), FoldOnEnd(str(tmp_path / "folded")))
    assert (tmp_path / "folded/model.safetensors").exists()
    model.eval()
    expected = model(x)
    shared_gate(model).set_first(0.5)
    with pytest.raises(TaperlitError, match=r"Position 0 still has a share of 0\.5"):
        fold(model, lambda: model(x))
    shared_gate(model).set_first(0.0)
    fold(model, lambda: model(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_run_without_it_keeps_its_state_dict(tmp_path):
    model = Sequences()
    before = model.state_dict().keys()
    fit(tmp_path, model, *callbacks()[:2])
    assert model.state_dict().keys() == before
    assert not [name for name in before if "first" in name]


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_fast_dev_run_leaves_no_share(tmp_path, steps):
    model = Sequences()
    fit(tmp_path, model, *callbacks(), fast_dev_run=steps)
    assert shared_gate(model).phase is (Phase.NORMALIZE if steps == 1 else Phase.LINEAR)


def test_a_run_that_began_without_it_is_refused(tmp_path):
    for stop, reason in ((2, "gathered without a first position apart"), (5, "separate the first position while")):
        fit(tmp_path, Sequences(), *callbacks()[:2], Stop(stop)).save_checkpoint(tmp_path / "last.ckpt")
        with pytest.raises(TaperlitError, match=reason):
            fit(tmp_path, Sequences(), *callbacks(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("turn", [1, -1])
def test_a_new_run_after_one_without_it_is_not(tmp_path, turn):
    model, others = Sequences(), Sums("energy", slice(1, None))
    fit(tmp_path, model, *callbacks()[:2], Stop(2))
    fit(tmp_path, model, *callbacks()[::turn], others)
    assert scalars(model) == pytest.approx(others.scalars(0.3, [[k] for k in range(4)]), rel=1e-5)


def test_a_run_that_began_with_it_needs_it_until_the_share_is_gone(tmp_path):
    for stop in (5, 11):
        fit(tmp_path, Sequences(), *callbacks(), Stop(stop)).save_checkpoint(tmp_path / f"{stop}.ckpt")
    with pytest.raises(TaperlitError, match=r"add FirstPosition\(\)"):
        fit(tmp_path, Sequences(), *callbacks()[:2], ckpt_path=tmp_path / "5.ckpt")
    fit(tmp_path, Sequences(), *callbacks()[:2], ckpt_path=tmp_path / "11.ckpt")


def test_a_gate_that_is_open_at_the_end_is_refused(tmp_path):
    with pytest.raises(
        TaperlitError, match=r"after step 6, where FirstPosition ends|ends at step 6, not after the gate"
    ):
        fit(tmp_path, Sequences(), *callbacks(end=6))
    with pytest.raises(TaperlitError, match=r"FirstPosition\.end is 13 steps"):
        fit(tmp_path, Sequences(), *callbacks(end=13))
    with pytest.raises(TaperlitError, match=r"FirstPosition\.shape is 'step'"):
        FirstPosition(shape="step")


def test_weights_that_are_averaged_need_it_before(tmp_path):
    average = EMAWeightAveraging(decay=0.5, use_buffers=False)
    with pytest.raises(TaperlitError, match=r"right after taperlit\.taper\(model\)"):
        fit(tmp_path, Sequences(), *callbacks(), average)
    model = Sequences(tapered=False)
    taper(model)
    separate_first(model)
    fit(tmp_path, model, *callbacks(), EMAWeightAveraging(decay=0.5, use_buffers=False))
    assert shared_gate(model).phase is Phase.LINEAR
    assert all(norm.first_alignment != norm.alignment for norm in tapered_norms(model).values())
