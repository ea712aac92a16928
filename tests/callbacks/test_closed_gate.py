"""Weights whose gate is below 1 already: refused or kept, never opened again."""

import itertools

import pytest
from toy import Stop, Toy, fit, scalars, state_of, trainer

from taperlit import AlignmentFreeze, GateSchedule, ScaleAnchor
from taperlit.errors import TaperlitError
from taperlit.norm import Phase, shared_gate


def tapered(tmp_path, steps=12):
    model = Toy()
    fit(tmp_path, model, GateSchedule(3, 9), AlignmentFreeze(), Stop(steps))
    model.gates.clear()
    return model


@pytest.mark.parametrize(("steps", "gate"), [(12, "0"), (6, "0.5")])
def test_a_new_run_is_refused_before_its_first_step(tmp_path, steps, gate):
    model = tapered(tmp_path, steps)
    before = state_of(model)
    with pytest.raises(TaperlitError, match=rf"The gate is {gate} already .* to 1 again: resume") as error:
        fit(tmp_path, model, GateSchedule(3, 9), AlignmentFreeze())
    assert "\n" not in str(error.value)
    assert model.gates == []
    assert all((value == before[name]).all() for name, value in model.state_dict().items())


@pytest.mark.parametrize("alignment", [[], [AlignmentFreeze()]])
def test_a_closed_gate_is_kept_on_request(tmp_path, alignment):
    model = tapered(tmp_path)
    c = scalars(model)
    fit(tmp_path, model, GateSchedule(3, 9, closed="keep"), *alignment, ScaleAnchor("head"))
    assert set(model.gates) == {0.0}
    assert scalars(model) == c


def test_a_half_closed_gate_is_kept_until_the_schedule_is_below_it(tmp_path):
    model = tapered(tmp_path, steps=6)
    c = scalars(model)
    fit(tmp_path, model, GateSchedule(3, 9, closed="keep"), AlignmentFreeze())
    assert model.gates[:6] == pytest.approx([0.5] * 6)
    assert all(a >= b for a, b in itertools.pairwise(model.gates))
    assert model.gates[-4:] == [0.0] * 4
    assert scalars(model) == c


def test_keeping_is_no_different_where_the_gate_is_open(tmp_path):
    models = Toy(), Toy()
    for model, closed in zip(models, ("keep", "refuse"), strict=True):
        fit(tmp_path, model, GateSchedule(3, 9, closed=closed), AlignmentFreeze())
    assert models[0].gates == models[1].gates


def test_what_the_refusal_advises_works(tmp_path):
    model = Toy()
    fit(tmp_path, model, GateSchedule(0.25, 0.75), AlignmentFreeze()).save_checkpoint(tmp_path / "end.ckpt")
    other = Toy()
    fit(tmp_path, other, GateSchedule(0.25, 0.75), AlignmentFreeze(), steps=40, ckpt_path=tmp_path / "end.ckpt")
    assert set(other.gates) == {0.0}


def test_a_kept_run_resumes_as_it_was(tmp_path):
    model = tapered(tmp_path)
    callbacks = [GateSchedule(3, 9, closed="keep"), AlignmentFreeze()]
    fit(tmp_path, model, *callbacks, Stop(2)).save_checkpoint(tmp_path / "mid.ckpt")
    other = Toy()
    fit(tmp_path, other, *callbacks, ckpt_path=tmp_path / "mid.ckpt")
    assert set(other.gates) == {0.0}
    with pytest.raises(TaperlitError, match="to 1 again"):
        fit(tmp_path, Toy(), GateSchedule(3, 9), AlignmentFreeze(), ckpt_path=tmp_path / "mid.ckpt")


def test_the_same_trainer_going_on_never_opens_the_gate(tmp_path):
    model = Toy()
    run = trainer(tmp_path, GateSchedule(0.25, 0.75), AlignmentFreeze(), steps=12)
    run.fit(model)
    run.fit_loop.epoch_loop.max_steps = 40
    with pytest.raises(TaperlitError, match="The gate is 0 already"):
        run.fit(model)
    assert shared_gate(model).phase is Phase.LINEAR


def test_a_run_that_is_over_stays_over(tmp_path):
    model = Toy()
    callbacks = [GateSchedule(3, 9), AlignmentFreeze(), ScaleAnchor("head")]
    fit(tmp_path, model, *callbacks).save_checkpoint(tmp_path / "end.ckpt")
    before = state_of(model)
    other = Toy()
    fit(tmp_path, other, *callbacks, ckpt_path=tmp_path / "end.ckpt")
    assert other.gates == []
    assert all((value == before[name]).all() for name, value in other.state_dict().items())


def test_a_gate_that_was_set_by_hand_and_never_aligned_is_refused(tmp_path):
    model = Toy()
    shared_gate(model).set(0.0)
    with pytest.raises(TaperlitError, match=r"layers\.0\.norm was never frozen and the gate is 0"):
        fit(tmp_path, model, AlignmentFreeze(at=3))
    shared_gate(model).set(1.0)  # as it says
    fit(tmp_path, model, AlignmentFreeze(at=3))
    assert set(scalars(model).values()).isdisjoint({1.0})


def test_a_word_that_is_none_is_refused():
    with pytest.raises(TaperlitError, match="closed is 'open'; choose refuse or keep"):
        GateSchedule(closed="open")
