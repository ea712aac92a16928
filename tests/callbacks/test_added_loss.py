import itertools

import lightning as L
import pytest

from taperlit.callbacks.added_loss import wrap_training_step


class Module(L.LightningModule):
    def training_step(self, x):
        return x


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
@pytest.mark.parametrize("own", [False, True])
def test_wrappers_are_undone_in_any_order(order, own):
    """Each adds a digit of its own; what is undone adds nothing, and in the end the step is the module's again."""
    module = Module()
    if own:  # somebody else's, that was there before
        module.training_step = lambda x: x + 1000
    base = 1000 if own else 0
    undo = [wrap_training_step(module, lambda: None, lambda x, add=10**i: x + add) for i in range(3)]
    assert module.training_step(0) == base + 111
    left = {0, 1, 2}
    for one in order:
        undo[one]()
        left.discard(one)
        assert module.training_step(0) == base + sum(10**i for i in left)
    assert ("training_step" in vars(module)) is own
