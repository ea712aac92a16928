"""What the commands do: LightningCLI for those that need a Trainer, jsonargparse for the others."""

import copy
import errno
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning as L
import torch
from jsonargparse import ActionConfigFile, ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tokenizers import Tokenizer

from taperlit.callbacks import RngState, RunCheckpoint, StepProgressBar, TokenThroughput
from taperlit.callbacks.predictions import PredictionWriter
from taperlit.checkpoint.folded import config_from_hparams, load_checkpoint, load_model, write_folded
from taperlit.checkpoint.reader import open_checkpoint
from taperlit.cli.entry import TRAINER_COMMANDS
from taperlit.data import TextDataModule
from taperlit.data.tokenizer import end_of_text_id
from taperlit.decode.generate import stream_text
from taperlit.errors import TaperlitError, Terminated
from taperlit.folding import TOLERANCE, check_gate, fold, largest_difference
from taperlit.training.module import LanguageModel
from taperlit.training.trainer import Trainer

# The callbacks that overlays swap by name. A list, as in trainer.callbacks, could only be replaced whole.
SLOTS = {
    "gate": "moves the gate (GateSchedule)",
    "alignment": "freezes the alignment scalars (AlignmentFreeze)",
    "anchor": "adds the scale loss (ScaleAnchor)",
    "fold": "writes the folded model at the end (FoldOnEnd)",
    "monitor": "logs the taper's traces (TaperMonitor)",
    "guard": "stops at, or skips, a step that is not finite (FiniteGuard)",
}
DEFAULTS = {
    "monitor": {
        "class_path": "taperlit.callbacks.TaperMonitor",
        "init_args": {"residual": "model.final_norm", "logits": "model.head"},
    },
    "guard": {"class_path": "taperlit.callbacks.FiniteGuard"},
}
KEYWORDS = ("last", "best", "hpc")  # of --ckpt_path; anything else is a path
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class _OneLineErrors:
    """A wrong option is told in one line, with exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"taperlit: error: {' '.join(message.split())} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


class _TrainerParser(_OneLineErrors, LightningArgumentParser):
    pass


class _Parser(_OneLineErrors, ArgumentParser):
    pass


class RunRecord(SaveConfigCallback):
    """Saves the exact config and the tokenizer of a fit beside its logs."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write ``tokenizer.json`` and ``config.yaml``; of a run that goes on, ``config.resumed.yaml``."""
        if stage != "fit":
            return
        directory = Path(trainer.log_dir or trainer.default_root_dir)  # every rank must ask: the answer is broadcast
        if self.config.get("ckpt_path") and (directory / self.config_filename).exists():
            self.config_filename = "config.resumed.yaml"
        super().setup(trainer, pl_module, stage)
        if trainer.is_global_zero:
            (directory / "tokenizer.json").write_text(trainer.datamodule.tokenizer_json)


class TaperlitCLI(LightningCLI):
    """LightningCLI over ``LanguageModel`` and ``TextDataModule`` with the taper's callbacks in named slots."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--taper.<slot>``."""
        for slot, purpose in SLOTS.items():
            default = DEFAULTS.get(slot)
            parser.add_argument(f"--taper.{slot}", type=L.Callback | None, default=default, help=f"{purpose}; or null")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})  # nothing in a checkpoint of ours needs code to be read
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
        return parser

    def _parse_ckpt_path(self) -> None:
        """Take the model's hyper-parameters from the checkpoint, once it is known to be one, whole and harmless."""
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path and path not in KEYWORDS:
            hparams = dict(_look_into(path)["hyper_parameters"])
            hparams.pop("_instantiator", None)  # LightningCLI's own
            self.config = self.parser.parse_object({command: {"model": hparams}}, self.config)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add the slots' callbacks, and the ones every run has unless it names its own."""
        config = self._get(self.config_init, "trainer")
        given = config["callbacks"] or []
        callbacks = [given] if isinstance(given, L.Callback) else list(given)
        callbacks += [callback for callback in vars(self._get(self.config_init, "taper")).values() if callback]

        def missing(kind: type[L.Callback]) -> bool:
            return not any(isinstance(callback, kind) for callback in callbacks)

        if missing(ProgressBar) and config["enable_progress_bar"] is not False:
            callbacks.append(StepProgressBar())
        if self.subcommand == "predict" and missing(PredictionWriter):
            callbacks.append(PredictionWriter())
        if missing(TokenThroughput):
            callbacks.append(TokenThroughput())
        if missing(ModelCheckpoint) and config["enable_checkpointing"] is not False:
            callbacks.append(RunCheckpoint())
        if missing(RngState):
            callbacks.append(RngState())
        config["callbacks"] = callbacks
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:  # Lightning's word on a strategy or device that there is not
            raise TaperlitError(" ".join(str(error).split())) from error
        _stay_inside(trainer)
        options = self.config_init[self.subcommand]
        if (keyword := options.get("ckpt_path")) in (None, *KEYWORDS):
            options["ckpt_path"] = _find(trainer, self.model, keyword)
            if keyword is not None and options["ckpt_path"] is None and self.subcommand != "fit":
                raise TaperlitError(f"--ckpt_path {keyword}: this config's runs have no checkpoint yet; fit first.")
        return trainer


