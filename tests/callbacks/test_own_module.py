"""The callbacks on a LightningModule of another design: an encoder built from nn.LayerNorm."""

import itertools
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from taperlit import AlignmentFreeze, FoldOnEnd, GateSchedule, ScaleAnchor, TaperMonitor, taper
from taperlit.errors import TaperlitError
from taperlit.norm import Phase, shared_gate, tapered_norms


class Classifier(L.LightningModule):
    def __init__(self, dictionary=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)
        self.example_input_array = torch.randn(2, 5, 16)
        self.dictionary = dictionary
        self.losses, self.gates, self.validation = [], [], []

    def forward(self, x):
        return self.head(self.encoder(x)).mean(1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.losses.append(loss.item())
        gate = shared_gate(self)
        self.gates.append(gate.value.item() if gate else None)
        return {"loss": loss, "extra": 1} if self.dictionary else loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.validation.append(nn.functional.cross_entropy(self(x), y).item())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(64, 5, 16, generator=generator)
        return torch.utils.data.DataLoader(list(zip(x, (x.mean((1, 2)) > 0).long(), strict=True)), batch_size=8)

    val_dataloader = train_dataloader


def fit(tmp_path, callbacks, model=None, steps=20, resume=None, names=("encoder.layers.*",), **options):
    if model is None:
        torch.manual_seed(0)
        model = Classifier()
        taper(model, names)
    trainer = L.Trainer(
        max_steps=steps, callbacks=callbacks, default_root_dir=tmp_path, accelerator="cpu", devices=1,
        enable_progress_bar=False, enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, **options},
    )  # fmt: skip
    trainer.fit(model, ckpt_path=resume, weights_only=True)
    return model, trainer


def all_callbacks(tmp_path, **anchor):
    return [
        GateSchedule(warmup=0.25, end=0.75),
        AlignmentFreeze(),
        ScaleAnchor("encoder.norm", **anchor),
        FoldOnEnd(str(tmp_path / "folded")),
        TaperMonitor(every=2, residual="encoder.norm", logits="head"),
    ]


def test_all_of_them_together(tmp_path):
    logger = L.pytorch.loggers.TensorBoardLogger(tmp_path, "logs")
    model, _ = fit(tmp_path, all_callbacks(tmp_path), logger=logger)
    expected = [1.0] * 5 + [(1 + torch.tensor(torch.pi * k / 10).cos().item()) / 2 for k in range(1, 10)] + [0.0] * 6
    assert model.gates == pytest.approx(expected, abs=1e-6)
    config = json.loads((tmp_path / "folded/config.json").read_text())
    assert len(config["structure"]["identities"]) == 4
    weights = load_file(tmp_path / "folded/model.safetensors")
    assert "encoder.norm.weight" in weights
    assert not any("norm1" in key or "taper" in key for key in weights)
    # the folded weights, in the plain model with its norms out of the way, are the trained function
    plain = Classifier().eval()
    for layer in plain.encoder.layers:
        layer.norm1 = layer.norm2 = nn.Identity()
        layer.activation_relu_or_gelu = 0
    plain.load_state_dict(weights)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = events.Tags()["scalars"]
    for tag in ("taper/gate", "taper/pre_logit_rms", "taper/logit_norm", "grad_norm/encoder.layers.linear1.weight"):
        assert tag in tags
    norms = tapered_norms(model)
    for name, norm in norms.items():
        trace = [event.value for event in events.Scalars(f"taper/alignment/{name}")]
        assert trace[3:] == [norm.alignment.item()] * 7  # frozen at step 5
        assert len({*trace[:3]}) == 3  # and estimated until then
    assert [event.step for event in events.Scalars("taper/gate")] == list(range(0, 20, 2))
    assert [event.value for event in events.Scalars("taper/gate")] == pytest.approx(expected[::2], abs=1e-6)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_their_order_does_not_matter(tmp_path):
    states = []
    for index, order in enumerate(itertools.permutations(range(3))):
        callbacks = [GateSchedule(0.25, 0.75), AlignmentFreeze(), ScaleAnchor("encoder.norm")]
        model, _ = fit(tmp_path / str(index), [callbacks[i] for i in order])
        states.append(state_of(model))
    for state in states[1:]:
        assert all(torch.equal(value, states[0][key]) for key, value in state.items())


