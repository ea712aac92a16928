"""Every private part of Lightning that this package touches, each behind a function or class of ours.

Checked against Lightning 2.6.6: where Lightning changes, this file does, and no other. Each docstring names the private
part and says why no public one will do.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.progress.tqdm_progress import _update_n
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from tqdm import tqdm

# ---- what callbacks and modules ask


def should_accumulate(trainer: L.Trainer) -> bool:
    """Whether the batch under way only adds its gradients, the optimizer's step being a later batch's.

    ``FitLoop._should_accumulate``: no public attribute tells of an epoch's last batch, which always steps.
    """
    return trainer.fit_loop._should_accumulate()


def should_log(trainer: L.Trainer) -> bool:
    """Whether what is logged in the step under way reaches the loggers, by ``log_every_n_steps``.

    ``_LoggerConnector.should_update_logs``: so that what is costly to measure is measured for those steps alone.
    """
    return trainer._logger_connector.should_update_logs


def logged_step(trainer: L.Trainer) -> int:
    """The number under which loggers get what is logged in the training step under way.

    ``TrainingEpochLoop._batches_that_stepped``: the public ``global_step`` counts every optimizer of manual
    optimization.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def compute_dtype(plugin: Precision) -> torch.dtype:
    """The dtype that matrices are multiplied in, which a device's peak FLOPs depend on.

    ``throughput_monitor._plugin_to_compute_dtype``: no precision plugin tells it publicly.
    """
    return _plugin_to_compute_dtype(plugin)


def before_next_batch(trainer: L.Trainer, function: Callable[[], None]) -> None:
    """Have a function called when the next training batch is about to be fetched; ask in ``on_train_start``.

    ``FitLoop._data_fetcher``: between the hooks, in which anyone may draw random numbers, and the fetch there is none.
    An iterator that Lightning makes anew after this does not call it.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    assert fetcher.iterator is not None
    fetcher.iterator = _Announced(fetcher.iterator, function)


class _Announced:
    def __init__(self, iterator: Iterator[Any], function: Callable[[], None]) -> None:
        self.iterator, self.function = iterator, function

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        function, self.function = self.function, lambda: None
        function()
        return next(self.iterator)


def update_bar(bar: tqdm, n: int) -> None:
    """Move a progress bar of Lightning's to ``n`` and redraw it.

    ``tqdm_progress._update_n``: what Lightning's own bars do, which leaves a bar that is switched off alone.
    """
    _update_n(bar, n)


# ---- logs and signals


class LoggerConnector(_LoggerConnector):
    """Lightning's, but a step's numbers can be sent before its end, and none is sent twice.

    ``update_train_step_metrics`` sends them after ``on_train_batch_end``, in which checkpoints are saved: a run that
    ends there would never log the step, as the one that goes on begins with the next. ``log_metrics`` adds the epoch's
    number to every call, so that a step with a validation has it twice.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__(trainer)
        self._sent: tuple[int, dict[str, Any]] = (-1, {})  # the step, and what was sent for it

    @classmethod
    def replace(cls, trainer: L.Trainer) -> None:
        """Put it into a trainer in place of Lightning's; ``Trainer`` makes its connectors itself."""
        trainer._logger_connector = cls(trainer)

    def reset_metrics(self) -> None:
        """Begin a fit or another run."""
        super().reset_metrics()
        self._sent = (-1, {})

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Send what is not sent yet; numbers with steps of their own are sent as they come."""
        if step is not None or "step" in metrics or not metrics:
            super().log_metrics(metrics, step)
            return
        now = logged_step(self.trainer)
        sent = self._sent[1] if self._sent[0] == now else {}
        given = convert_tensors_to_scalars({"epoch": self.trainer.current_epoch, **metrics})
        self._logged_metrics.update(metrics)
        super().log_metrics({k: v for k, v in given.items() if k not in sent or not _same(sent[k], v)}, now)
        self._sent = (now, sent | given)


def _same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)  # NaN too


def log_step_now(trainer: L.Trainer) -> None:
    """Let the loggers write the training step under way; ask in ``on_train_batch_end``.

    With Lightning's own connector, which would send it again, only what callbacks have sent is written.
    """
    if isinstance(trainer._logger_connector, LoggerConnector):
        trainer._logger_connector.update_train_step_metrics()
    for logger in trainer.loggers:
        logger.save()


def create_csv_writer(logger: CSVLogger, header: Sequence[str]) -> None:
    """Let the logger make its writer now, and write to the table that will be there, which has these columns.

    ``metrics_keys``: the writer deletes the table of an earlier process, and knows its columns from what it writes.
    """
    logger.experiment.metrics_keys = list(header)  # type: ignore[attr-defined]


class SignalConnector(_SignalConnector):
    """Lightning's, but where SIGTERM has a handler, that stays.

    ``register_signal_handlers`` puts one around it that starts a collective operation, in which processes that were not
    told, or are somewhere else, hang.
    """

    @classmethod
    def replace(cls, trainer: L.Trainer) -> None:
        """Put it into a trainer in place of Lightning's; ``Trainer`` makes its connectors itself."""
        trainer._signal_connector = cls(trainer)

    def register_signal_handlers(self) -> None:
        """Listen, from here to the run's end."""
        before = signal.getsignal(signal.SIGTERM)
        super().register_signal_handlers()
        if callable(before):
            self._register_signal(signal.SIGTERM, before)


