"""A gain that two modules share: it is idle where all that have it leave it idle."""

import lightning as L
import pytest
import torch
from toy import Toy, fit

from taperlit import AlignmentFreeze, GateSchedule, taper
from taperlit.norm import tapered_norms


class Tied(Toy):
    """Both norms have one gain; ``names`` are tapered."""

    def __init__(self, names):
        super().__init__(tapered=False)
        self.layers[1].norm.weight = self.layers[0].norm.weight
        taper(self, names)


class Twice(Toy):
    """Its first layer stands in both places."""

    def __init__(self):
        super().__init__(tapered=False)
        self.layers[1] = self.layers[0]
        taper(self)


class Moved(L.Callback):
    """After which steps the first norm's gains have changed: its own and the linear branch's."""

    def __init__(self):
        self.own, self.linear = [], []
        self._gains = None

    def on_train_batch_end(self, trainer, pl_module, *_):
        norm = tapered_norms(pl_module)["layers.0.norm"]
        gains = [norm.weight.detach().clone(), norm.taper_weight.detach().clone()]
        if self._gains is not None:
            for moved, was, now in zip((self.own, self.linear), self._gains, gains, strict=True):
                moved += [] if torch.equal(was, now) else [trainer.global_step]
        self._gains = gains


@pytest.mark.parametrize(
    ("model", "stages", "last"),
    [
        (lambda: Tied(["layers.0.*"]), None, 12),  # the other norm keeps it in use
        (lambda: Tied(["layers.*"]), None, 8),
        (lambda: Tied(["layers.*"]), {"layers.0.*": (1.0, 0.5), "layers.1.*": (0.5, 0.0)}, 8),
        (Twice, None, 8),
    ],
)
def test_a_gain_trains_as_long_as_anybody_uses_it(tmp_path, model, stages, last):
    moved = Moved()
    fit(tmp_path, model(), GateSchedule(3, 9, shape="linear", stages=stages), AlignmentFreeze(), moved)
    assert moved.own == list(range(2, last + 1))
    assert moved.linear == list(range(4, 13))
