"""The radial gradient against float64 autograd, the paper's two propositions, and all that scales or splits a loss."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins import MixedPrecision
from processes import on_two, scalars
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import Toy, fit, rows

from taperlit import AlignmentFreeze, GateSchedule, LanguageModel, ScaleAnchor, TaperMonitor
from taperlit.callbacks.radial import RadialGradient

TRACE = "taper/radial_gradient"
SHAPE = dict(vocab_size=40, block_size=12, n_layer=2, n_head=2, d_model=16, d_ff=24)


class Kept(L.pytorch.loggers.Logger):
    """Keeps what is logged."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.traces = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        for tag, value in metrics.items():
            self.traces.setdefault(tag, {})[step] = value


class Truth(L.Callback):
    """``mean over tokens of N <dL/dh, h> / ||h||``, N the tokens in ``L``, by autograd in float64, from ``h`` on."""

    def __init__(self, residual):
        self.residual, self.batches, self.values = residual, [], {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        hooks = pl_module.model.final_norm._forward_pre_hooks
        anchors = dict(hooks)
        hooks.clear()  # they hold the graph under way, which cannot be copied
        model = copy.deepcopy(pl_module.model).double()
        hooks.update(anchors)
        found = [self.radial(model, batch) for batch in self.batches]
        self.values[trainer.global_step] = sum(found) / len(found)
        self.batches = []
        self.scale_loss = trainer.callback_metrics.get("train/scale_loss")

    def radial(self, model, batch):
        inputs = []
        hook = model.get_submodule(self.residual).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        with torch.no_grad():
            model(batch[:, :-1].clamp(min=0))
        hook.remove()
        h = inputs[0].requires_grad_()  # (B, T, d)
        z = model.head(model.final_norm(h) if self.residual == "final_norm" else h)
        targets = batch[:, 1:]
        (gradient,) = torch.autograd.grad(F.cross_entropy(z.flatten(0, 1), targets.flatten()), h)
        of_tokens = (targets != -100).sum() * (gradient * h).sum(-1) / h.norm(dim=-1)
        return of_tokens[targets != -100].mean().item()


def blocks(number=8):
    drawn = torch.randint(40, (number, 13), generator=torch.Generator().manual_seed(2))
    drawn[::3, -4:] = -100
    return drawn


def train(tmp_path, truth, *callbacks, taper="all", residual="final_norm", logits=None, steps=4, model=None, **options):
    torch.manual_seed(0)
    module = LanguageModel("small_1m", taper, SHAPE, lr=1e-2, **(model or {}))
    logger = Kept()
    monitor = TaperMonitor(every=1, residual=f"model.{residual}", logits=logits)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=logger, default_root_dir=tmp_path, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, truth, monitor], **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(blocks(), batch_size=3))  # of 3, 3 and 2 blocks
    return logger.traces.get(TRACE, {})


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"logits": "model.head"},  # a hook, for which the head is called as a module
        {"model": {"chunk_tokens": 8}},  # torch's linear_cross_entropy makes the gradient in the forward pass
        {"model": {"chunk_tokens": 8}, "logits": "model.head"},  # checkpointed chunks
        {"model": {"chunk_tokens": 8}, "residual": "head"},  # the residual itself comes in chunks
        {"model": {"activation_checkpointing": True}, "accumulate_grad_batches": 2},
        {"taper": "none", "model": {"chunk_tokens": 8}},
        {"precision": "bf16-mixed", "rel": 0.02},
    ],
    ids=str,
)
def test_it_is_that_of_float64_autograd_in_every_phase(tmp_path, case):
    rel = case.pop("rel", 1e-4)
    truth = Truth(case.get("residual", "final_norm"))
    callbacks = [GateSchedule(1, 3), AlignmentFreeze()] if case.get("taper", "all") != "none" else []
    seen = train(tmp_path, truth, *callbacks, **case)
    assert list(seen) == [0, 1, 2, 3]
    assert seen == pytest.approx(truth.values, rel=rel, abs=2e-6 if rel < 1e-3 else 1e-3)
    assert callbacks == [] or min(seen.values()) < -0.01  # in the linear phase it is no small number


