"""The guard's one line, whatever the second run of a batch does, and what it holds meanwhile."""

import re
import weakref

import lightning as L
import pytest
import torch
from torch import nn
from toy import Toy, fit

from taperlit import AlignmentFreeze, GateSchedule, ScaleAnchor
from taperlit.callbacks import FiniteGuard
from taperlit.errors import TaperlitError


class Spoilt(Toy):
    """One batch spoils what the second layer's linear map puts out."""

    def __init__(self, at, **options):
        super().__init__(**options)
        self.at, self.spoilt = at, False
        self.layers[1].linear.register_forward_hook(lambda module, args, y: y * float("nan") if self.spoilt else y)

    def training_step(self, batch, batch_idx):
        self.spoilt = batch_idx == self.at
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("at", [1, 5, 10])
@pytest.mark.parametrize("anchor_first", [True, False])
def test_with_the_anchor(tmp_path, at, anchor_first):
    pair = [ScaleAnchor("head"), FiniteGuard()]
    callbacks = [GateSchedule(3, 8), AlignmentFreeze(), *(pair if anchor_first else reversed(pair))]
    with pytest.raises(TaperlitError, match=rf"^step {at + 1} .*; it began in layers\.1\.linear\. No check") as error:
        fit(tmp_path, Spoilt(at), *callbacks)
    assert "\n" not in str(error.value)


def test_the_advice_is_true_of_any_model(tmp_path):
    with pytest.raises(TaperlitError) as error:
        fit(tmp_path, Spoilt(1), FiniteGuard())
    assert str(error.value).endswith(
        "No checkpoint was saved yet: begin again with a lower learning rate, or leave such steps out: "
        "FiniteGuard(skip=True), --taper.guard.skip=true."
    )
    fit(tmp_path, Spoilt(1), FiniteGuard(skip=True))


class NeedsGradients(Spoilt):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        (grad,) = torch.autograd.grad(loss, self.head.weight, create_graph=True)
        return loss + grad.square().sum()


class RunsOnce(Spoilt):
    seen = -1

    def training_step(self, batch, batch_idx):
        if batch_idx == self.seen:
            raise ValueError("this batch\nwas used up")
        self.seen = batch_idx
        return super().training_step(batch, batch_idx)


class Passes(Spoilt):
    """Is sound when it runs again."""

    def training_step(self, batch, batch_idx):
        if self.spoilt:
            self.at = -1
        return super().training_step(batch, batch_idx)


class OwnLoss(Toy):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 5 else 1)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (NeedsGradients, r"it began in layers\.1\.linear\."),  # seen before the second run breaks off
        (RunsOnce, r"its batch could not be run once more \(ValueError: this batch was used up\)\."),
        (Passes, r"its layer is not known, for running its batch once more gave a finite loss\."),
        (lambda at: OwnLoss(), r"it began in the loss itself\."),
    ],
)
def test_its_line_survives_the_second_run(tmp_path, model, words):
    with pytest.raises(TaperlitError, match=rf"^step 6 \(in the taper, gate 0\.\d+\): the loss .* {words}") as error:
        fit(tmp_path, model(5), GateSchedule(3, 8), AlignmentFreeze(), ScaleAnchor("head"), FiniteGuard())
    assert "\n" not in str(error.value)


class Grows(Toy):
    """One token of one batch is 1000 times as large; the loss, or only its gradient, is not finite."""

    def __init__(self, what):
        super().__init__()
        self.what, self.bad = what, False
        infinite = float("inf")
        self.head.weight.register_hook(lambda g: g * infinite if self.bad and what == "gradient" else g)

    def training_step(self, batch, batch_idx):
        self.bad = batch_idx == 5
        if self.bad:
            with torch.no_grad():
                batch = batch * torch.tensor([1.0, 1.0, 1000.0, 1.0])[:, None]
        self.seen = batch
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.bad and self.what == "loss" else loss


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_largest_token_is_named(tmp_path, what):
    model = Grows(what)
    with pytest.raises(TaperlitError, match=rf"the {what} is not finite.*") as error:
        fit(tmp_path, model, GateSchedule(3, 8), AlignmentFreeze(), FiniteGuard())
    told = re.search(r"; at (\S+) the largest token, \[2\], is (\S+) times the median \((\S+)\)\. ", str(error.value))
    norms, scales = ["layers.0.norm", "layers.1.norm"], {}
    for name in norms:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: scales.update({name: args[0].double().square().mean(-1).sqrt()})
        )
    with torch.no_grad():
        model(model.seen)
    name = max(norms, key=lambda name: scales[name].max() / scales[name].median())
    assert told[1] == name
    assert float(told[2]) == pytest.approx((scales[name].max() / scales[name].median()).item(), rel=1e-2)
    assert float(told[3]) == pytest.approx(scales[name].median().item(), rel=1e-2)


class Tuples(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        return {"out": (y * float("nan") if self.training and x.abs().max() > 1e4 else y, None)}


def test_outputs_of_any_structure_are_looked_at(tmp_path):
    class Model(Toy):
        def __init__(self):
            super().__init__()
            self.embed = Tuples(self.embed)

        def forward(self, x):
            return self.head(self.layers(self.embed(x)["out"][0]))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch * (1e6 if batch_idx == 4 else 1), batch_idx)

    with pytest.raises(TaperlitError, match=r"it began in embed\. "):
        fit(tmp_path, Model(), FiniteGuard())


class Counted(Spoilt):
    """Counts the batches that are alive."""

    def __init__(self, at):
        super().__init__(at)
        self.batches, self.most = [], 0

    def on_train_batch_start(self, batch, batch_idx):
        self.batches = [each for each in self.batches if each() is not None] + [weakref.ref(batch)]
        self.most = max(self.most, len(self.batches))


def kept(tmp_path, *callbacks, at=-1):
    model = Counted(at)
    fit(tmp_path, model, *callbacks, accumulate_grad_batches=16, steps=2)
    return model.most


def test_it_holds_no_more_than_the_batch_under_way(tmp_path):
    assert kept(tmp_path, FiniteGuard()) == kept(tmp_path)
    assert kept(tmp_path, FiniteGuard(skip=True), at=3) == kept(tmp_path) + 1  # and the bad one, until its step ends


@pytest.mark.parametrize("at", [0, 3, 15, 18, 31])
def test_the_bad_micro_batch_is_the_one_that_runs_again(tmp_path, at):
    with pytest.raises(TaperlitError, match=rf"step {1 + at // 16}.*it began in layers\.1\.linear\."):
        fit(tmp_path, Spoilt(at), FiniteGuard(), accumulate_grad_batches=16, steps=2)


def test_a_guarded_run_is_the_same_run(tmp_path):
    models = Toy(), Toy()
    for model, guard in zip(models, ([FiniteGuard()], []), strict=True):
        fit(tmp_path, model, GateSchedule(3, 8), AlignmentFreeze(), *guard, accumulate_grad_batches=3)
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models), strict=True))


@pytest.mark.parametrize("large", [1e20, 1e38])
def test_large_but_finite_gradients_are_no_fault(tmp_path, large):
    class Fill(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            pl_module.head.weight.grad.fill_(large)

    class Forget(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            assert pl_module.head.weight.grad is not None
            pl_module.head.weight.grad = None

    guard = FiniteGuard(skip=True)
    fit(tmp_path, Toy(), Fill(), guard, Forget(), steps=2)
    assert guard.skipped == 0
