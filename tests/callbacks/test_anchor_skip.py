"""ScaleAnchor without the first positions, by formula."""

import pytest
import torch
from sequences import Sequences
from toy import Toy, fit

from taperlit import ScaleAnchor
from taperlit.errors import TaperlitError


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_target_and_loss_are_of_the_positions_that_are_left(tmp_path, skip):
    model, scales, penalties = Sequences(tapered=False), [], []

    def note(module, args):
        if module.training and torch.is_grad_enabled():
            scales.append(args[0].detach().double().square().mean(-1).sqrt()[:, skip:])

    model.head.register_forward_pre_hook(note)
    anchor = ScaleAnchor("head", weight=0.5, ema_rate=0.3, at=2, skip=skip)
    trained = fit(tmp_path, model, anchor, Keep(penalties), steps=3)
    ema = torch.zeros(2, dtype=torch.float64)
    for s in scales[:2]:
        ema = ema.lerp(torch.stack((s.mean(), torch.ones(()).double())), 0.3)
    target = ema[0] / ema[1]
    torch.testing.assert_close(anchor.target.double(), target, rtol=1e-5, atol=0)
    expected = 0.5 * (scales[2] - target).square().mean()
    torch.testing.assert_close(penalties[2].double(), expected, rtol=1e-4, atol=0)
    assert trained.global_step == 3


class Keep(ScaleAnchor.__mro__[1]):  # Lightning's Callback
    """The part of each batch's loss that the anchor added."""

    def __init__(self, penalties):
        self.penalties = penalties

    def on_before_backward(self, trainer, pl_module, loss):
        anchor = next(callback for callback in trainer.callbacks if isinstance(callback, ScaleAnchor))
        added = anchor._step_penalties[-1] if anchor._step_penalties else torch.zeros(())
        self.penalties.append(anchor.weight * added)


def test_what_has_no_positions_is_refused(tmp_path):
    with pytest.raises(TaperlitError, match=r"ScaleAnchor.skip is 1 and 'head' is given \(4, 8\).*set skip to 0"):
        fit(tmp_path, Toy(tapered=False), ScaleAnchor("head", at=2, skip=1), steps=3)
    with pytest.raises(TaperlitError, match=r"ScaleAnchor.skip is 5 and 'head' is given \(4, 5, 8\)"):
        fit(tmp_path, Sequences(tapered=False), ScaleAnchor("head", at=2, skip=5), steps=3)
    with pytest.raises(TaperlitError, match=r"ScaleAnchor\.skip is -1"):
        ScaleAnchor("head", skip=-1)