@pytest.mark.parametrize("at", [2, 5, 6, 9, 15, 17])
def test_resumed_is_the_same_as_uninterrupted(tmp_path, at):
    whole, _ = fit(tmp_path, [GateSchedule(0.25, 0.75), AlignmentFreeze(), anchor := ScaleAnchor("encoder.norm")])
    first = [GateSchedule(0.25, 0.75), AlignmentFreeze(), ScaleAnchor("encoder.norm")]
    torch.manual_seed(0)
    model = Classifier()
    taper(model, ["encoder.layers.*"])

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == at:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")
                trainer.should_stop = True

    trainer = L.Trainer(
        max_steps=20, callbacks=[*first, Stop()], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, min_epochs=0,
    )  # fmt: skip
    trainer.fit(model)
    second = [GateSchedule(0.25, 0.75), AlignmentFreeze(), resumed := ScaleAnchor("encoder.norm")]
    other = Classifier()
    taper(other, ["encoder.layers.*"])
    # The loader of this module does not remember its place: give it one whole epoch's worth in the same order.
    order = whole.train_dataloader().dataset
    start = at % 8
    other.train_dataloader = lambda: torch.utils.data.DataLoader(order[start * 8 :] + order[: start * 8], batch_size=8)
    fit(tmp_path, second, other, resume=tmp_path / "mid.ckpt")
    assert resumed.target == anchor.target
    assert other.gates == whole.gates[at:]
    for (name, norm), other_norm in zip(tapered_norms(whole).items(), tapered_norms(other).values(), strict=True):
        assert norm.alignment == other_norm.alignment, name


def test_the_scale_loss_is_added_to_training_and_never_to_validation(tmp_path):
    seen = {}

    class Watch(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen[trainer.global_step] = loss.item()

    residuals = {}
    for dictionary in (False, True):
        torch.manual_seed(0)
        model = Classifier(dictionary)
        taper(model, ["encoder.layers.*"])

        def record(module, args, model=model):
            if module.training:
                residuals.setdefault(len(model.losses), args[0].detach().double())

        model.encoder.norm.register_forward_pre_hook(record)
        anchor = ScaleAnchor("encoder.norm", weight=0.7, ema_rate=0.2)
        fit(tmp_path, [GateSchedule(0.25, 0.75), AlignmentFreeze(), anchor, Watch()], model)

        def s(h):
            return (h.var(-1, correction=0) + 1e-5).sqrt()

        ema = weight = 0.0
        for step in range(5):
            ema, weight = 0.8 * ema + 0.2 * s(residuals[step]).mean().item(), 0.8 * weight + 0.2
            assert seen[step] == pytest.approx(model.losses[step], rel=1e-6)
        assert anchor.target.item() == pytest.approx(ema / weight, rel=1e-5)
        for step in range(5, 20):
            penalty = (s(residuals[step]) - ema / weight).square().mean().item()
            assert seen[step] == pytest.approx(model.losses[step] + 0.7 * penalty, rel=1e-4)
        model.eval()
        with torch.no_grad():
            batches = [nn.functional.cross_entropy(model(x), y).item() for x, y in model.val_dataloader()]
        fresh = len(model.validation)
        L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False).validate(model, verbose=False)
        assert model.validation[fresh:] == pytest.approx(batches, rel=1e-5)
        assert "training_step" not in vars(model)  # given back as it was
        residuals.clear()


def test_gradient_accumulation_gives_the_same_scalars_and_target(tmp_path):
    class Batched(Classifier):
        batch_size = 8

        def train_dataloader(self):
            data = super().train_dataloader().dataset
            return torch.utils.data.DataLoader(data, batch_size=self.batch_size)

    results = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model = Batched()
        model.batch_size = 16 // accumulate
        taper(model, ["encoder.layers.*"])
        anchor = ScaleAnchor("encoder.norm")
        fit(tmp_path, [GateSchedule(5, 15), AlignmentFreeze(), anchor], model, accumulate_grad_batches=accumulate)
        results.append([anchor.target.item(), *(norm.alignment.item() for norm in tapered_norms(model).values())])
        assert sorted(set(model.gates), reverse=True) == sorted(set(model.gates[::accumulate]), reverse=True)
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_an_idle_branch_neither_decays_nor_gathers_moments(tmp_path):
    seen = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            norm = next(iter(tapered_norms(pl_module).values()))
            state = trainer.optimizers[0].state
            seen[trainer.global_step] = (
                norm.taper_weight.detach().clone(), norm.weight.detach().clone(),
                "exp_avg" in state.get(norm.taper_weight, {}), state[norm.weight]["exp_avg"].clone(),
            )  # fmt: skip

    fit(tmp_path, [GateSchedule(0.25, 0.75), AlignmentFreeze(), Watch()])
    for step in range(1, 6):  # warm-up: the linear branch is idle
        assert torch.equal(seen[step][0], torch.ones(16))
        assert not seen[step][2]
    assert seen[6][2]
    for step in range(15, 20):  # the gate is closed: the norm branch is idle
        assert torch.equal(seen[step][1], seen[14][1])
        assert torch.equal(seen[step][3], seen[14][3])
        assert not torch.equal(seen[step][0], seen[step + 1][0])


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        ([GateSchedule()], {}, "GateSchedule without AlignmentFreeze"),
        ([AlignmentFreeze()], {}, "AlignmentFreeze needs to know when to freeze"),
        ([ScaleAnchor("encoder.norm")], {}, "ScaleAnchor needs to know when to freeze"),
        ([GateSchedule(), AlignmentFreeze(), ScaleAnchor("final")], {}, "no module 'final' in Classifier"),
        ([GateSchedule(warmup=30), AlignmentFreeze()], {}, "longer than the run's 20"),
        ([GateSchedule(warmup=15, end=0.5), AlignmentFreeze()], {}, "ends at step 10, not after its warm-up of 15"),
        ([GateSchedule(warmup=0), AlignmentFreeze()], {}, "no steps before its boundary"),
        ([GateSchedule(), AlignmentFreeze()], {"steps": -1, "max_epochs": 2}, "set trainer.max_steps"),
        ([TaperMonitor(residual="nowhere")], {}, "no module 'nowhere'"),
    ],
)
def test_mistakes_are_told_before_the_first_step(tmp_path, callbacks, options, message):
    torch.manual_seed(0)
    model = Classifier()
    taper(model, ["encoder.layers.*"])
    with pytest.raises(TaperlitError, match=message):
        fit(tmp_path, callbacks, model, **options)
    assert not model.losses


