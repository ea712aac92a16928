"""EqualRows and BoundedWrites: what they do to a run, and what they refuse."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from toy import Stop, fit, same, state_of

from taperlit import AlignmentFreeze, BoundedWrites, EqualRows, GateSchedule, taper
from taperlit.callbacks import RngState
from taperlit.errors import TaperlitError
from taperlit.norm import tapered_norms
from taperlit.transformer import Transformer, TransformerConfig

SHAPE = dict(vocab_size=40, block_size=8, n_layer=2, n_head=2, d_model=16, d_ff=24)
WRITERS = [f"model.blocks.{i}.{name}.weight" for i in range(2) for name in ("attn.o_proj", "mlp.down_proj")]


class Model(L.LightningModule):
    def __init__(self, seed=0, tapered=True, optimizer=torch.optim.AdamW, **changes):
        super().__init__()
        torch.manual_seed(seed)
        self.model = Transformer(TransformerConfig(**{**SHAPE, **changes}))
        self.optimizer = optimizer
        if tapered:
            taper(self)

    def training_step(self, batch, batch_idx):
        tokens = blocks()[4 * batch_idx : 4 * batch_idx + 4]  # not the batch: a resumed loader begins anew
        return self.model(tokens[:, :-1], tokens[:, 1:])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=3e-2)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(64), batch_size=4)

    val_dataloader = train_dataloader

    @property
    def rows(self):
        return self.model.tok_embed.weight.detach().double().norm(dim=1)


def blocks():
    return torch.randint(40, (64, 9), generator=torch.Generator().manual_seed(1))


def gated(*more):
    return [GateSchedule(4, 8), AlignmentFreeze(), RngState(), *more]


class ByFormula(L.Callback):
    """After each step does in float64 what a callback should: to a run's weights, on ``on_train_batch_end``."""

    def __init__(self, change):
        self.change = change

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *_):
        self.change(trainer.global_step, dict(pl_module.named_parameters()))


def equal_rows(step, parameters):
    weight = parameters["model.tok_embed.weight"]
    norms = weight.double().square().sum(1).sqrt()
    weight.copy_(torch.diag(norms.mean() / norms) @ weight.double())


def capped(step, parameters):
    if step > 4:
        for name in WRITERS:
            u, s, v = torch.linalg.svd(parameters[name].double(), full_matrices=False)
            cap = 1.3 * (s.square().sum() / 16).sqrt()
            parameters[name].copy_(u @ torch.diag(s.clamp(max=cap)) @ v)


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_with_equal_rows_is_the_one_of_the_formula(tmp_path, tied):
    model, other = (Model(tied=tied, optimizer=torch.optim.SGD) for _ in range(2))
    fit(tmp_path, model, *gated(EqualRows()))
    fit(tmp_path, other, *gated(ByFormula(equal_rows)))
    for (name, mine), wanted in zip(state_of(model).items(), state_of(other).values(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6, msg=name)
    assert model.rows.max() / model.rows.min() < 1 + 1e-6
    assert (model.model.head.weight is model.model.tok_embed.weight) == tied


def test_the_common_norm_is_learned(tmp_path):
    model, before = Model(), Model().rows.mean()
    fit(tmp_path, model, *gated(EqualRows("model.tok_embed")), steps=16)
    assert model.rows.max() / model.rows.min() < 1 + 1e-6
    assert model.rows.mean() > 1.2 * before
    without = Model()
    fit(tmp_path, without, *gated(), steps=16)
    assert without.rows.max() / without.rows.min() > 1.2


def test_tied_logits_are_bounded_by_the_common_norm(tmp_path):
    model = Model(tied=True)
    fit(tmp_path, model, *gated(EqualRows()), steps=16)
    hidden = []
    model.model.head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with torch.no_grad():
        logits = model.eval().model(blocks()[:, :8])
    assert (logits.abs().amax(-1) <= model.rows[0] * hidden[0].norm(dim=-1) * (1 + 1e-5)).all()


def test_a_run_with_bounded_writes_is_the_one_of_the_formula(tmp_path):
    model, other, without = (Model(optimizer=torch.optim.SGD) for _ in range(3))
    fit(tmp_path, model, *gated(BoundedWrites(1.3)))
    fit(tmp_path, other, *gated(ByFormula(capped)))
    fit(tmp_path, without, *gated())
    for (name, mine), wanted in zip(state_of(model).items(), state_of(other).values(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6, msg=name)
    assert all(not torch.equal(model.get_parameter(name), without.get_parameter(name)) for name in WRITERS)


def test_they_begin_at_the_boundary_or_where_they_are_told(tmp_path):
    def changed(steps, bound, *others, tapered=True):
        model, without = Model(tapered=tapered), Model(tapered=tapered)
        fit(tmp_path, model, *others, bound, steps=steps, limit_train_batches=steps)
        fit(tmp_path, without, *others, steps=steps, limit_train_batches=steps)
        return not same(state_of(model), state_of(without))

    gate = [GateSchedule(4, 5), AlignmentFreeze()]
    assert changed(5, BoundedWrites(1.1), *gate)
    assert not changed(5, BoundedWrites(1.1, at=5), *gate)
    assert not changed(3, BoundedWrites(1.1, at=3), tapered=False)
    assert changed(3, BoundedWrites(1.1, at=2), tapered=False)
    with pytest.raises(TaperlitError, match="BoundedWrites needs to know when to freeze: add a GateSchedule"):
        changed(3, BoundedWrites(1.1), tapered=False)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, stop, accumulate):
    def callbacks():
        return gated(EqualRows(), BoundedWrites(1.3))

    whole, part, rest = Model(tied=True), Model(tied=True), Model(tied=True, seed=3)
    options = {"accumulate_grad_batches": accumulate, "steps": 8}
    fit(tmp_path, whole, *callbacks(), **options)
    fit(tmp_path, part, *callbacks(), Stop(stop), **options).save_checkpoint(tmp_path / "last.ckpt")
    fit(tmp_path, rest, *callbacks(), ckpt_path=tmp_path / "last.ckpt", **options)
    assert same(state_of(whole), state_of(rest))
    fit(tmp_path, plain := Model(tied=True), *gated(), ckpt_path=tmp_path / "last.ckpt", **options)  # without them
    assert len(tapered_norms(plain)) == 5


def test_the_weights_are_bounded_when_others_look(tmp_path):
    """A step's weights are never seen otherwise, by other callbacks or a validation."""
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.rows.max() / pl_module.rows.min())

        on_validation_start = on_train_batch_end

    fit(
        tmp_path,
        Model(),
        Look(),
        *gated(EqualRows()),
        val_check_interval=3,
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )
    assert len(seen) > 12
    assert max(seen) < 1 + 1e-6


