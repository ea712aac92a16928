"""The private parts of Lightning still do what our functions say of them."""

import csv
import os
import signal

import lightning as L
import pytest
import torch
from torch import nn

import taperlit.callbacks.checkpoint as checkpoint
from taperlit.callbacks import RunCheckpoint
from taperlit.callbacks.checkpoint import Stopped
from taperlit.training.lightning_compat import should_accumulate, should_log, validates_next
from taperlit.training.trainer import Trainer


class Toy(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.validated = []

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated.append((self.trainer.global_step, self.trainer.sanity_checking))
        self.log("val/loss", self.layer(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches):
    return torch.utils.data.DataLoader(torch.ones(2 * batches, 3), batch_size=2)


def trainer(folder, callbacks, **options):
    return Trainer(
        accelerator="cpu", callbacks=callbacks, default_root_dir=folder, enable_progress_bar=False,
        **{"logger": False, "enable_model_summary": False, "enable_checkpointing": False, **options},
    )  # fmt: skip


def test_accumulating_logging_and_validating(tmp_path):
    seen = []

    class Watch(L.Callback):
        steps = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            stepped, self.steps = trainer.global_step > self.steps, trainer.global_step
            seen.append([stepped, should_accumulate(trainer), should_log(trainer), validates_next(trainer)])

        def on_validation_start(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen[-1].append("validated")

    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    fit = trainer(
        tmp_path, [Watch()], accumulate_grad_batches=3, max_epochs=2, val_check_interval=4, log_every_n_steps=2,
        logger=logger,
    )  # fmt: skip
    fit.fit(Toy(), loader(8), loader(2))
    assert len(seen) == 16
    assert [not accumulates for _, accumulates, *_ in seen] == [stepped for stepped, *_ in seen]
    # by three, and at the epoch's last batch
    assert [stepped for stepped, *_ in seen] == [False, False, True, False, False, True, False, True] * 2
    assert [validates for _, _, _, validates, *_ in seen] == [len(row) == 5 for row in seen]
    assert sum(len(row) == 5 for row in seen) == 4
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]
    steps = 0
    expected = []
    for stepped, _, logs, *_ in seen:
        expected += [steps] if logs and stepped else []
        steps += stepped
    assert sorted(set(logged)) == sorted(set(expected))


def stopping(at):
    class Signal(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            if len(pl_module.validated) == at:
                os.kill(os.getpid(), signal.SIGTERM)

    return Signal()


def stopped(tmp_path, at):
    module = Toy()
    fit = trainer(
        tmp_path, [RunCheckpoint(), stopping(at)], enable_checkpointing=True, max_steps=6, val_check_interval=3
    )
    with pytest.raises(Stopped) as stop:
        fit.fit(module, loader(10), loader(5))
    return module, stop.value


def test_a_stop_says_what_is_saved_and_ends_a_process_with_143(tmp_path):
    module, stop = stopped(tmp_path, 0)
    assert module.validated == [(0, True)]
    assert (stop.checkpoint, stop.code) == (None, 143)
    module, stop = stopped(tmp_path, 3)
    assert module.validated == [(0, True)] * 2 + [(3, False)] * 2
    assert stop.checkpoint == str(tmp_path / "checkpoints/last.ckpt")
    assert stop.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("batches", "ends"), [([5.0, 4.0], 2), ([5.0, 1.0], 5)])
def test_processes_agree_only_while_all_of_them_validate(tmp_path, monkeypatch, batches, ends):
    monkeypatch.setattr(checkpoint, "gather", lambda mine: batches if mine == 5.0 else [mine])
    module = Toy()
    fit = trainer(
        tmp_path, [RunCheckpoint(), stopping(1)], enable_checkpointing=True, max_steps=6, val_check_interval=3,
        num_sanity_val_steps=0,
    )  # fmt: skip
    with pytest.raises(Stopped):
        fit.fit(module, loader(10), loader(5))
    assert len(module.validated) == ends
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == (3 if ends == 2 else 4)


def test_an_interrupted_last_validation_is_done_before_the_run_ends(tmp_path):
    module, _ = stopped(tmp_path, 2 + 5 + 1)  # sanity check, the pass after step 3, one batch of the last
    assert module.validated[-2:] == [(6, False)] * 2
    ended = []

    class End(L.Callback):
        def on_train_end(self, trainer, pl_module):
            ended.append(trainer.global_step)

    again = Toy()
    fit = trainer(tmp_path, [RunCheckpoint(), End()], enable_checkpointing=True, max_steps=6, val_check_interval=3)
    for _ in range(2):  # and not once more
        fit.fit(again, loader(10), loader(5), ckpt_path="last", weights_only=True)
        assert again.validated == [(6, False)] * 5
        assert ended == [6]
