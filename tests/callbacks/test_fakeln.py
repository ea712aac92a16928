"""FakeLNSchedule: the order and the steps, the numbers that are measured, the scale loss, and resuming."""

import lightning as L
import pytest
import torch
from torch import nn
from toy import Stop, fit, same, state_of, trainer

from taperlit import FakeLNSchedule, FoldOnEnd, Transformer, TransformerConfig, load_folded
from taperlit.baselines import apply_fakeln
from taperlit.errors import TaperlitError
from taperlit.norm import shared_gate, tapered_norms

END = 3
SHAPE = dict(vocab_size=30, block_size=8, n_layer=2, n_head=2, d_model=16, d_ff=24)


class Small(L.LightningModule):
    """Our transformer on blocks of random tokens."""

    def __init__(self, norm="layernorm", layers=2, batch_size=4, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.model = Transformer(TransformerConfig(**{**SHAPE, "norm": norm, "n_layer": layers}))
        with torch.no_grad():
            self.model.tok_embed.weight.mul_(20)
        apply_fakeln(self.model)
        self.example_input_array = torch.arange(8)[None]
        self.batch_size, self.losses = batch_size, []

    def forward(self, tokens):
        return self.model(tokens)

    def training_step(self, batch, batch_idx):
        loss = self.model(batch[:, :-1], batch[:, 1:])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        tokens = torch.randint(SHAPE["vocab_size"], (160, 9), generator=torch.Generator().manual_seed(1))
        return torch.utils.data.DataLoader(tokens, batch_size=self.batch_size)


class Watch(L.Callback):
    """When each norm was frozen, in optimizer steps from 1, and what each was given before."""

    def __init__(self):
        self.frozen, self.inputs, self.residuals = {}, [], []

    def on_fit_start(self, trainer, pl_module):
        for name, norm in tapered_norms(pl_module.model).items():
            norm.register_forward_pre_hook(lambda m, a, name=name: self.look(name, m, a[0]))

    def look(self, name, norm, x):
        if norm.training and torch.is_grad_enabled():
            self.inputs[-1][name] = x.detach().double()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.inputs.append({})
        for name, norm in tapered_norms(pl_module.model).items():
            step = trainer.global_step + 1
            if norm.is_half_frozen:
                self.frozen.setdefault((name, "half"), step)
            if norm.is_frozen:
                self.frozen.setdefault((name, "all"), step)


def steps_of(schedule, tmp_path, layers=2, steps=30, **options):
    """Per stage the steps at which its norms are frozen."""
    model, watch = Small(layers=layers), Watch()
    fit(tmp_path, model, schedule, watch, steps=steps, **options)
    blocks = range(layers)
    found = {
        "mlp": [watch.frozen[f"blocks.{i}.mlp_norm", "all"] for i in blocks],
        "qk": [watch.frozen.get((f"blocks.{i}.attn_norm", "half")) for i in blocks],
        "v": [watch.frozen[f"blocks.{i}.attn_norm", "all"] for i in blocks],
        "final": watch.frozen["final_norm", "all"],
    }
    assert shared_gate(model).value == 0
    return found


def test_norms_are_frozen_in_order_each_at_its_step(tmp_path):
    given = FakeLNSchedule(start=4, mlp=2, qk=1, v=3, aux_weight=0.0)
    assert steps_of(given, tmp_path) == {"mlp": [4, 6], "qk": [8, 9], "v": [10, 13], "final": 16}
    given = FakeLNSchedule(start=4, mlp=2, qk=1, v=3, final=20, halves=False, aux_weight=0.0)
    assert steps_of(given, tmp_path) == {"mlp": [4, 6], "qk": [None, None], "v": [8, 9], "final": 20}
    accumulated = {"accumulate_grad_batches": 3, "steps": 10}
    given = FakeLNSchedule(start=2, mlp=1, qk=1, v=1, aux_weight=0.0)
    assert steps_of(given, tmp_path, **accumulated) == {"mlp": [2, 3], "qk": [4, 5], "v": [6, 7], "final": 8}


@pytest.mark.parametrize(
    ("layers", "total", "args", "first", "last"),
    [(12, 300, (20, 2, 2, 3), 20, 104), (24, 500, (20, 2, 2, 3), 20, 188), (36, 600, (30, 4, 4, 6), 30, 534),
     (48, 800, (50, 4, 4, 6), 50, 722), (12, 300, (), 20, 104)],
)  # fmt: skip
def test_the_papers_schedules(tmp_path, layers, total, args, first, last):
    shape = TransformerConfig(**{**SHAPE, "n_layer": layers, "d_model": 4, "n_head": 1, "d_ff": 2})
    module = L.LightningModule()
    with torch.device("meta"):
        module.model = Transformer(shape)
    apply_fakeln(module.model)
    schedule = FakeLNSchedule(*args, aux_weight=0.0)
    run = trainer(tmp_path, steps=total)
    schedule.on_fit_start(run, module)
    planned = schedule.schedule(run)
    assert len(planned) == 3 * layers + 1
    assert (planned[0][0], planned[-1][0], planned[-1][1]) == (first, last, "model.final_norm")
    mlp = [step for step, name, _ in planned if name.endswith("mlp_norm")]
    half = [step for step, _, half in planned if half]
    a, _, c = args[1:] or (2, 2, 3)
    assert mlp == [first + a * i for i in range(layers)]
    assert half == [first + a * (layers + i) for i in range(layers)]
    assert planned[2 * layers][0] == first + 2 * a * layers
    assert last == first + (2 * a + c) * layers


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("sigma", ["start", "moving"])
def test_sigma_is_what_its_formula_says_over_the_right_batches(tmp_path, norm, sigma):
    model, watch = Small(norm), Watch()
    schedule = FakeLNSchedule(start=3, mlp=1, qk=1, v=1, sigma=sigma, aux_weight=0.0)
    fit(tmp_path, model, watch, schedule, steps=10, accumulate_grad_batches=2)
    for name, fake in tapered_norms(model.model).items():
        half = watch.frozen.get((name, "half"), watch.frozen[name, "all"])
        if sigma == "start":  # the first step's two micro-batches
            x = torch.cat([inputs[name] for inputs in watch.inputs[:2]])[:, 1:]
            expected = x.std(correction=0) if norm == "layernorm" else x.square().mean().sqrt()
        else:
            expected = None
            for inputs in watch.inputs[: 2 * (half - 1)]:
                x = inputs[name]
                square = x.var(-1, correction=0) if norm == "layernorm" else x.square().mean(-1)
                mean = (square + 1e-5).sqrt().mean()
                expected = mean if expected is None else 0.9 * expected + 0.1 * mean
        assert fake.sigma == pytest.approx(expected.item(), rel=2e-5), name


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_the_scale_loss_is_its_formula_and_is_added(tmp_path, norm):
    class Loss(L.Callback):
        def __init__(self):
            self.totals, self.batches, self.hidden = [], [], []

        def on_fit_start(self, trainer, pl_module):
            final = pl_module.model.final_norm
            final.register_forward_pre_hook(lambda m, a: self.hidden.append(a[0].detach().double()))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.totals.append(outputs["loss"].item())
            self.batches.append(batch)

    model, look = Small(norm), Loss()
    fit(tmp_path, model, look, FakeLNSchedule(0.2, 0.2, 0.2, 0.2, aux_weight=0.3, end_of_text=END), steps=12)
    for total, loss, batch, h in zip(look.totals, model.losses, look.batches, look.hidden, strict=True):
        s = [
            ((h[b, t].var(correction=0) if norm == "layernorm" else h[b, t].square().mean()) + 1e-5).sqrt()
            for b in range(4) for t in range(1, 8) if batch[b, t] != END
        ]  # fmt: skip
        assert 20 < len(s) < 28 or len(s) == 28
        s = torch.stack(s)
        assert total - loss == pytest.approx(0.3 * (s - s.mean()).square().mean().item(), rel=1e-3, abs=1e-6)
    assert any((batch[:, 1:-1] == END).any() for batch in look.batches)
    assert "training_step" not in vars(model)


def test_the_scale_loss_pulls_and_its_mean_is_no_part_of_the_graph():
    module = Small()
    schedule = FakeLNSchedule()
    h = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).float().requires_grad_()
    schedule.penalty(h, None, module.model.final_norm).backward()
    wide = h.detach().double().requires_grad_()
    s = (wide.var(-1, correction=0) + 1e-5).sqrt()[:, 1:]
    (s - s.mean().detach()).square().mean().backward()
    torch.testing.assert_close(h.grad.double(), wide.grad, rtol=1e-4, atol=1e-7)