def _look_into(path: str) -> dict[str, Any]:
    # The other processes wait for the first before they load anything.
    return open_checkpoint(path, verify=not rank_zero_only.rank)


def _stay_inside(trainer: L.Trainer) -> None:
    """Names in a config name things in the output folder; only a folder's own option may say where that is."""
    names = {f"the logger's name {logger.name!r}": logger.name for logger in trainer.loggers if logger.name}
    names |= {f"the checkpoint's name {c.filename!r}": c.filename for c in trainer.checkpoint_callbacks if c.filename}
    for what, name in names.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise TaperlitError(f"{what} leaves the output folder; name the folder in save_dir or dirpath.")


def _find(trainer: L.Trainer, model: LanguageModel, keyword: str | None) -> str | None:
    """The checkpoint that Lightning would choose by itself, looked into before Lightning reads it.

    ``last`` is where the newest run of this config's logger stopped; the run goes on in its folder. Without a keyword
    there may be one that SLURM's requeueing left.

    Raises:
        TaperlitError: it cannot be told which run to go on with, or it trained another model.
    """
    if keyword == "last":
        for logger in trainer.loggers:
            _continue_version(logger)
    try:
        path = trainer._checkpoint_connector._parse_ckpt_path(
            TrainerFn.FITTING, keyword, model_provided=True, model_connected=True
        )
    except ValueError as error:
        raise TaperlitError(f"--ckpt_path {keyword}: this config's runs have none; name the file.") from error
    if path is None:
        return None
    try:
        config = config_from_hparams(**_look_into(path)["hyper_parameters"])
    except TypeError:
        config = None
    if config != model.config:
        raise TaperlitError(f"{path} is of another model; name its run's config, or begin anew without --ckpt_path.")
    return path


def _continue_version(logger: Logger) -> None:
    if getattr(logger, "_version", "") is not None:
        return  # it was given one, or numbers nothing
    if not isinstance(logger, TensorBoardLogger):
        raise TaperlitError(
            f"--ckpt_path last: {type(logger).__name__} begins a new folder each time; give it a version, so that the "
            "run is found again."
        )
    numbers = [path.name.removeprefix("version_") for path in Path(logger.root_dir).glob("version_*")]
    logger._version = max((int(number) for number in numbers if number.isdigit()), default=None)


def build_cli() -> TaperlitCLI:
    """Parse the process's arguments and run the trainer's command in them."""
    return TaperlitCLI(
        LanguageModel,
        TextDataModule,
        trainer_class=Trainer,
        save_config_callback=RunRecord,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_class=_TrainerParser,
    )