def test_it_leaves_out_what_the_anchor_asks_of_the_residual(tmp_path):
    truth = Truth("final_norm")
    callbacks = [GateSchedule(1, 3), AlignmentFreeze(), ScaleAnchor("model.final_norm", weight=50.0)]
    seen = train(tmp_path, truth, *callbacks, log_every_n_steps=1)
    assert seen == pytest.approx(truth.values, rel=1e-4, abs=2e-6)
    assert truth.scale_loss > 1e-6  # weight 50 and width 16 make 25 times its root of it: above 0.02


def test_the_loss_scale_of_half_precision_is_taken_out(tmp_path):
    truth = Truth("final_norm")
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4096.0))
    options = {"plugins": [half], "accumulate_grad_batches": 2}
    seen = train(tmp_path, truth, GateSchedule(1, 3), AlignmentFreeze(), **options)
    assert list(seen) == [0, 1, 2, 3]
    assert seen == pytest.approx(truth.values, rel=0.02, abs=1e-3)


def caught(module, h, loss):
    """The radial gradient of ``loss(module(h))``."""
    radial = RadialGradient()
    radial.listen(module)
    loss(module(h)).backward()
    radial.end_pass(1.0)
    return [value.item() for value in radial.take()]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([nn.RMSNorm, nn.LayerNorm]))
def test_a_final_norm_leaves_none_of_it(seed, norm):
    torch.manual_seed(seed)
    module = nn.Sequential(norm(16, eps=0.0), nn.Linear(16, 7)).double()
    h, targets = torch.randn(30, 16, dtype=torch.float64, requires_grad=True), torch.randint(7, (30,))
    (value,) = caught(module, h, lambda z: F.cross_entropy(z, targets))
    assert abs(value) < 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_without_one_it_is_below_the_propositions_bound_where_the_right_tokens_lead(seed):
    torch.manual_seed(seed)
    head, targets = nn.Linear(16, 7, bias=False).double(), torch.randint(7, (30,))
    h = (torch.randn(30, 1).abs() + 0.1) * head.weight.detach()[targets] + 0.02 * torch.randn(30, 16)
    h.requires_grad_()
    z = head(h).detach()
    right = z.gather(1, targets[:, None]).squeeze(1)
    margin = right - z.scatter(1, targets[:, None], float("-inf")).amax(1)
    lead = margin > 0
    bound = -((1 - z.softmax(1).gather(1, targets[:, None]).squeeze(1)) * margin / h.norm(dim=1))[lead].mean()
    (value,) = caught(head, h, lambda z: F.cross_entropy(z[lead], targets[lead]))
    assert value <= bound < 0


