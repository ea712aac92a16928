"""Manual optimization: several optimizers, accumulation by hand, sparse gradients."""

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from toy import Layer, Moments, Toy, fit, rows, scalars

from taperlit import AlignmentFreeze, FoldOnEnd, GateSchedule, ScaleAnchor, TaperMonitor, load_folded, taper
from taperlit.callbacks import FiniteGuard, StepProgressBar
from taperlit.errors import TaperlitError
from taperlit.norm import Phase, shared_gate
from taperlit.schedule import gate_at


class Adversaries(L.LightningModule):
    """A generator and a discriminator, each with norms and an optimizer of its own, which take turns in every batch."""

    def __init__(self, generator_every=1):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), Layer(8, nn.RMSNorm), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), Layer(8, nn.LayerNorm), nn.Linear(8, 1))
        self.head = self.discriminator[2]
        taper(self)
        self.example_input_array = torch.randn(3, 4)
        self.generator_every = generator_every
        self.gates = []

    def forward(self, x):
        return self.discriminator(self.generator(x))

    def training_step(self, batch, batch_idx):
        self.gates.append(shared_gate(self).value.item())
        generate, discriminate = self.optimizers()
        discriminate.zero_grad()
        real, fake = self.discriminator(batch), self(batch)
        self.manual_backward(nn.functional.softplus(fake).mean() + nn.functional.softplus(-real).mean())
        discriminate.step()
        if batch_idx % self.generator_every == 0:
            generate.zero_grad()
            self.manual_backward(nn.functional.softplus(-self(batch)).mean())
            generate.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in (self.generator, self.discriminator)]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(rows(), batch_size=8)


@pytest.mark.parametrize("every", [1, 2])
def test_two_optimizers(tmp_path, every):
    model, moments = Adversaries(every), Moments()
    callbacks = [GateSchedule(9, 20), AlignmentFreeze(ema_rate=0.3), FiniteGuard(), moments]
    folding = FoldOnEnd(str(tmp_path / "folded"), module="generator")
    fit(tmp_path, model, *callbacks, folding, StepProgressBar(), steps=30, enable_progress_bar=True)
    begins, step = [], 1  # the first step of each batch
    while step <= 30:
        begins.append(step)
        step += 2 if (len(begins) - 1) % every == 0 else 1
    assert model.gates == pytest.approx([gate_at(step, 9, 20) for step in begins], abs=1e-6)
    # A step of the averages is a batch in which any optimizer stepped: all of its forward passes, once.
    warm = [[batch] for batch, step in enumerate(begins) if step <= 9]
    assert scalars(model) == pytest.approx(moments.scalars(0.3, warm), rel=1e-5)
    assert shared_gate(model).phase is Phase.LINEAR
    folded = load_folded(
        tmp_path / "folded", lambda: nn.Sequential(nn.Linear(4, 8), Layer(8, nn.RMSNorm), nn.Linear(8, 4))
    )
    with torch.no_grad():
        torch.testing.assert_close(folded(rows()), model.generator.eval()(rows()), rtol=1e-5, atol=1e-6)


