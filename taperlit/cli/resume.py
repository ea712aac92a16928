"""Which checkpoint a run goes on with, and what it may do differently from the run that wrote it."""

import contextlib
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from taperlit.checkpoint.atomic import recover
from taperlit.checkpoint.folded import origin_in
from taperlit.checkpoint.reader import open_checkpoint
from taperlit.cli.slots import SLOTS, class_of
from taperlit.errors import TaperlitError
from taperlit.training.lightning_compat import begins_a_new_version, checkpoint_directory, continue_version
from taperlit.training.module import LanguageModel
from taperlit.training.source import source_of

KEYWORDS = ("last", "best", "hpc")  # of --ckpt_path; anything else is a path
# What a run under way cannot change: values that its statistics, its schedule or its frozen scalars depend on. By slot,
# with the options that may change.
SET_AT_THE_START = {
    "gate": ("closed",),
    "alignment": (),
    "first": (),
    "anchor": ("weight", "fade"),
    "fakeln": ("aux_weight", "end_of_text"),
}
# Options of other slots whose outcome is in the checkpoint, so that another value would do nothing.
KEPT = {"hold": ("back", "latest"), "massive": ("multiple", "begin", "end")}
# What takes effect from the next step on, and is told.
APPLIED = ["lr", "betas", "weight_decay", "warmup", "min_lr_ratio", "decay_start"]
APPLIED += ["chunk_tokens", "compile", "activation_checkpointing"]
APPLIED_BY_TRAINER = ["precision", "gradient_clip_val", "gradient_clip_algorithm", "val_check_interval"]
APPLIED_BY_TRAINER += ["check_val_every_n_epoch", "limit_train_batches", "limit_val_batches"]


def look_into(path: str) -> dict[str, Any]:
    """A checkpoint's content without its weights being read, once it is known to be whole and harmless.

    The first process checks every byte; the others wait for it before they load anything.

    Raises:
        TaperlitError: as :func:`taperlit.checkpoint.reader.open_checkpoint`.
    """
    return open_checkpoint(path, verify=not rank_zero_only.rank)


def find_last(loggers: Sequence[Logger], callbacks: Iterable[Callback], root: str) -> str | None:
    """Where the newest run of a config stopped: its ``last.ckpt``. The loggers go on in that run's folder.

    The newest run is the highest ``version_N`` of the first logger that has a checkpoint. Where none has, the loggers
    go on in the newest folder, which a run left that ended before its first checkpoint.

    Args:
        loggers: of the run.
        callbacks: of the run; its ModelCheckpoints say in which folder checkpoints are.
        root: ``trainer.default_root_dir``.

    Returns:
        The path, or None where there is no checkpoint.

    Raises:
        TaperlitError: the newest run has checkpoints but no ``last.ckpt``, or a logger begins a new folder each time,
            so that the run cannot be told.
    """
    saving = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    for logger in filter(begins_a_new_version, loggers):
        if not isinstance(logger, TensorBoardLogger):
            raise TaperlitError(
                f"--ckpt_path last: {type(logger).__name__} begins a new folder each time; give it a version, so that "
                "the run is found again."
            )
        versions = _versions(logger)
        for version in (*versions, *versions[:1]):  # the newest once more: it stays where none has a checkpoint
            continue_version(logger, version)
            if logger is not loggers[0] or _checkpoints(saving, loggers, root):  # the first one's folder holds them
                break
    checkpoints = _checkpoints(saving, loggers, root)
    last = [path for path in checkpoints if path.stem.startswith(ModelCheckpoint.CHECKPOINT_NAME_LAST)]
    if checkpoints and not last:
        names = ", ".join(sorted(path.name for path in checkpoints))
        raise TaperlitError(
            f"--ckpt_path last: {checkpoints[0].parent} has no last.ckpt, only {names}; name the file to go on from, "
            "or begin anew without --ckpt_path."
        )
    return str(max(last, key=lambda path: path.stat().st_mtime)) if last else None