@pytest.mark.parametrize("callback", [GateSchedule(), AlignmentFreeze(at=2), FoldOnEnd("x")])
def test_a_model_without_tapernorm_is_told_so(tmp_path, callback):
    with pytest.raises(TaperlitError, match="found no TaperNorm in Classifier"):
        fit(tmp_path, [callback], Classifier())


def test_an_anchor_that_never_runs_is_told_so(tmp_path):
    model = Classifier()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(TaperlitError, match="'unused' did not run"):
        fit(tmp_path, [ScaleAnchor("unused", at=3)], model)
    assert "training_step" not in vars(model)


def test_arguments_out_of_range():
    for build in (
        lambda: GateSchedule(shape="step"),
        lambda: ScaleAnchor("x", weight=-1),
        lambda: ScaleAnchor("x", ema_rate=0),
        lambda: TaperMonitor(every=0),
    ):
        with pytest.raises(TaperlitError):
            build()


def test_each_alone(tmp_path):
    model, _ = fit(tmp_path, [AlignmentFreeze(at=3)])
    assert all(norm.alignment != 1 for norm in tapered_norms(model).values())
    model, _ = fit(tmp_path, [ScaleAnchor("encoder.norm", at=0.5)], Classifier())  # a plain model, no taper at all
    model, _ = fit(tmp_path, [TaperMonitor(every=1)], Classifier())
    assert len(model.losses) == 20


def test_fold_says_why_not(tmp_path):
    with pytest.warns(UserWarning, match="Not folded: The gate is 1, not 0"):
        fit(tmp_path, [FoldOnEnd(str(tmp_path / "folded"))])
    assert not (tmp_path / "folded").exists()


def test_a_half_precision_model_is_folded_in_float32(tmp_path):
    callbacks = [GateSchedule(0.25, 0.75), AlignmentFreeze(), FoldOnEnd(str(tmp_path / "folded"))]
    fit(tmp_path, callbacks, precision="bf16-true")
    weights = load_file(tmp_path / "folded/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_fold_needs_an_example_and_a_free_directory(tmp_path):
    model = Classifier()
    taper(model)
    model.example_input_array = None
    with pytest.raises(TaperlitError, match=r"set self\.example_input_array"):
        fit(tmp_path, [FoldOnEnd(str(tmp_path / "folded"))], model)
    (tmp_path / "folded").mkdir()
    with pytest.raises(TaperlitError, match="folded exists"):
        fit(tmp_path, [FoldOnEnd(str(tmp_path / "folded"))])


def test_a_resumed_run_keeps_its_boundaries(tmp_path):
    gate = GateSchedule(0.25, 0.75)
    model, trainer = fit(tmp_path, [gate, AlignmentFreeze()])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = GateSchedule(0.25, 0.75)
    model, _ = fit(tmp_path, [again, AlignmentFreeze()], steps=40, resume=tmp_path / "end.ckpt")
    assert set(model.gates) == {0.0}
    assert shared_gate(model).phase is Phase.LINEAR


def test_the_readmes_lines_run_as_they_stand(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0].replace("10_000", "20")
    monkeypatch.chdir(tmp_path)
    exec(code, {"MyEncoder": Classifier, "datamodule": Classifier().train_dataloader()})
    assert (tmp_path / "folded/model.safetensors").exists()
