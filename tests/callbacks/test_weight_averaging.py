"""Averaged weights through the taper: the gate's phase follows its value, in training, in validation and at the end."""

import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from toy import Stop, Toy, fit, rows, same, state_of

from taperlit import AlignmentFreeze, FoldOnEnd, GateSchedule, Trainer, load_folded
from taperlit.callbacks import RunCheckpoint
from taperlit.callbacks.checkpoint import Stopped
from taperlit.norm import Phase, shared_gate, tapered_norms


def phase_of(value):
    return Phase.NORMALIZE if value == 1 else Phase.LINEAR if value == 0 else Phase.BLEND


def by_formula(model, x):
    """The toy's output in float64, its norms blended by the value of the gate, whatever the phase says."""
    g = shared_gate(model).value.double()
    h = torch.nn.functional.linear(x.double(), model.embed.weight.double(), model.embed.bias.double())
    for layer in model.layers:
        norm = layer.norm
        r = (h.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
        y = g * h / r * norm.weight.double()
        y = y + (1 - g) * norm.alignment.double() * h * norm.taper_weight.double()
        h = h + torch.tanh(torch.nn.functional.linear(y, layer.linear.weight.double(), layer.linear.bias.double()))
    return torch.nn.functional.linear(h, model.head.weight.double(), model.head.bias.double())


class Watched(Toy):
    """Looks at the gate in every training and validation step, and compares its output with the formula's."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = {True: [], False: []}

    def loss(self, x):
        gate = shared_gate(self)
        self.seen[self.training].append((gate.value.item(), gate.phase))
        torch.testing.assert_close(self(x).double(), by_formula(self, x), rtol=1e-5, atol=1e-5)
        return super().loss(x)


def run(tmp_path, *callbacks, **options):
    model = Watched()
    options = {"limit_val_batches": 1.0, "val_check_interval": 1, "steps": 20, **options}
    fit(tmp_path, model, GateSchedule(5, 12), AlignmentFreeze(ema_rate=0.2), *callbacks, **options)
    return model


@pytest.mark.parametrize("kind", [WeightAveraging, EMAWeightAveraging])
@pytest.mark.parametrize("use_buffers", [True, False])
def test_the_phase_follows_the_value(tmp_path, kind, use_buffers):
    options = {"decay": 0.5} if kind is EMAWeightAveraging else {}
    model = run(tmp_path, kind(use_buffers=use_buffers, **options))
    plain = run(tmp_path)
    assert model.seen[True] == plain.seen[True]  # training does not see the averages
    for value, phase in [*model.seen[True], *model.seen[False]]:
        assert phase is phase_of(value)
    averaged, own = ([value for value, _ in seen] for seen in (model.seen[False], plain.seen[False]))
    assert (averaged == own) is not use_buffers
    assert all(a >= b for a, b in zip(averaged, own, strict=True))  # an average trails
    gate = shared_gate(model)
    assert gate.phase is phase_of(gate.value.item())
    assert (gate.phase is Phase.LINEAR) is not use_buffers
    torch.testing.assert_close(model.eval()(rows()).double(), by_formula(model, rows()), rtol=1e-5, atol=1e-5)


class Save(Stop):
    def on_train_batch_end(self, trainer, *_):
        super().on_train_batch_end(trainer)
        if trainer.should_stop:  # not after the run: then its weights are the averages
            trainer.save_checkpoint(f"{trainer.default_root_dir}/mid.ckpt")


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("at", [5, 8, 14])
def test_a_resumed_run_averages_on(tmp_path, use_buffers, at):
    def callbacks():
        return [GateSchedule(5, 12), AlignmentFreeze(ema_rate=0.2), EMAWeightAveraging(None, use_buffers, decay=0.5)]

    options = {"limit_val_batches": 1.0, "val_check_interval": 1, "steps": 20}
    whole, first, second = Watched(), Watched(), Watched()
    fit(tmp_path, whole, *callbacks(), **options)
    fit(tmp_path, first, *callbacks(), Save(at), **options)
    second.train_dataloader = lambda: torch.utils.data.DataLoader(rows()[4 * at :], batch_size=4)
    fit(tmp_path, second, *callbacks(), ckpt_path=tmp_path / "mid.ckpt", **options)
    assert second.seen[True] == whole.seen[True][at:]
    assert same(state_of(second), state_of(whole))


def test_lightnings_stochastic_averaging_leaves_gate_and_scalars_alone(tmp_path):
    model, plain = (
        run(tmp_path, *extra, steps=-1, max_epochs=2, limit_train_batches=10)
        for extra in ([StochasticWeightAveraging(1e-3, swa_epoch_start=1)], [])
    )
    assert [norm.alignment for norm in tapered_norms(model).values()] == [
        norm.alignment for norm in tapered_norms(plain).values()
    ]
    assert shared_gate(model).phase is Phase.LINEAR


@pytest.mark.parametrize("averages", [{}, {"avg_fn": get_ema_avg_fn(0.5)}])
@pytest.mark.parametrize("use_buffers", [True, False])
def test_torchs_averaged_model(averages, use_buffers):
    model = Toy()
    gate = shared_gate(model)
    averaged = AveragedModel(model, use_buffers=use_buffers, **averages)
    for value in (1.0, 0.7, 0.3, 0.0, 0.0):
        gate.set(value)
        averaged.update_parameters(model)
        theirs = shared_gate(averaged.module)
        assert theirs is not gate
        assert theirs.phase is phase_of(theirs.value.item())
        assert (theirs.value == gate.value) or use_buffers
        with torch.no_grad():
            out = averaged.eval()(rows())
        torch.testing.assert_close(out.double(), by_formula(averaged.module, rows()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_the_averages_are_what_is_folded(tmp_path, first):
    pair = [FoldOnEnd(str(tmp_path / "folded")), EMAWeightAveraging(decay=0.8, use_buffers=False)]
    model = run(tmp_path, *(pair if first else reversed(pair)))
    folded = load_folded(tmp_path / "folded", build=lambda: Watched(tapered=False))
    x = rows()
    with torch.no_grad():
        torch.testing.assert_close(folded.double()(x.double()), by_formula(model, x), rtol=1e-5, atol=1e-5)
    plain = run(tmp_path)
    assert not torch.equal(model.head.weight, plain.head.weight)


def test_an_averaged_gate_is_not_folded_and_the_mend_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"Not folded: The gate is 0\.\d+, not 0.* average with use_buffers=False"):
        run(tmp_path, FoldOnEnd(str(tmp_path / "folded")), EMAWeightAveraging(decay=0.8))
    assert not (tmp_path / "folded").exists()


class ByStep(Watched):
    """Its data do not depend on where the loader is."""

    def training_step(self, batch, batch_idx):
        return self.loss(rows()[self.global_step :][:4])


class States(L.Callback):
    """Keeps weights and averages after each step, and what a fit begins with."""

    def __init__(self, averaging):
        self.averaging, self.trained, self.averages = averaging, {}, {}

    def on_train_start(self, trainer, pl_module):
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained[trainer.global_step] = state_of(pl_module)
        self.averages[trainer.global_step] = state_of(self.averaging._average_model.module)


class InValidation(L.Callback):
    """Does something in a validation pass's second batch."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == self.step and batch_idx == 1:
            self.do()


def saved_run(tmp_path, *callbacks, saving=None, **options):
    averaging = EMAWeightAveraging(decay=0.5, use_buffers=False)
    states = States(averaging)
    mine = [GateSchedule(3, 6), AlignmentFreeze(), averaging, states, RunCheckpoint(dirpath=tmp_path, **(saving or {}))]
    options = {"limit_val_batches": 1.0, "val_check_interval": 4, "num_sanity_val_steps": 0, **options}
    model = ByStep()
    try:
        fit(tmp_path, model, *mine, *callbacks, kind=Trainer, enable_checkpointing=True, **options)
    except (Stopped, ZeroDivisionError):
        pass
    else:
        assert same(state_of(model), states.averages[max(states.averages)])
    return states


def last(tmp_path, states):
    """Which steps' weights and averages a checkpoint has, and where a run begins that goes on from it."""
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    step = checkpoint["global_step"]
    assert same(checkpoint["current_model_state"], states.trained[step])
    assert same(checkpoint["state_dict"], states.averages[step])
    return step


@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_stop_in_validation_saves_weights_and_averages_each_by_its_name(tmp_path, step):
    whole = saved_run(tmp_path / "whole")
    assert last(tmp_path / "whole", whole) == 12
    stop = InValidation(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert last(tmp_path, saved_run(tmp_path, stop)) == step
    again = saved_run(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert min(again.trained) == step
    assert all(same(again.trained[i], whole.trained[i]) for i in range(step, 13))
    assert all(same(again.averages[i], whole.averages[i]) for i in range(step, 13))
    assert last(tmp_path, whole) == 12


def test_what_is_saved_on_an_error_in_validation_too(tmp_path):
    fail = InValidation(8, lambda: 1 / 0)
    states = saved_run(tmp_path, fail, saving={"save_on_exception": True})
    assert last(tmp_path, states) == 8
    again = saved_run(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert same(again.trained[8], states.trained[8])
    assert last(tmp_path, again) == 12


@pytest.mark.parametrize(
    ("end", "options"),
    [
        (12, {}),  # validated
        (12, {"val_check_interval": 5}),
        (7, {"extra": Stop(7)}),
        (10, {"steps": -1, "max_epochs": 2, "limit_train_batches": 5}),
    ],
)
def test_the_end_is_saved_with_the_weights_that_averages_are_copied_over(tmp_path, end, options):
    options = dict(options)
    extra = [options.pop("extra")] if "extra" in options else []
    states = saved_run(tmp_path, *extra, **options)
    assert last(tmp_path, states) == end == max(states.trained)
    assert not same(states.trained[end], states.averages[end])
    again = saved_run(tmp_path, ckpt_path=tmp_path / "last.ckpt", steps=end + 2)
    assert same(again.trained[end], states.trained[end])
    assert max(again.trained) == end + 2