@pytest.mark.parametrize("what", ["validate", "test"])
def test_evaluation_changes_nothing(tmp_path, what):
    from toy import trainer

    model = Model()
    model.test_step, model.test_dataloader = model.validation_step, model.train_dataloader
    before = state_of(model)
    run = trainer(tmp_path, EqualRows(), BoundedWrites(1.1), limit_val_batches=2, limit_test_batches=2)
    getattr(run, what)(model, verbose=False)
    assert same(before, state_of(model))


def test_after_a_fit_the_optimizer_is_left_alone(tmp_path):
    model = Model()
    run = fit(tmp_path, model, *gated(EqualRows()))
    assert not run.optimizers[0]._optimizer_step_post_hooks
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, model, EqualRows(), Fail(), steps=3)
    assert not model.optimizers(use_pl_optimizer=False)._optimizer_step_post_hooks


class Fail(L.Callback):
    def on_train_batch_end(self, *_):
        raise ZeroDivisionError


def test_what_cannot_be_is_refused(tmp_path):
    def error(callback, model=None):
        with pytest.raises(TaperlitError) as raised:
            fit(tmp_path, Model() if model is None else model, *gated(), callback, steps=10)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "EqualRows finds no module 'model.wte' in Model; its children are model" in error(EqualRows("model.wte"))
    assert "EqualRows was given model.head, which is a Linear; name" in error(EqualRows("model.head"))
    learned = Model(position="learned")
    assert "finds 2 embeddings in Model: model.tok_embed, model.pos_embed; name one" in error(EqualRows(), learned)
    fit(tmp_path, learned, *gated(EqualRows("model.tok_embed")), steps=10)  # as the message says
    frozen = Model()
    frozen.model.tok_embed.weight.requires_grad_(False)
    assert "rows of model.tok_embed, which are computed, flattened by FSDP, or not trained" in error(
        EqualRows(), frozen
    )
    frozen.model.blocks[1].attn.o_proj.weight.requires_grad_(False)
    assert "the weight of model.blocks.1.attn.o_proj, which is computed, no matrix" in error(BoundedWrites(), frozen)
    computed = Model()
    parametrize.register_parametrization(computed.model.blocks[0].mlp.down_proj, "weight", nn.Identity())
    parametrize.register_parametrization(computed.model.tok_embed, "weight", nn.Identity())
    assert "the weight of model.blocks.0.mlp.down_proj, which is computed" in error(BoundedWrites(), computed)
    assert "rows of model.tok_embed, which are computed" in error(EqualRows(), computed)
    given = BoundedWrites(names=["*.o_proj", "*.w2"])
    assert "BoundedWrites finds no module *.w2 in Model; give the names" in error(given)
    fit(tmp_path, Model(), *gated(BoundedWrites(names=["*.o_proj"])), steps=10)
    assert "no matrix" in error(BoundedWrites(names=["*.attn_norm"]))
    odd = Model()
    odd.model.blocks[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    assert "BoundedWrites at model.blocks.0.attn.o_proj: a weight is not finite" in error(BoundedWrites(at=1), odd)
    with pytest.raises(TaperlitError, match=r"BoundedWrites\.multiple is 1\.0; it must be above 1"):
        BoundedWrites(1.0)
    with pytest.raises(TaperlitError, match=r"BoundedWrites\.names is '\*\.o_proj'; give a list of patterns"):
        BoundedWrites(names="*.o_proj")


def test_they_are_copied_with_a_trainer():
    assert copy.deepcopy(EqualRows("model.tok_embed")).module == "model.tok_embed"
