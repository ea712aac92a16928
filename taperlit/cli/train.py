"""``taperlit fit``, ``validate``, ``test`` and ``predict``: LightningCLI over our model and data."""

import contextlib
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from taperlit.callbacks.predictions import PredictionWriter
from taperlit.checkpoint.sizes import check_memory
from taperlit.cli.claim import claimed_folder
from taperlit.cli.options import OneLineErrors
from taperlit.cli.overlays import keep_fields, without_effect
from taperlit.cli.quiet import quiet
from taperlit.cli.resume import KEYWORDS, check, find_last, look_into
from taperlit.cli.signals import ToldToStop, how
from taperlit.cli.slots import SLOTS, add_slots, own_rates, settle, stays_off, turn_on, without_norms
from taperlit.cli.trainer_options import check_options
from taperlit.data import TextDataModule
from taperlit.errors import TaperlitError, Terminated
from taperlit.training.lightning_compat import CLI, given_name, model_options, slurm_checkpoint
from taperlit.training.logs import LoggedOnce
from taperlit.training.module import LanguageModel
from taperlit.training.source import Preset
from taperlit.training.trainer import Trainer


class TrainerParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with errors of one line, overlays of single fields, and options that turn a slot on."""

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As the parser's own."""
        return super().parse_args(turn_on(keep_fields(sys.argv[1:] if args is None else args)), *rest, **kwargs)


class RunRecord(SaveConfigCallback):
    """Saves the exact config and the tokenizer of a fit beside its logs, and the config in its checkpoints."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write ``tokenizer.json`` and ``config.yaml``; of a run that goes on, ``config.resumed.yaml``."""
        if stage != "fit":
            return
        directory = Path(trainer.log_dir or trainer.default_root_dir)  # every rank must ask: the answer is broadcast
        if self.config.get("ckpt_path") and (directory / self.config_filename).exists():
            self.config_filename = "config.resumed.yaml"
        self.plain = plain_options(self.parser, self.config)
        super().setup(trainer, pl_module, stage)
        if trainer.is_global_zero:
            (directory / "tokenizer.json").write_text(trainer.datamodule.tokenizer_json)

    def state_dict(self) -> dict[str, Any]:
        """The config as plain data, for a resumed run to compare its own with."""
        return {"config": self.plain}


def plain_options(parser: LightningArgumentParser, config: Any) -> dict[str, Any]:
    """A command's options as plain data: what its YAML would be read as, and None for slots that it leaves out."""
    options = yaml.safe_load(parser.dump(config, skip_none=False))
    return {**options, "taper": dict.fromkeys(SLOTS) | options["taper"]}