def stop_launched(trainer: L.Trainer, signum: int) -> None:
    """Send a signal to the processes that this one has launched; those of torchrun and SLURM are not its own.

    ``strategy.launcher``: Lightning lets them be until they notice that the first has gone, which may take minutes.
    """
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        trainer.strategy.launcher.kill(signum)


# ---- checkpoints


def dump_checkpoint(trainer: L.Trainer, weights_only: bool | None) -> dict[str, Any]:
    """All that ``Trainer.save_checkpoint`` would write.

    ``_CheckpointConnector.dump_checkpoint``: the public method writes it as well, to a place that we choose ourselves.
    """
    return trainer._checkpoint_connector.dump_checkpoint(weights_only)


def writes_one_file(strategy: Strategy) -> bool:
    """Whether a checkpoint is what the first process writes through its ``checkpoint_io``, and nothing else.

    ``Strategy.save_checkpoint``: it is public, but nothing public says which strategies have one of their own.
    """
    return type(strategy).save_checkpoint is Strategy.save_checkpoint


def validates_next(trainer: L.Trainer) -> bool:
    """Whether a validation pass follows the training batch under way; ask in ``on_train_batch_end``.

    ``TrainingEpochLoop._should_check_val_fx``: the public options, of which there are five, only imply it.
    """
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    return fetcher is not None and trainer.enable_validation and loop.epoch_loop._should_check_val_fx(fetcher)


def repeat_validation(checkpoint: dict[str, Any]) -> None:
    """Let the run that resumes from this checkpoint begin with the validation pass that was under way, from its start.

    The state of the loops, which has no public form: a pass counts as unfinished when one of its batches has been
    started and not processed, and goes on after the last completed one, of which there is none here. As it was saved,
    Lightning would take the pass for done and leave it out.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    before = progress["total"]["completed"] - progress["current"]["completed"]
    progress["total"] |= {"ready": before + 1, "started": before + 1, "processed": before, "completed": before}
    progress["current"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress["is_last_batch"] = False


class FitLoop(_FitLoop):
    """Lightning's, but a run whose last validation was interrupted does that before it ends.

    ``_FitLoop.done`` (and ``skip``, which asks it) counts steps, finds that none is left, and would leave out the
    validation and all that callbacks do at the end.
    """

    @classmethod
    def replace(cls, trainer: L.Trainer) -> None:
        """Put it into a trainer in place of Lightning's; ``Trainer`` makes its loops itself."""
        theirs = trainer.fit_loop
        loop = cls(trainer, min_epochs=theirs.min_epochs, max_epochs=theirs.max_epochs)
        loop.epoch_loop = theirs.epoch_loop
        trainer.fit_loop = loop

    @property
    def done(self) -> bool:
        """Whether no step is left, and no validation."""
        return not self._owes_validation() and super().done

    def _owes_validation(self) -> bool:
        loop = self.epoch_loop.val_loop
        total = loop.batch_progress.total
        return loop.restarting and (total.started > total.processed or loop.restarted_mid_evaluation)

    def reset(self) -> None:
        """Begin a run; the batch that :func:`repeat_validation` said was started is not counted twice."""
        super().reset()
        total = self.epoch_loop.val_loop.batch_progress.total
        total.ready = total.started = total.processed


