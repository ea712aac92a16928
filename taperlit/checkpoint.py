"""Checkpoints and folded models from disk, read without executing code."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model as load_safetensors

from taperlit.errors import TaperlitError
from taperlit.files import recover
from taperlit.fold import FORMAT
from taperlit.sharded import META, check_sharded, check_zip, read_sharded
from taperlit.transformer import Transformer, TransformerConfig

CHECKPOINT_FORMAT = 1  # raise it when a checkpoint's content changes so that older ones cannot be used


@dataclass
class LoadedModel:
    """A model read from disk.

    Args:
        model: in eval mode and float32, whatever it was stored in.
        tokenizer_json: the text of its ``tokenizer.json``, or None where none was stored.
        sample: (n, T) token blocks of its validation split, or None.
    """

    model: Transformer
    tokenizer_json: str | None
    sample: torch.Tensor | None = None


def config_from_hparams(preset: str, taper: str = "none", overrides: dict | None = None, **_: object):
    """The transformer's config from the hyper-parameters that ``LanguageModel`` keeps in its checkpoints."""
    return TransformerConfig.from_preset(preset, taper=taper, **(overrides or {}))


def open_checkpoint(path: str | Path, verify: bool = True) -> dict[str, Any]:
    """Look into a checkpoint of a ``LanguageModel``, executing nothing.

    Args:
        path: a file, or the directory of a sharded one.
        verify: read every byte and compare it with its checksum, which torch and Lightning do not.

    Returns:
        Of a file all that is in it, mapped from the disk; of a directory all but weights and optimizer.

    Raises:
        TaperlitError: missing, truncated, damaged, no checkpoint, another program's, or another version's.
    """
    path = Path(path)
    recover(path)
    if not path.exists():
        raise TaperlitError(f"{path}: no such checkpoint.")
    if path.suffix == ".safetensors" or (path / "model.safetensors").exists():
        raise TaperlitError(f"{path} is a folded model, not a checkpoint; name the .ckpt that it was folded from.")
    if path.is_dir() and not (path / META).exists():
        raise TaperlitError(f"{path} is a directory without a checkpoint's {META}; name the .ckpt in it.")
    try:
        if path.is_dir():
            if verify:
                check_sharded(path)
            checkpoint = torch.load(path / META, map_location="cpu", weights_only=True)
        else:
            if verify:
                check_zip(path)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen kinds, by where the damage is
        raise _unreadable(path, error) from error
    keys = checkpoint.keys() if isinstance(checkpoint, dict) else ()
    if "hyper_parameters" not in keys or (path.is_file() and "state_dict" not in keys):
        raise TaperlitError(f"{path} is not a checkpoint of `taperlit fit`; use the last.ckpt that it wrote.")
    written = checkpoint.get("taperlit")
    number = written.get("format") if isinstance(written, dict) else 0
    if number != CHECKPOINT_FORMAT:
        which = "a newer" if isinstance(number, int) and number > CHECKPOINT_FORMAT else "an older"
        raise TaperlitError(f"{path} was written by {which} taperlit; use that version, or train again.")
    return checkpoint


def read_checkpoint(path: str | Path, optimizer: bool = True) -> dict[str, Any]:
    """A checkpoint of a ``LanguageModel`` as a run on one process writes it, executing nothing.

    Args:
        path: a file, or the directory of a sharded one.
        optimizer: read its states too.

    Raises:
        TaperlitError: as :func:`open_checkpoint`.
    """
    checkpoint = open_checkpoint(path)
    return load_whole(path, optimizer) if Path(path).is_dir() else checkpoint


def load_whole(path: str | Path, optimizer: bool = True) -> dict[str, Any]:
    """Any Lightning checkpoint, file or sharded directory, in memory and on the CPU, executing nothing.

    Raises:
        TaperlitError: missing or unreadable.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return read_sharded(path, optimizer)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> TaperlitError:
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return TaperlitError(f"{path} is truncated, damaged or not a checkpoint ({reason}); use another one.")


def load_checkpoint(path: str | Path) -> LoadedModel:
    """The transformer, tokenizer and sample blocks in a checkpoint of ``taperlit fit``.

    Raises:
        TaperlitError: as :func:`read_checkpoint`, or its weights do not fit its own config.
    """
    checkpoint = read_checkpoint(path, optimizer=False)
    weights = {
        key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items() if key.startswith("model.")
    }
    try:
        model = Transformer(config_from_hparams(**checkpoint["hyper_parameters"]))
        model.load_state_dict(weights)
    except (TypeError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TaperlitError(f"{path} does not hold the model its own config describes: {reason}") from error
    data = checkpoint.get("TextDataModule", {})
    return LoadedModel(model.eval(), data.get("tokenizer"), data.get("sample"))


def load_folded(directory: str | Path) -> LoadedModel:
    """The transformer and tokenizer that ``taperlit fold`` wrote.

    Raises:
        TaperlitError: a file is missing, damaged or another program's.
    """
    directory = Path(directory)
    try:
        config = json.loads((directory / "config.json").read_text())
    except FileNotFoundError as error:
        raise TaperlitError(f"{directory} has no config.json; name a directory that `taperlit fold` wrote.") from error
    except ValueError as error:
        raise TaperlitError(f"{directory}/config.json is damaged; fold the checkpoint again.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise TaperlitError(
            f"{directory} was not written by this version's `taperlit fold`; fold the checkpoint again."
        )
    try:
        model = Transformer(TransformerConfig(**config["model"]))
        load_safetensors(model, directory / "model.safetensors")
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise TaperlitError(f"{directory}/model.safetensors is missing or damaged ({reason}); fold again.") from error
    tokenizer = directory / "tokenizer.json"
    return LoadedModel(model.eval(), tokenizer.read_text() if tokenizer.exists() else None)


def load_model(path: str | Path) -> LoadedModel:
    """A folded model's directory or a checkpoint, whichever ``path`` is."""
    is_folded = Path(path).is_dir() and not (Path(path) / META).exists()
    return load_folded(path) if is_folded else load_checkpoint(path)