class TaperlitCLI(CLI):
    """LightningCLI over ``LanguageModel`` and ``TextDataModule`` with the run's callbacks in named slots."""

    def __init__(self, command: str, *args: Any, **kwargs: Any) -> None:
        self._command = command
        with contextlib.ExitStack() as self._held:  # until the command has run
            super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that runs, alone: the parsers of the others would take an eighth of its start."""
        return {self._command: CLI.subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options ``--taper.*``."""
        add_slots(parser)

    def after_parsing(self) -> None:
        """To evaluate a checkpoint, take the model's options from it, once it is known to be whole and harmless."""
        command = self.config.subcommand
        check_options(self.config[command])
        path = self.config[command].ckpt_path
        self.evaluated: dict[str, Any] | None = None
        if command != "fit" and path and path not in KEYWORDS:
            self.evaluated = look_into(path)
            self.config = self.parser.parse_object({command: {"model": model_options(self.evaluated)}}, self.config)

    def before_instantiate_classes(self) -> None:
        """Settle which callbacks run, so that the config saved with the run says it."""
        command = str(self.subcommand)
        options = self.config[command]
        if options.model.get("pretrained") and options.data.tokenizer is None:
            options.data.tokenizer = options.model.pretrained
        if options.weights_only is None:
            options.weights_only = True  # nothing in a checkpoint of ours needs code to be read
        if command == "predict" and options.return_predictions is None:
            options.return_predictions = False
        for line in without_norms(sys.argv[1:], options):
            rank_zero_info(line)
        settled = settle(options, command, own_rates(sys.argv[1:]))
        for slot in SLOTS:
            options.taper[slot] = None  # a value that is there would be merged with the settled one
        options.trainer.callbacks = None
        self.config = self.parser.parse_object({command: settled}, self.config)
        for slot in SLOTS.keys() - settled["taper"].keys():
            del self.config[command].taper[slot]

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer with the callbacks of the slots, and find the checkpoint that the command is to use."""
        command, options = str(self.subcommand), self.config_init[self.subcommand]
        config = options.trainer
        slots = [options.taper.get(slot) for slot in SLOTS]
        config.callbacks = [*config.callbacks, *(callback for callback in slots if callback is not None)]
        config.enable_model_summary = False  # it is among the callbacks, if it is wanted
        root = config.default_root_dir or os.getcwd()
        loggers = _loggers(config.logger, root)
        keyword = options.ckpt_path
        if keyword == "last":
            options.ckpt_path = find_last(loggers, config.callbacks, root)
        if command != "fit":
            # A number for a folder would be a run's, and its figures would come after the run's own.
            loggers = [logger for logger in loggers if not isinstance(logger, TensorBoardLogger | CSVLogger)]
        config.logger = loggers or False
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:  # Lightning's word on a strategy or device that there is not
            raise TaperlitError(" ".join(str(error).split())) from error
        _refuse_names_outside(trainer)
        if isinstance(self.model.source, Preset):
            with trainer.strategy.tensor_init_context():  # where and in what dtype the fit will build it
                check_memory(self.model.source.config)
        if keyword in (None, "hpc"):
            options.ckpt_path = slurm_checkpoint(trainer)
        if keyword == "best":
            raise TaperlitError(
                "--ckpt_path best is not looked for; name the file: best.ckpt beside the run's last.ckpt."
            )
        if keyword == "hpc" and options.ckpt_path is None:
            raise TaperlitError("--ckpt_path hpc: this config's runs have none; name the file.")
        if command == "fit":
            self._held.enter_context(claimed_folder(trainer))
            if keyword is not None:  # also where --ckpt_path last finds nothing yet, and begins again in the folder
                trainer.callbacks.insert(0, LoggedOnce(trainer.loggers))
        if options.ckpt_path is not None:
            _prepare_writers(options.ckpt_path, self._check_checkpoint(options.ckpt_path), config)
        elif command == "fit":
            self.config[command].ckpt_path = None  # the run begins: its record is not to go on with itself
        elif keyword is None:
            state = "untrained" if self.model.hparams.pretrained is None else "as it came"
            raise TaperlitError(f"{command} needs --ckpt_path, a checkpoint or last: without one the model is {state}.")
        else:
            raise TaperlitError(f"--ckpt_path {keyword}: this config's runs have no checkpoint yet; fit first.")
        return trainer

    def _check_checkpoint(self, path: str) -> dict[str, Any]:
        options = self.config[self.subcommand]
        plain = plain_options(self.command_parser, options) if self.subcommand == "fit" else None
        checkpoint = self.evaluated or look_into(path)
        check(path, checkpoint, self.model, plain)
        return checkpoint


def _loggers(given: Any, root: str) -> list[Logger]:
    """The loggers that Lightning would make of ``trainer.logger``."""
    if given is False:
        return []
    if given is None or given is True:
        return [TensorBoardLogger(root, name="lightning_logs", version=SLURMEnvironment.job_id())]
    return list(given) if isinstance(given, list) else [given]


def _refuse_names_outside(trainer: L.Trainer) -> None:
    """Names in a config name things in the output folder; only a folder's own option may say where that is."""
    names = {f"the logger's name {logger.name!r}": logger.name for logger in trainer.loggers if logger.name}
    for name, logger in itertools.product(("version", "sub_dir"), trainer.loggers):
        if isinstance(given := given_name(logger, name), str):
            names[f"the logger's {name} {given!r}"] = given
    names |= {f"the checkpoint's name {c.filename!r}": c.filename for c in trainer.checkpoint_callbacks if c.filename}
    for what, name in names.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise TaperlitError(f"{what} leaves the output folder; name the folder in save_dir or dirpath.")