class BySteps(Small):
    """The batch of a step depends on the step alone, whoever begins there."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return torch.randint(30, (4, 9), generator=torch.Generator().manual_seed(self.trainer.global_step))


class Save(L.Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, path, after):
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.after and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("sigma", ["start", "moving"])
@pytest.mark.parametrize("after", [1, 6, 11])  # before the first, while one is half frozen, and after the last
def test_a_resumed_run_is_an_undisturbed_one_bit_for_bit(tmp_path, sigma, after):
    def callbacks(mlp=1):
        return FakeLNSchedule(start=3, mlp=mlp, qk=1, v=2, sigma=sigma), FoldOnEnd(str(tmp_path / "f"), "model")

    path = tmp_path / "run.ckpt"
    whole = BySteps()
    fit(tmp_path, whole, *callbacks(), Save(path, after), steps=16)
    other = BySteps(seed=1)
    # FoldOnEnd's folder is replaced in the second fit only by another's; the schedule is the one that was saved.
    fold = FoldOnEnd(str(tmp_path / "g"), "model")
    fit(tmp_path, other, callbacks(mlp=2)[0], fold, ckpt_path=path, steps=16)
    assert same(state_of(whole), state_of(other))
    assert whole.losses[after:] == other.losses
    tokens = whole.example_input_array
    folded = load_folded(tmp_path / "g", lambda: Transformer(TransformerConfig(**{**SHAPE, "norm": "layernorm"})))
    torch.testing.assert_close(folded(tokens), whole.model.eval()(tokens), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.LayerNorm) for module in folded.modules())


def test_a_new_fit_measures_anew_and_what_is_frozen_stays(tmp_path):
    model = Small()
    fit(tmp_path, model, FakeLNSchedule(start=9, mlp=1, qk=1, v=1), Stop(9), steps=20)
    norms = tapered_norms(model.model)
    frozen, other = norms["blocks.0.mlp_norm"], norms["blocks.1.mlp_norm"]
    assert frozen.is_frozen
    assert not other.is_frozen
    before = frozen.sigma, other.sigma
    fit(tmp_path, model, FakeLNSchedule(start=2, mlp=1, qk=1, v=1), steps=12)
    assert frozen.sigma == before[0]
    assert other.sigma != before[1]
    assert shared_gate(model).value == 0
    assert all(norm.measure == "no" for norm in norms.values())


def test_what_cannot_run_is_refused_before_the_first_step(tmp_path):
    def error(schedule, model=None, **options):
        model = model or Small()
        with pytest.raises(TaperlitError) as raised:
            fit(tmp_path, model, schedule, **options)
        assert not getattr(model, "losses", [])
        return str(raised.value)

    assert "beyond the run's 12" in error(FakeLNSchedule(start=8, mlp=2, qk=2, v=3))
    assert "before the others are through" in error(FakeLNSchedule(2, 1, 1, 1, final=5))
    assert "FakeLNSchedule.mlp" in error(FakeLNSchedule(mlp=13))
    plain = Small()
    plain.model = Transformer(TransformerConfig(**SHAPE))
    assert "apply_fakeln" in error(FakeLNSchedule(), plain)
    unknown = Small()
    unknown.model.blocks[1].attn_norm.why_whole = "its layout is not known"
    assert "attn_norm cannot be frozen in halves (its layout" in error(FakeLNSchedule(), unknown)
    fit(tmp_path, unknown, FakeLNSchedule(halves=False))  # as it advises
    assert shared_gate(unknown).value == 0
    manual = Small()
    manual.automatic_optimization = False
    assert "aux_weight=0" in error(FakeLNSchedule(), manual)
    with pytest.raises(TaperlitError, match="choose start or moving"):
        FakeLNSchedule(sigma="end")
    with pytest.raises(TaperlitError, match="aux_weight is -1"):
        FakeLNSchedule(aux_weight=-1)
    short = Small()
    short.training_step = lambda batch, batch_idx: short.model(batch[:2, :-1], batch[:2, 1:])
    with pytest.raises(TaperlitError, match="no token ids of the shape"):
        fit(tmp_path, short, FakeLNSchedule(end_of_text=END))


def test_a_trial_run_goes_through_all_of_it(tmp_path):
    model = Small()
    fit(tmp_path, model, FakeLNSchedule(), steps=-1, fast_dev_run=3)
    assert shared_gate(model).value == 0
