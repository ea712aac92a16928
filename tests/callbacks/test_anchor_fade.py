"""ScaleAnchor whose weight falls to 0, by formula and over a resume."""

import math

import lightning as L
import pytest
import torch
from toy import Stop, Toy, fit, rows, same, state_of

from taperlit import ScaleAnchor
from taperlit.errors import TaperlitError


class Added(L.Callback):
    """What the anchor added to each batch's loss, over the raw scale loss of the same outputs."""

    def __init__(self):
        self.shares = []

    def on_fit_start(self, trainer, pl_module):
        self.anchor = next(callback for callback in trainer.callbacks if isinstance(callback, ScaleAnchor))
        pl_module.head.register_forward_pre_hook(self.look)
        plain = pl_module.loss
        pl_module.loss = lambda batch: self.note(plain(batch))

    def look(self, module, args):
        eps = torch.finfo(torch.float32).eps
        self.scales = (args[0].detach().double().square().mean(-1) + eps).sqrt()

    def note(self, loss):
        self.plain = loss.detach().double()
        return loss

    def on_before_backward(self, trainer, pl_module, loss):
        if self.anchor.target is not None:
            raw = (self.scales - self.anchor.target.double()).square().mean()
            self.shares.append(((loss.detach().double() - self.plain) / raw).item())


def anchor(fade, weight=2.0):
    return ScaleAnchor("head", weight=weight, at=2, fade=fade)


@pytest.mark.parametrize("fade", [None, 0, 5, 0.5, 12])
def test_the_weight_falls_along_a_cosine(tmp_path, fade):
    added = Added()
    fit(tmp_path, Toy(tapered=False), anchor(fade), added, steps=12)
    start = {None: 12, 0.5: 6}.get(fade, fade)
    expected = [
        2.0 * (1.0 if step <= start else (1 + math.cos(math.pi * (step - start) / (12 - start))) / 2)
        for step in range(2, 12)
    ]
    assert added.shares == pytest.approx(expected, rel=1e-3)
    assert fade is None or fade == 12 or expected[-1] < 0.2 * expected[0]


class ByNumber(Toy):
    """Its batches are known by their number, so that a resumed run sees what the unbroken one does."""

    def training_step(self, batch, batch_idx):
        return super().training_step(rows()[4 * batch_idx : 4 * batch_idx + 4], batch_idx)


def test_a_resumed_run_fades_as_the_unbroken_one(tmp_path):
    whole, first, again = (ByNumber(tapered=False) for _ in range(3))
    fit(tmp_path, whole, anchor(4), steps=12)
    fit(tmp_path, first, anchor(4), Stop(7), steps=12).save_checkpoint(tmp_path / "part.ckpt")
    fit(tmp_path, again, anchor(4), steps=12, ckpt_path=tmp_path / "part.ckpt")
    assert same(state_of(whole), state_of(again))


def test_a_second_fit_begins_with_the_whole_weight(tmp_path):
    mine, added = anchor(3), Added()
    fit(tmp_path, Toy(tapered=False), mine, steps=12)
    fit(tmp_path, Toy(tapered=False), mine, added, steps=12)
    assert added.shares[0] == pytest.approx(2.0, rel=1e-3)


def test_a_fade_that_never_ends_is_refused(tmp_path):
    with pytest.raises(TaperlitError, match=r"ScaleAnchor\.fade ends with the run: set trainer\.max_steps"):
        fit(tmp_path, Toy(tapered=False), anchor(3), steps=-1, max_epochs=1)
    with pytest.raises(TaperlitError, match=r"ScaleAnchor\.fade is 13 steps, longer than the run's 12"):
        fit(tmp_path, Toy(tapered=False), anchor(13), steps=12)