def _prepare_writers(path: str, checkpoint: dict[str, Any], config: Any) -> None:
    """Let ``predict`` tell the checkpoint's step, and write beside it unless a path or a folder is given."""
    for callback in config.callbacks:
        if isinstance(callback, PredictionWriter):
            callback.step = checkpoint.get("global_step")
            if callback.path is None and config.default_root_dir is None:
                file = Path(path)
                callback.path = str(file.with_name(f"{file.stem}-predictions.jsonl"))


def build_cli(command: str) -> TaperlitCLI:
    """Parse the process's arguments and run the trainer's command in them."""
    return TaperlitCLI(
        command,
        LanguageModel,
        TextDataModule,
        trainer_class=Trainer,
        save_config_callback=RunRecord,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_class=TrainerParser,
    )


def run_trainer(command: str, args: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        TaperlitError: whatever the user can mend.
    """
    torch.set_float32_matmul_precision("high")
    sys.argv = [sys.argv[0], command, *args]  # where LightningCLI looks, and what a DDP launch runs again
    with _lightnings_errors(command), quiet():
        for line in (*without_effect(args), *stays_off(args)):
            rank_zero_info(line)
        build_cli(command)


def _same_command() -> str:
    """How to go on, or begin where nothing was saved: the command as it was given, with ``--ckpt_path last``."""
    given, kept = iter(sys.argv[1:]), []
    for arg in given:
        if arg == "--ckpt_path":
            next(given, None)
        elif not arg.startswith("--ckpt_path="):
            kept.append(arg)
    return f"go on with: taperlit {shlex.join([*kept, '--ckpt_path', 'last'])}"


@contextlib.contextmanager
def _lightnings_errors(command: str) -> Iterator[None]:
    try:
        yield
    except (SIGTERMException, ToldToStop) as error:
        signum = getattr(error, "signum", signal.SIGTERM)  # of Lightning's own, where RunCheckpoint is turned off
        if command != "fit":
            raise Terminated(f"{how(signum)}.", signum) from error
        if isinstance(error, ToldToStop):
            raise Terminated(f"{how(signum)}; {_same_command()}", signum) from error
        if getattr(error, "checkpoint", None) is None:  # it has one from RunCheckpoint alone
            raise Terminated(f"{how(signum)} before a last.ckpt was saved; start it again.", signum) from error
        if signum == signal.SIGINT:
            raise Terminated(f"interrupted, and last.ckpt is saved; {_same_command()}", signum) from error
        raise Terminated(f"{how(signum)}; go on with --ckpt_path last.", signum) from error
    except MisconfigurationException as error:
        raise TaperlitError(" ".join(str(error).split())) from error
    except ValueError as error:
        # Where an option may be of several types, jsonargparse tells what was wrong with each: a constructor's own
        # word is the first, and the cause.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, TaperlitError | MisconfigurationException):
            cause = cause.__cause__
        if cause is None or cause is error:
            raise
        raise TaperlitError(" ".join(str(cause).split())) from error
    except RuntimeError as error:
        if "data_parallel_size" not in str(error):  # ModelParallelStrategy's, of sizes that are not the processes'
            raise
        mend = "Set --trainer.strategy.data_parallel_size to the number of processes over tensor_parallel_size."
        raise TaperlitError(f"{' '.join(str(error).split())} {mend}") from error