class ByHand(Toy):
    """Accumulates over four batches with its own code."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / 4)
        if batch_idx % 4 == 3:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_accumulation_by_hand_is_accumulation(tmp_path):
    automatic, manual = Toy(), ByHand()
    fit(tmp_path, automatic, GateSchedule(3, 7), AlignmentFreeze(), FiniteGuard(), accumulate_grad_batches=4, steps=9)
    fit(tmp_path, manual, GateSchedule(3, 7), AlignmentFreeze(), FiniteGuard(), steps=9)
    assert manual.gates == automatic.gates
    assert scalars(manual) == scalars(automatic)
    for mine, theirs in zip(manual.parameters(), automatic.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_anchor_refuses_it_before_the_first_step(tmp_path):
    model = Adversaries()
    with pytest.raises(TaperlitError, match="which manual optimization does not use: train with automatic"):
        fit(tmp_path, model, GateSchedule(9, 20), AlignmentFreeze(), ScaleAnchor("head"), steps=30)
    assert model.gates == []
    assert "training_step" not in vars(model)
    assert not model.head._forward_pre_hooks


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_monitor_records_batches(tmp_path, every):
    model = Adversaries()
    norms = {}

    class Watch(L.Callback):
        """Each optimizer's gradients, when it steps."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            part = "generator" if optimizer is trainer.optimizers[0] else "discriminator"
            weight = getattr(pl_module, part)[1].linear.weight
            norms.setdefault(part, []).append(weight.grad.norm().item())

    logger = L.pytorch.loggers.TensorBoardLogger(tmp_path, "logs")
    callbacks = [GateSchedule(9, 20), AlignmentFreeze(), Watch(), TaperMonitor(every, residual="head", logits="head")]
    fit(tmp_path, model, *callbacks, steps=30, logger=logger, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    gates = events.Scalars("taper/gate")
    batches = sorted({-(-step // 2) for step in range(0, 30, every)} - {15})  # the first after each multiple of every
    # a record stands at the step with which its batch begins to step
    assert [event.step // 2 for event in gates] == batches
    assert [event.value for event in gates] == pytest.approx([model.gates[batch] for batch in batches])
    for part in norms:
        trace = [event.value for event in events.Scalars(f"grad_norm/{part}.linear.weight")]
        assert trace == pytest.approx([norms[part][batch] for batch in batches], rel=1e-5)
    assert len(events.Scalars("taper/logit_norm")) == len(batches)


class Sparse(Toy):
    """Reads rows of an embedding whose gradients are sparse."""

    def __init__(self, manual, bad=None):
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=True)
        self.automatic_optimization = not manual
        self.bad = bad

    def loss(self, x):
        rows = self.table((x[:, 0].abs() * 3).long().clamp(max=9))
        if self.bad is not None and self.global_step >= self.bad:
            rows.register_hook(lambda grad: grad * float("inf"))
        return super().loss(x + rows)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        if self.automatic_optimization:
            return torch.optim.SGD(self.parameters(), lr=1e-3)
        dense = [p for p in self.parameters() if p is not self.table.weight]
        return [torch.optim.SparseAdam([self.table.weight], lr=1e-3), torch.optim.AdamW(dense, lr=1e-3)]


@pytest.mark.parametrize("manual", [True, False])
def test_sparse_gradients(tmp_path, manual):
    model, moments = Sparse(manual), Moments()
    logger = L.pytorch.loggers.TensorBoardLogger(tmp_path, "logs")
    norms = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if optimizer is trainer.optimizers[0]:
                norms.append(pl_module.table.weight.grad.to_dense().norm().item())

    callbacks = [GateSchedule(6, 12), AlignmentFreeze(), FiniteGuard(), TaperMonitor(every=1), moments, Watch()]
    callbacks += [] if manual else [ScaleAnchor("head")]
    fit(tmp_path, model, *callbacks, steps=20, logger=logger, log_every_n_steps=1)
    warm = [[batch] for batch in range(3 if manual else 6)]
    assert scalars(model) == pytest.approx(moments.scalars(0.01, warm), rel=1e-5)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    trace = [event.value for event in events.Scalars("grad_norm/table.weight")]
    assert trace == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_a_bad_sparse_gradient_is_caught(tmp_path, manual, skip):
    model, guard = Sparse(manual, bad=4), FiniteGuard(skip=skip, patience=3)
    with pytest.raises(TaperlitError, match=r"the gradient is not finite.* it began in table\.weight"):
        fit(tmp_path, model, GateSchedule(6, 12), AlignmentFreeze(), guard, steps=20)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert guard.skipped == (3 if skip else 0)


class GoesBad(Adversaries):
    """Its generator's or discriminator's loss or gradient is bad from a batch on."""

    def __init__(self, part, what):
        super().__init__()
        self.part, self.what = part, what

    def manual_backward(self, loss, *args, **kwargs):
        self.turn = "discriminator" if self.turn is None else "generator"
        bad = self.bad_batch and self.turn == self.part
        super().manual_backward(loss * float("nan") if bad and self.what == "loss" else loss, *args, **kwargs)
        if bad and self.what == "gradient":
            getattr(self, self.part)[1].linear.weight.grad[0, 0] = float("inf")

    def training_step(self, batch, batch_idx):
        self.turn, self.bad_batch = None, batch_idx == 3
        super().training_step(batch, batch_idx)


@pytest.mark.parametrize("part", ["generator", "discriminator"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_guard_watches_each_optimizers_step(tmp_path, part, what):
    step = 8 if part == "generator" else 7
    where = (
        rf"began in {part}\.1\.linear\.weight" if what == "gradient" else "manual optimization a batch runs once more"
    )
    model = GoesBad(part, what)
    with pytest.raises(TaperlitError, match=rf"step {step} .*the {what} is not finite; .*{where}"):
        fit(tmp_path, model, GateSchedule(9, 20), AlignmentFreeze(), FiniteGuard(), steps=30)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    guard, model = FiniteGuard(skip=True), GoesBad(part, what)
    fit(tmp_path, model, GateSchedule(9, 20), AlignmentFreeze(), guard, steps=30)
    assert guard.skipped == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_layer_before_the_first_backward_pass_is_named(tmp_path):
    class Overflows(Adversaries):
        def training_step(self, batch, batch_idx):
            super().training_step(batch * (1e30 if batch_idx == 3 else 1.0), batch_idx)

    weights = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            weights.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    model = Overflows()
    model.discriminator[0].weight.data *= 1e10
    with pytest.raises(TaperlitError, match=r"step 7 .*the loss is not finite; it began in discriminator\.0"):
        fit(tmp_path, model, AlignmentFreeze(at=100), FiniteGuard(), Watch(), steps=300)
    for name, parameter in model.named_parameters():  # looking for the layer made no step
        assert torch.equal(parameter, weights[name])