def _versions(logger: TensorBoardLogger) -> list[int]:
    """The numbers of its ``version_N`` folders, newest first."""
    names = [path.name.removeprefix("version_") for path in Path(logger.root_dir).glob("version_*")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _checkpoints(saving: Iterable[ModelCheckpoint], loggers: Sequence[Logger], root: str) -> list[Path]:
    found: dict[Path, None] = {}
    for callback in saving:
        directory = checkpoint_directory(callback, loggers, root)
        with contextlib.suppress(FileNotFoundError):  # another process was first
            recover(directory / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}")
        found |= dict.fromkeys(directory.glob(f"[!.]*{callback.FILE_EXTENSION}"))
    return list(found)


def check(path: str, checkpoint: dict[str, Any], module: LanguageModel, options: dict[str, Any] | None) -> None:
    """Refuse what the checkpoint's run cannot do differently, and tell what it will.

    Applied from the next step on: every option of the learning rate and the optimizer, ``trainer.max_steps`` (where the
    learning rate's cosine ends), how the loss and the blocks are computed, the scale loss's weight, and every slot that
    does not depend on how the run began; and the trainer's precision, clipping and limits. Refused: another model or
    policy of tapering, another gate schedule, alignment or anchor, what ``GateHold`` and ``ShrinkMassive`` have worked
    out already, and other batches to a step.

    Args:
        path: of the checkpoint, for the errors.
        checkpoint: its content.
        module: built with the options given now.
        options: the command's options given now, as plain data, to go on training; None to evaluate.

    Raises:
        TaperlitError: names the option, its value, and the one that the run began with.
    """
    hparams = checkpoint["hyper_parameters"]
    try:
        theirs = {
            **source_of(hparams, origin_in(checkpoint)).identity(),
            "taper": hparams["taper"],
            "taper_bias": hparams.get("taper_bias", False),  # which older runs did not have
        }
    except (TypeError, KeyError) as error:
        raise TaperlitError(f"{path} is of another model; begin anew without --ckpt_path.") from error
    mine = {**module.source.identity(), "taper": module.hparams.taper, "taper_bias": module.hparams.taper_bias}
    names = [*mine, *(name for name in theirs if name not in mine)]
    changed = [
        f"{name} {theirs.get(name)}, not {mine.get(name)}" for name in names if theirs.get(name) != mine.get(name)
    ]
    if changed:
        raise TaperlitError(
            f"{path} is of another model ({', '.join(changed)}); name its run's config, or begin anew without "
            "--ckpt_path."
        )
    if options is None:
        return
    changes = [
        _told(f"model.{name}", module.hparams[name], hparams[name])
        for name in APPLIED
        if name in hparams and _differ(hparams[name], module.hparams[name])
    ]
    began = checkpoint.get("callbacks", {}).get("RunRecord", {}).get("config")  # None where no command line trained it
    if began is not None:
        for slot, mine in options["taper"].items():
            if slot in SLOTS:
                changes += _slot_changes(path, slot, began["taper"].get(slot), mine)
        batches = "accumulate_grad_batches"
        if (before := began["trainer"].get(batches)) != (now := options["trainer"][batches]) and before is not None:
            raise _refused(path, f"trainer.{batches}", now, before)
        if taken := _taken_of_a_step(checkpoint, now):
            changes.append(
                f"one step over {now - taken} batches, not {now}: the checkpoint is from between two of them"
            )
        for name in APPLIED_BY_TRAINER:
            if name in began["trainer"] and _differ(began["trainer"][name], options["trainer"][name]):
                changes.append(_told(f"trainer.{name}", options["trainer"][name], began["trainer"][name]))
        if (before := began["trainer"]["max_steps"]) != (now := options["trainer"]["max_steps"]):
            kept = ", and the gate keeps its steps" if options["taper"]["gate"] else ""
            changes.append(_told("trainer.max_steps", now, before) + kept)
    if changes:
        rank_zero_info(f"From step {checkpoint['global_step'] + 1} on: {'; '.join(changes)}.")


def _taken_of_a_step(checkpoint: dict[str, Any], batches: int) -> int:
    """How many batches of a step came before the checkpoint, whose gradients it does not have."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return 0 if progress["is_last_batch"] else int(progress["current"]["completed"]) % batches


def _slot_changes(path: str, slot: str, theirs: Any, mine: Any) -> list[str]:
    """What the callback of a slot does differently from here on; refused where it depends on how the run began."""
    fixed = slot in SET_AT_THE_START
    if theirs is None or mine is None:
        if theirs is mine:
            return []
        words = ["off" if one is None else "on" for one in (mine, theirs)]
        if fixed and slot != "anchor":  # ScaleAnchor itself says when it comes too late
            raise _refused(path, f"taper.{slot}", *words)
        return [_told(f"taper.{slot}", *words)]
    # By the class's own name: it may be imported from several places, and a checkpoint's word is never imported.
    names = [str(spec["class_path"]).rpartition(".")[2] for spec in (mine, theirs)]
    if names[0] != names[1]:
        if fixed:
            raise _refused(path, f"taper.{slot}", *names)
        return [_told(f"taper.{slot}", *names)]
    # What the version that wrote the checkpoint did not know yet, it did as today's default does.
    defaults = {name: one.default for name, one in inspect.signature(class_of(mine)).parameters.items()}
    theirs, mine = {**defaults, **(theirs.get("init_args") or {})}, {**defaults, **(mine.get("init_args") or {})}
    changes = []
    for name in sorted(mine.keys() | theirs.keys()):
        if _differ(theirs.get(name), mine.get(name)):
            if name in KEPT.get(slot, ()) or (fixed and name not in SET_AT_THE_START[slot]):
                raise _refused(path, f"taper.{slot}.{name}", mine.get(name), theirs.get(name))
            changes.append(_told(f"taper.{slot}.{name}", mine.get(name), theirs.get(name)))
    return changes


def _told(option: str, now: Any, before: Any) -> str:
    return f"{option} {now} (before: {before})"


def _refused(path: str, option: str, mine: Any, theirs: Any) -> TaperlitError:
    return TaperlitError(
        f"--{option} is {mine} and the run of {path} began with {theirs}, which cannot change under way; leave it, or "
        "begin anew without --ckpt_path."
    )


def _differ(a: Any, b: Any) -> bool:
    def listed(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return listed(a) != listed(b)
