"""Averaged weights through the taper: the gate's phase follows its value, in training, in validation and at the end."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from toy import Stop, Toy, fit, rows, same, state_of

from taperlit import AlignmentFreeze, FoldOnEnd, GateSchedule, load_folded
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
