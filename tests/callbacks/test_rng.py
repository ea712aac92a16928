"""A resumed run draws what the run would have drawn."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from taperlit.callbacks import RngState


class Noisy(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.draws = []

    def training_step(self, batch, batch_idx):
        self.draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return nn.functional.dropout(self.layer(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, seed, steps, callback, ckpt_path=None):
    L.seed_everything(seed, verbose=False)
    model = Noisy()
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[callback] if callback else [],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.ones(40, 4), batch_size=4, shuffle=True)  # draws from torch's generator
    trainer.fit(model, loader, ckpt_path=ckpt_path, weights_only=ckpt_path and True)
    trainer.save_checkpoint(tmp_path / f"{seed}-{steps}.ckpt")
    return model


@pytest.mark.parametrize("with_it", [True, False])
def test_draws_go_on(tmp_path, with_it):
    whole = fit(tmp_path, 1, 8, RngState() if with_it else None)
    fit(tmp_path, 1, 3, RngState() if with_it else None)
    again = fit(tmp_path, 2, 8, RngState() if with_it else None, tmp_path / "1-3.ckpt")
    assert (again.draws == whole.draws[3:]) == with_it
    assert torch.equal(again.layer.weight, whole.layer.weight) == with_it


class Augmented(torch.utils.data.Dataset):
    """Draws from each generator for each row."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item(), 1.0])


class Save(L.Callback):
    """Saves in a hook after a step."""

    def __init__(self, hook, step, path):
        setattr(self, hook, lambda trainer, *_: trainer.global_step == step and trainer.save_checkpoint(path))

    def on_train_start(self, trainer, *_):
        torch.rand(3)  # as any callback may, also after the generators' own


@pytest.mark.parametrize(
    ("hook", "step", "shuffle", "options"),
    [
        ("on_train_batch_end", 2, False, {}),
        ("on_validation_end", 2, False, {"val_check_interval": 2}),
        ("on_train_batch_end", 4, True, {"limit_val_batches": 0}),  # an epoch's end
        ("on_train_epoch_end", 4, True, {"limit_val_batches": 0}),
        ("on_validation_end", 4, True, {}),
    ],
)
def test_augmentation_goes_on(tmp_path, hook, step, shuffle, options):
    class Watched(Noisy):
        def training_step(self, batch, batch_idx):
            self.draws.append(batch.tolist())
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            pass

    def run(seed, *callbacks, ckpt_path=None):
        L.seed_everything(seed, verbose=False)
        model = Watched()
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=[RngState(), *callbacks], num_sanity_val_steps=0, **options,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(Augmented(), batch_size=4, shuffle=shuffle)
        validation = torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=4)
        trainer.fit(model, loader, validation, ckpt_path=ckpt_path, weights_only=ckpt_path and True)
        return model

    whole = run(1, Save(hook, step, tmp_path / "at.ckpt"))
    again = run(2, Save(hook, -1, None), ckpt_path=tmp_path / "at.ckpt")
    assert again.draws == whole.draws[2 * step :]  # of the batch and of the step
    assert torch.equal(again.layer.weight, whole.layer.weight)


def test_another_number_of_processes_stays_as_seeded(tmp_path):
    saved = RngState().state_dict()
    other = RngState()
    other.load_state_dict({"ranks": saved["ranks"] * 2})
    before = torch.get_rng_state()
    for hook in (other.on_train_start, other.on_train_epoch_start, other.on_train_batch_start):
        hook(None, None)
    assert torch.equal(torch.get_rng_state(), before)
