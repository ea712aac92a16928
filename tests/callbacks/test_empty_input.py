"""A module that is given no row now and then, as an expert that gets no token, counts for nothing then."""

import lightning as L
import pytest
import torch
from test_monitor import traces
from toy import Toy, fit, same, state_of

from taperlit import AlignmentFreeze, GateSchedule, ScaleAnchor, TaperMonitor
from taperlit.callbacks import TailPenalty

EMPTY = (2, 7)  # in the warm-up, and after the taper


class Expert(Toy):
    """Its second layer gets no row of some batches."""

    def forward(self, x):
        h = self.layers[0](self.embed(x))
        rows = 0 if self.training and self.global_step in EMPTY else len(h)
        return self.head(torch.cat((self.layers[1](h[:rows]), h[rows:])))


class Losses(L.Callback):
    """What is given to the backward pass."""

    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append(loss.item())


def run(tmp_path, *extra, model=Expert):
    model, losses = model(), Losses()
    fit(tmp_path, model, GateSchedule(4, 6), AlignmentFreeze(), *extra, losses, steps=10)
    return state_of(model), losses.seen


@pytest.mark.parametrize(("name", "compiled"), [("layers.1.norm", False), ("layers.*.norm", False), ("*.1.norm", True)])
def test_the_tail_penalty(tmp_path, name, compiled):
    class Maybe(Expert):
        def __init__(self):
            super().__init__()
            if compiled:
                self.layers[1].compile(backend="eager", dynamic=False)

    torch._dynamo.reset()
    penalty = TailPenalty(modules=[name], multiple=1.0, ema_rate=0.3)
    state, losses = run(tmp_path, penalty, model=Maybe)
    assert all(value.isfinite().all() for value in (*state.values(), torch.tensor(losses)))
    assert penalty.state_dict()["ema"]["layers.1.norm"][1] == pytest.approx(1 - 0.7**8)  # 10 steps but for these two
    _, without = run(tmp_path)
    assert losses[1] > without[1]
    assert losses[0] == without[0]


def test_the_tail_penalty_of_the_others_is_as_if_it_had_not_run(tmp_path):
    class Spared(Expert):
        """The same, and its second layer is not called without rows."""

        def forward(self, x):
            if self.training and self.global_step in EMPTY:
                return self.head(self.layers[0](self.embed(x)))
            return super().forward(x)

        def on_after_backward(self):  # the gradients that empty calls give, so that the weights decay alike
            for parameter in self.layers[1].parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    runs = [run(tmp_path, TailPenalty(multiple=1.0), model=model) for model in (Expert, Spared)]
    assert runs[0][1] == runs[1][1]
    assert same(runs[0][0], runs[1][0])


class Pairs(Expert):
    """Trained on sequences of two positions."""

    def loss(self, x):
        return super().loss(x.view(-1, 2, 4))


@pytest.mark.parametrize(("model", "skip"), [(Expert, 0), (Pairs, 1)])
def test_the_scale_anchor(tmp_path, model, skip):
    anchor = ScaleAnchor("layers.1.norm", weight=1.0, ema_rate=0.3, skip=skip)
    state, losses = run(tmp_path, anchor, model=model)
    assert all(value.isfinite().all() for value in (*state.values(), torch.tensor(losses)))
    assert anchor.state_dict()["ema"][1] == pytest.approx(1 - 0.7**3)  # of 4 steps, one of them empty


def test_the_monitor(tmp_path):
    names = {"residual": "layers.1", "logits": "layers.1.linear"}
    seen = traces(tmp_path, Expert(), GateSchedule(4, 6), AlignmentFreeze(), TaperMonitor(every=1, **names), steps=10)
    assert all(torch.tensor(list(values.values())).isfinite().all() for values in seen.values())
    there = [step for step in range(10) if step not in EMPTY]
    for tag in ("scale_max/layers.1.norm", "scale_p999/layers.1", "pre_logit_rms", "logit_norm"):
        assert list(seen[f"taper/{tag}"]) == there
    for tag in ("scale_max/layers.0.norm", "scale_max", "gate"):
        assert list(seen[f"taper/{tag}"]) == list(range(10))