class Checkpointed(Toy):
    """Its head runs within a checkpoint, and once more without a graph."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        h = self.layers(self.embed(x))
        with torch.no_grad():
            self.head(h)
        return self.head(h) if self.reentrant is None else checkpoint(self.head, h, use_reentrant=self.reentrant)


def toy_traces(tmp_path, model, *callbacks, **options):
    logger = Kept()
    fit(tmp_path, model, *callbacks, TaperMonitor(every=1, residual="head"), logger=logger, **options)
    return logger.traces


@pytest.mark.parametrize("reentrant", [False, True])
def test_both_kinds_of_checkpoint_give_what_none_gives(tmp_path, reentrant):
    expected = toy_traces(tmp_path, Checkpointed(None), steps=3)
    seen = toy_traces(tmp_path, Checkpointed(reentrant), steps=3)
    assert seen[TRACE] == pytest.approx(expected[TRACE])
    assert len(seen[TRACE]) == 3
    assert seen["taper/pre_logit_rms"] == pytest.approx(expected["taper/pre_logit_rms"])


def test_training_is_the_same_with_it(tmp_path):
    one, two = Toy(), Toy()
    fit(tmp_path, one)
    toy_traces(tmp_path, two)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


class Twice(nn.Module):
    """Writes over what it is given, which its own gradient does not need."""

    def forward(self, hidden):
        return hidden.mul_(2.0)


def test_a_residual_that_is_written_over_has_none(tmp_path):
    class Model(Toy):
        def __init__(self):
            super().__init__()
            self.twice = Twice()

        def forward(self, x):
            return self.head(self.twice(hidden=self.layers(self.embed(x)) * 1.0))

    def traces(residual):
        logger = Kept()
        fit(tmp_path, Model(), TaperMonitor(every=1, residual=residual), logger=logger, steps=2)
        return logger.traces

    assert TRACE in traces("head")
    assert TRACE not in traces("twice")
    assert "taper/pre_logit_rms" in traces("twice")


def test_frozen_layers_and_manual_optimization_have_none(tmp_path):
    frozen = Toy(tapered=False)
    frozen.embed.requires_grad_(False)
    frozen.layers.requires_grad_(False)
    seen = toy_traces(tmp_path, frozen, steps=2)
    assert TRACE not in seen
    assert "taper/pre_logit_rms" in seen

    class Manual(Toy):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))
            self.optimizers().step()
            self.optimizers().zero_grad()

    seen = toy_traces(tmp_path, Manual(), steps=2)
    assert TRACE not in seen
    assert "taper/pre_logit_rms" in seen


def hooks_of(model):
    """Those that are a callback's methods."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "__self__", None) is not None]


def test_nothing_stays_behind_an_error_or_a_skipped_batch(tmp_path):
    class Fails(Toy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1:
                loss.register_hook(lambda _: 1 / 0)  # in the backward pass
            return loss

    def monitored(model, steps=2):
        logger = Kept()
        fit(tmp_path, model, monitor, logger=logger, steps=steps)
        return logger.traces[TRACE]

    monitor = TaperMonitor(every=1, residual="head")
    model = Fails()
    with pytest.raises(ZeroDivisionError):
        monitored(model)
    assert not hooks_of(model)
    again = monitored(Toy())
    monitor = TaperMonitor(every=1, residual="head")
    assert again == monitored(Toy())

    class Skips(Toy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 else loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert not hooks_of(self)

    assert list(monitored(Skips(), steps=3)) == [0, 2]


class Dealt(Toy):
    """Every process has its share of each batch of 8, and the first one a layer of its own beside the model."""

    def __init__(self):
        super().__init__()
        self.side = nn.Linear(4, 1)

    def train_dataloader(self):
        share = rows()[self.global_rank :: self.trainer.world_size]
        return torch.utils.data.DataLoader(share, batch_size=8 // self.trainer.world_size)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + self.side(batch).square().mean() if self.global_rank == 0 else loss


@pytest.mark.slow
def test_two_processes_are_one_and_one_may_have_nothing_to_add(tmp_path):
    def traces(name, *callbacks, **options):
        logger = L.pytorch.loggers.TensorBoardLogger(tmp_path, name, version="run")
        monitor = TaperMonitor(every=1, residual="head", logits="side")
        callbacks = [GateSchedule(4, 8), AlignmentFreeze(), monitor, *callbacks]
        fit(tmp_path, Dealt(), *callbacks, logger=logger, accumulate_grad_batches=2, **options)
        return {tag: dict(values) for tag, values in scalars(tmp_path / name / "run").items()}

    one = traces("one")
    two = traces("two", **on_two(find_unused_parameters=True))
    assert len(one[TRACE]) == 12
    assert two[TRACE] == pytest.approx(one[TRACE], rel=1e-3)
    assert two["taper/pre_logit_rms"] == pytest.approx(one["taper/pre_logit_rms"], rel=1e-3)
    assert len(two["taper/logit_norm"]) == 12
    assert all(0 < value < 100 for value in two["taper/logit_norm"].values())
