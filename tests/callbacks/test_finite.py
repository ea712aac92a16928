"""The guard on a model of somebody else's."""

import lightning as L
import pytest
import torch
from torch import nn

from taperlit import AlignmentFreeze, GateSchedule, ScaleAnchor, taper
from taperlit.callbacks import FiniteGuard, RunCheckpoint
from taperlit.callbacks.finite import PHASES
from taperlit.errors import TaperlitError
from taperlit.norm import Phase
from taperlit.training.trainer import Trainer


class Net(L.LightningModule):
    """A regression whose layers can be told to go wrong at a step."""

    def __init__(self, bad=None, step=0, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 8)
        self.last, self.dropout = nn.Linear(8, 1), nn.Dropout(dropout)
        taper(self)
        self.bad, self.step, self.batches = bad, step, []

    def forward(self, x):
        bad = self.bad if self.training and self.global_step + 1 == self.step else None
        h = self.norm(self.first(x))
        h = self.second(h * float("nan") if bad == "forward" else h)
        if bad == "backward":
            h.register_hook(lambda grad: grad * float("inf"))
        return self.last(self.dropout(h))

    def training_step(self, batch, batch_idx):
        self.batches.append(batch_idx)
        loss = self(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data():
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(48, 4, generator=torch.Generator().manual_seed(1))), batch_size=4
    )


def fit(tmp_path, model, *callbacks, steps=12, trainer=L.Trainer, ckpt_path=None, **options):
    run = trainer(
        max_steps=steps, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[GateSchedule(4, 8), AlignmentFreeze(), *callbacks],
        enable_checkpointing=any(isinstance(c, RunCheckpoint) for c in callbacks), **options,
    )  # fmt: skip
    run.fit(model, data(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return run


@pytest.mark.parametrize(
    ("bad", "step", "words"),
    [
        ("forward", 3, ["step 3 (in the warm-up, gate 1)", "the loss", "began in second"]),
        ("forward", 6, ["step 6 (in the taper, gate 0.5)", "the loss", "began in second"]),
        ("backward", 10, ["step 10 (after the taper, gate 0)", "the gradient", "began in second.bias"]),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_names_step_phase_and_layer(tmp_path, bad, step, words, accumulate):
    model = Net(bad, step)
    with pytest.raises(TaperlitError) as error:
        fit(tmp_path, model, FiniteGuard(), accumulate_grad_batches=accumulate)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert model.global_step == step - 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_it_leaves_a_sound_run_alone(tmp_path):
    runs = [Net(), Net()]
    fit(tmp_path, runs[0])
    fit(tmp_path, runs[1], FiniteGuard())
    for mine, theirs in zip(*(model.state_dict().values() for model in runs), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bad", ["forward", "backward"])
@pytest.mark.parametrize("step", [2, 6, 11])
def test_skipping_leaves_everything_as_it_was(tmp_path, bad, step):
    guard, anchor = FiniteGuard(skip=True), ScaleAnchor("last")
    states = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            optimizer = trainer.optimizers[0].state_dict()["state"]
            moments = [value.clone() for state in optimizer.values() for value in state.values()]
            weights = [value.clone() for key, value in pl_module.state_dict().items() if "gate" not in key]
            states.append([*moments, *weights, anchor._ema.clone()])

    fit(tmp_path, Net(bad, step), guard, anchor, Watch())
    assert guard.skipped == 1
    assert guard.state_dict() == {"skipped": 1}
    before, after = states[step - 2], states[step - 1]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, states[step], strict=True))  # and then it goes on
    assert all(value.isfinite().all() for value in states[-1])


def test_skipping_without_end_stops(tmp_path):
    class Always(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("inf")

    guard = FiniteGuard(skip=True, patience=3)
    with pytest.raises(TaperlitError, match=r"step 4 .*for 4 steps in a row"):
        fit(tmp_path, Always(), guard)
    assert guard.skipped == 3
    with pytest.raises(TaperlitError, match="patience is 0"):
        FiniteGuard(patience=0)


def test_the_advice_is_to_go_on_only_from_what_there_is(tmp_path):
    """Before the first checkpoint there is nothing to resume; a run that itself goes on has the one it came from."""

    def advice(step, **options):
        keep = RunCheckpoint(dirpath=tmp_path / "kept", monitor=None, every_n_train_steps=4)
        with pytest.raises(TaperlitError) as error:
            fit(tmp_path, Net("forward", step), FiniteGuard(), keep, trainer=Trainer, **options)
        return str(error.value)

    assert "No checkpoint was saved yet: begin again" in advice(3)
    assert not (tmp_path / "kept").exists()
    assert "The last good checkpoint is kept: resume it" in advice(7)
    assert "The last good checkpoint is kept: resume it" in advice(6, ckpt_path=tmp_path / "kept/last.ckpt")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    class Spoil(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 8:
                with torch.no_grad():
                    pl_module.second.weight[0, 0] = float("inf")

    keep = RunCheckpoint(dirpath=tmp_path / "kept", monitor=None, filename="only", every_n_train_steps=4)
    with pytest.raises(TaperlitError, match=r"step 8 .* weights of second\.weight are not finite"):
        fit(tmp_path, Net(), FiniteGuard(), Spoil(), keep, trainer=Trainer)
    for name in ("only.ckpt", "last.ckpt"):
        assert torch.load(tmp_path / "kept" / name, weights_only=True)["global_step"] == 4


def test_every_phase_has_words():
    assert set(PHASES) == set(Phase)