def checkpoint_directory(callback: ModelCheckpoint, loggers: Sequence[Logger], root: str) -> Path:
    """Where a ModelCheckpoint of a run with these loggers and this ``default_root_dir`` saves.

    ``__resolve_ckpt_dir``, which asks a trainer for no more than these two: ``dirpath`` is None until the fit begins.
    """
    trainer = SimpleNamespace(loggers=loggers, default_root_dir=root)
    return Path(callback._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]


class CheckpointCallback(ModelCheckpoint):
    """``ModelCheckpoint`` with public names for the parts that ``RunCheckpoint`` needs."""

    @property
    def saved_at(self) -> int:
        """The optimizer step of the newest checkpoint of this fit; 0 before the first.

        ``_last_global_step_saved``.
        """
        return self._last_global_step_saved

    def forget(self, everything: bool) -> None:
        """Let a fit begin with nothing saved; and, if it begins with everything anew, with no scores and paths.

        ``_last_global_step_saved`` and what else the constructor sets: Lightning sets it there alone, so that a second
        fit would take its steps for saved ones.
        """
        self._last_global_step_saved, self._defer_save_until_validation = 0, False
        if not everything:
            return
        self._last_checkpoint_saved = ""
        self.best_k_models = {}
        self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.best_model_score = self.current_score = None
        self.kth_best_model_path = self.best_model_path = self.last_model_path = ""

    def save_last_now(self, trainer: L.Trainer) -> None:
        """Save ``last.ckpt``, if ``save_last`` asks for one; every process must ask.

        ``_save_last_checkpoint`` and ``_monitor_candidates``: Lightning saves it at moments of its own only.
        """
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def before_saving(self, trainer: L.Trainer) -> None:
        """Called on every process when a checkpoint is about to be saved."""

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        # Lightning asks in all places but the end of training, where it would write over a run's last.ckpt.
        if not trainer.fast_dev_run:
            super()._save_last_checkpoint(trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.before_saving(trainer)
        super()._save_checkpoint(trainer, filepath)

    def before_last_is_sought(self, directory: Path) -> None:
        """Called when Lightning is about to look for ``ckpt_path="last"`` in the directory."""

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        self.before_last_is_sought(checkpoint_directory(self, trainer.loggers, trainer.default_root_dir))
        return super()._find_last_checkpoints(trainer)


# ---- the command line


class CLI(LightningCLI):
    """LightningCLI with public names for two of its parts."""

    @property
    def command_parser(self) -> LightningArgumentParser:
        """The parser of the command that runs.

        ``_parser``: ``parser`` knows the options by command only.
        """
        return self._parser(self.subcommand)

    def after_parsing(self) -> None:
        """Called once ``self.config`` is parsed, and before the seed is set.

        In place of ``_parse_ckpt_path``, which would load any checkpoint unchecked and put its hyper-parameters over
        the user's.
        """

    def _parse_ckpt_path(self) -> None:
        self.after_parsing()


def model_options(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the LightningModule that a checkpoint is of.

    ``_instantiator``: LightningCLI puts a name of its own among them.
    """
    return {name: value for name, value in checkpoint["hyper_parameters"].items() if name != "_instantiator"}


def slurm_checkpoint(trainer: L.Trainer) -> str | None:
    """The checkpoint that SLURM's requeueing left, which Lightning resumes unasked.

    ``_CheckpointConnector._hpc_resume_path``: Lightning finds it when the fit begins, too late to look into it before.
    """
    return trainer._checkpoint_connector._hpc_resume_path if SLURMEnvironment.detect() else None


def begins_a_new_version(logger: Logger) -> bool:
    """Whether the logger will number a new folder for its run.

    ``_version``: the public ``version`` already picks the number.
    """
    return getattr(logger, "_version", "") is None


def given_name(logger: Logger, name: str) -> object:
    """What a logger was given as ``version`` or ``sub_dir``; None where it has no such part or was given none.

    ``_version``, ``_sub_dir``: the public ``version`` would pick a number.
    """
    return getattr(logger, f"_{name}", None)


def continue_version(logger: TensorBoardLogger | CSVLogger, version: int) -> None:
    """Let the logger go on in the folder ``version_<version>``.

    ``_version``: it can only be given to the constructor, and the logger is there before the checkpoint is found.
    """
    logger._version = version
