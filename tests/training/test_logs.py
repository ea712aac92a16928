"""A run that was interrupted and goes on in its folder has the logs of one that nothing disturbed."""

import csv
import os
import signal
from collections import Counter

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from taperlit.callbacks import RunCheckpoint
from taperlit.callbacks.checkpoint import Stopped
from taperlit.training.lightning_compat import logged_step
from taperlit.training.logs import LoggedOnce, _records
from taperlit.training.trainer import Trainer

STEPS, EPOCH, VALIDATES = 14, 6, 3  # steps; of an epoch; between validations


@pytest.fixture(autouse=True)
def _answers_ctrl_c():
    """A shell's background jobs, of which these tests may be one, begin with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.save_hyperparameters({"width": 3})

    def training_step(self, batch, batch_idx):
        # Not the batch: torch's own loader cannot go on where it was.
        loss = self.layer(torch.full((2, 3), 0.1 * self.trainer.global_step)).square().mean()
        self.log("train/loss", loss)
        for logger in self.loggers:
            logger.log_metrics({"own": loss.item()}, step=self.trainer.global_step)  # as TaperMonitor does
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Disturb(L.Callback):
    """After a step, raise an error (nothing is saved) or send a signal (the step is saved)."""

    def __init__(self, at, signum):
        self.at, self.signum = at, signum

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.at and self.signum is None:
            raise ConnectionError

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.at and self.signum is not None:
            os.kill(os.getpid(), self.signum)


class InValidation(Disturb):
    def on_validation_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.at:
            os.kill(os.getpid(), self.signum)

    def on_train_batch_end(self, *_):
        pass


def run(folder, kind, *callbacks, goes_on=False, steps=STEPS, **options):
    """A process's part of the run."""
    loggers = [kind(folder, name="run", version=0)]
    rows = torch.arange(6.0 * EPOCH).view(-1, 3) / 30
    extra = [LoggedOnce(loggers)] if goes_on else []
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=loggers, log_every_n_steps=1,
        val_check_interval=VALIDATES, callbacks=[*extra, *callbacks, RunCheckpoint(**options)],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loaders = [torch.utils.data.DataLoader(rows, batch_size=2), torch.utils.data.DataLoader(rows[:4], batch_size=2)]
    trainer.fit(Model(), *loaders, ckpt_path="last" if goes_on else None, weights_only=True if goes_on else None)
    return trainer


def logged(folder, kind):
    """All numbers in all files, with how often each is there."""
    here = folder / "run/version_0"
    if kind is CSVLogger:
        with open(here / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        cells = [(tag, int(row["step"]), float(cell)) for row in rows for tag, cell in row.items() if cell]
        return Counter(cell for cell in cells if cell[0] != "step")
    events = [event for path in here.glob("events.*") for _, event in _records(path)]
    values = [(value, event.step) for event in events for value in event.summary.value]
    return Counter(
        (value.tag, step, value.simple_value or tuple(value.tensor.float_val))
        for value, step in values
        if not value.tag.startswith("_hparams_")
    )


CASES = {
    "an error between validations": Disturb(8, None),
    "an error before the first checkpoint": Disturb(2, None),
    "an error after an epoch's end": Disturb(7, None),
    "stopped after a step": Disturb(8, signal.SIGTERM),
    "stopped after an epoch's last step": Disturb(6, signal.SIGTERM),
    "interrupted after a step": Disturb(4, signal.SIGINT),
    "stopped in a validation": InValidation(9, signal.SIGTERM),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp("undisturbed") for kind in (TensorBoardLogger, CSVLogger)}
    for kind, folder in folders.items():
        run(folder, kind)
    return {kind: logged(folder, kind) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
@pytest.mark.parametrize("case", CASES)
def test_each_number_is_there_once(tmp_path, undisturbed, kind, case):
    with pytest.raises((ConnectionError, Stopped)):
        run(tmp_path, kind, CASES[case])
    run(tmp_path, kind, goes_on=True)
    found, expected = logged(tmp_path, kind), undisturbed[kind]
    if kind is CSVLogger:  # a row of its own for the validation that was done again, with the epoch as in every row
        found, expected = (Counter({k: n for k, n in c.items() if k[0] != "epoch"}) for c in (found, expected))
    assert found == expected
    assert set(expected.values()) == {1}
    assert {step for tag, step, _ in expected if tag == "train/loss"} == set(range(STEPS))
    assert {step for tag, step, _ in expected if tag == "val/loss"} == {2, 5, 8, 11}


def test_a_checkpoint_saved_after_a_step_is_not_without_its_numbers(tmp_path):
    seen = []

    class Look(L.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            numbers = logged(tmp_path, TensorBoardLogger)
            seen.append({(tag, step) for tag, step, _ in numbers if step == logged_step(trainer)})

    run(tmp_path, TensorBoardLogger, Look(), steps=2, every_n_train_steps=1, monitor=None)
    assert len(seen) >= 2
    assert all({tag for tag, _ in tags} >= {"train/loss", "own", "epoch"} for tags in seen[:2])


def test_what_a_killed_process_cut_short_is_left_out(tmp_path):
    folder = tmp_path / "run/version_0"
    run(tmp_path, TensorBoardLogger, steps=2)
    (path,) = folder.glob("events.*")
    whole = list(_records(path))
    path.write_bytes(path.read_bytes()[:-3])
    assert [record for record, _ in _records(path)] == [record for record, _ in whole[:-1]]
