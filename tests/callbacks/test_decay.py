"""The weight decay falls with the gate, and neither a checkpoint nor the next run sees it."""

import pytest
import torch
from toy import Noted, Stop, Toy, fit, rows, same, state_of

from taperlit import AlignmentFreeze, DecayWithGate, GateSchedule
from taperlit.errors import TaperlitError
from taperlit.schedule import gate_at

WARMUP, END, STEPS = 4, 9, 12


class Decayed(Toy):
    """Three groups, of which one has no decay; its batches are known by their number."""

    def training_step(self, batch, batch_idx):
        return super().training_step(rows()[torch.arange(4 * batch_idx, 4 * batch_idx + 4) % 160], batch_idx)

    def configure_optimizers(self):
        parts = [[*module.parameters()] for module in (self.embed, self.layers, self.head)]
        decays = (0.3, 0.0, 0.1)
        groups = [{"params": part, "weight_decay": decay} for part, decay in zip(parts, decays, strict=True)]
        self.optimizer = Noted(groups, "weight_decay", lr=1e-2)
        return self.optimizer

    def decays_now(self):
        return [group["weight_decay"] for group in self.optimizer.param_groups]


def pair():
    return [GateSchedule(WARMUP, END), AlignmentFreeze()]


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_step_decays_by_the_gate(tmp_path, floor, accumulate):
    model = Decayed()
    fit(tmp_path, model, *pair(), DecayWithGate(floor), accumulate_grad_batches=accumulate)
    for step, used in enumerate(model.optimizer.used, 1):
        share = floor + (1 - floor) * gate_at(step, WARMUP, END)
        assert used == pytest.approx([0.3 * share, 0.0, 0.1 * share], rel=1e-6)
    assert len(model.optimizer.used) == STEPS
    assert model.decays_now() == [0.3, 0.0, 0.1]


def test_with_the_gate_closed_the_weights_only_follow_the_gradient(tmp_path):
    """From the first step with the gate at 0 on, a run with the callback is AdamW without decay."""
    model, plain = Decayed(), Decayed()
    fit(tmp_path, model, *pair(), DecayWithGate(), Stop(END)).save_checkpoint(tmp_path / "mid.ckpt")
    fit(tmp_path, model, *pair(), DecayWithGate(), ckpt_path=tmp_path / "mid.ckpt")
    checkpoint = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group["weight_decay"] = 0.0
    torch.save(checkpoint, tmp_path / "without.ckpt")
    fit(tmp_path, plain, *pair(), ckpt_path=tmp_path / "without.ckpt")
    assert same(state_of(model), state_of(plain))


@pytest.mark.parametrize("after", [3, 6, 10])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, after):
    whole, first, second = Decayed(), Decayed(), Decayed()
    fit(tmp_path, whole, *pair(), DecayWithGate())
    fit(tmp_path, first, *pair(), DecayWithGate(), Stop(after)).save_checkpoint(tmp_path / "mid.ckpt")
    fit(tmp_path, second, *pair(), DecayWithGate(), ckpt_path=tmp_path / "mid.ckpt")
    assert first.optimizer.used + second.optimizer.used == whole.optimizer.used
    assert same(state_of(whole), state_of(second))


def test_an_error_in_a_step_leaves_the_full_decay(tmp_path):
    class Breaks(Decayed):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == END:
                self.optimizer.register_step_pre_hook(fail)  # after ours
            return super().training_step(batch, batch_idx)

    def fail(*_):
        raise RuntimeError("broken")

    model = Breaks()
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, model, *pair(), DecayWithGate())
    assert model.decays_now() == [0.3, 0.0, 0.1]


def test_a_model_without_a_gate_is_refused(tmp_path):
    with pytest.raises(TaperlitError, match="DecayWithGate"):
        fit(tmp_path, Toy(tapered=False), DecayWithGate())