def run(command: str, args: list[str]) -> None:
    """Run one command with its arguments.

    Raises:
        TaperlitError: whatever the user can mend.
    """
    torch.set_float32_matmul_precision("high")
    if command not in TRAINER_COMMANDS:
        function = {"fold": fold_checkpoint, "generate": generate}[command]
        parser = _Parser(prog=f"taperlit {command}", description=function.__doc__.splitlines()[0])
        parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these options")
        parser.add_function_arguments(function)
        options = parser.parse_args(args)
        options.pop("config", None)
        function(**options)
        return
    sys.argv = [sys.argv[0], command, *args]  # where LightningCLI looks, and what a DDP launch runs again
    try:
        build_cli()
    except SIGTERMException as error:
        raise Terminated("stopped by SIGTERM; go on with --ckpt_path last.") from error
    except FileNotFoundError as error:
        raise TaperlitError(" ".join(str(error).split())) from error
    except OSError as error:
        if error.errno not in DISK_REFUSES:
            raise
        raise TaperlitError(f"{error.filename or 'the output folder'}: {error.strerror}; make room first.") from error
    except MisconfigurationException as error:
        raise TaperlitError(" ".join(str(error).split())) from error
    except RuntimeError as error:
        if "data_parallel_size" not in str(error):
            raise
        raise TaperlitError(" ".join(str(error).split())) from error


@torch.no_grad()
def fold_checkpoint(
    ckpt: str, out: str | None = None, force: bool = False, tied: Literal["untie", "scale"] = "untie"
) -> None:
    """Fold a checkpoint whose gate is 0 into a model without those norms.

    Folded and unfolded are compared in float32 on blocks of the run's validation text before anything is written.

    Args:
        ckpt: a checkpoint of ``taperlit fit``.
        out: directory to write; by default ``<checkpoint's name>-folded`` beside the checkpoint.
        force: replace ``out`` if it exists.
        tied: for an All-Taper model whose head shares the embedding's matrix: give the head its own, or keep the final
            norm's linear map as an explicit scale.

    Raises:
        TaperlitError: an unusable checkpoint, a gate that is not 0, a difference above 1e-3, or ``out`` exists.
    """
    directory = Path(out) if out is not None else Path(ckpt).with_name(f"{Path(ckpt).stem}-folded")
    if directory.exists() and not force:
        raise TaperlitError(f"{directory} exists; name another --out or pass --force.")
    loaded = load_checkpoint(ckpt)
    if loaded.model.config.taper == "none":
        raise TaperlitError(f"{ckpt} has no tapered norms (model.taper is none), so there is nothing to fold.")
    check_gate(loaded.model)
    if loaded.sample is None:
        raise TaperlitError(f"{ckpt} holds no validation blocks to check the folding on; it was not made by this fit.")
    model, folded = loaded.model, copy.deepcopy(loaded.model)
    tokens = loaded.sample[:, :-1].long()
    report = fold(folded, lambda: folded(tokens[:1, :8]), tied=tied)
    difference = largest_difference(model(tokens), folded(tokens))
    print(f"largest difference, folded against unfolded, on {tokens.numel()} validation tokens: {difference:.2e}")
    if not difference <= TOLERANCE:
        raise TaperlitError(f"Folding changed the logits by {difference:.1e} (relative), more than {TOLERANCE:.0e}.")
    lines = [str(norm) for norm in report]
    write_folded(directory, folded, lines, loaded.tokenizer_json, force)
    gone = [norm for norm in report if not norm.scale]
    print(f"removed {len(gone)} norms with {sum(norm.parameters for norm in gone)} parameters:")
    print("\n".join(f"  {line}" for line in lines))
    print(f"wrote {directory}")


def generate(
    model: str,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
) -> None:
    """Continue a prompt with a folded model or a checkpoint, printing as it goes.

    Args:
        model: a directory that ``taperlit fold`` wrote, or a checkpoint.
        prompt: text to continue.
        max_new_tokens: stop after this many tokens, or at the end of the text or of the model's context.
        temperature: 0 takes the likeliest token.
        top_k: draw from this many of the likeliest.
        top_p: draw from the likeliest that together reach this probability.
        seed: of the draws.

    Raises:
        TaperlitError: an unusable model, one without a tokenizer, or an empty prompt.
    """
    loaded = load_model(model)
    if loaded.tokenizer_json is None:
        raise TaperlitError(f"{model} has no tokenizer; fold a checkpoint that was trained with text data.")
    tokenizer = Tokenizer.from_str(loaded.tokenizer_json)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pieces = stream_text(
        loaded.model.to(device),
        tokenizer,
        prompt,
        max_new_tokens,
        stop=end_of_text_id(tokenizer),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(device).manual_seed(seed),
    )
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
