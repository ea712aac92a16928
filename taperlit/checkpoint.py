"""Checkpoints and folded models from disk, read without executing code."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_model as load_safetensors

from taperlit.errors import TaperlitError
from taperlit.fold import FORMAT
from taperlit.transformer import Transformer, TransformerConfig


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


def read_checkpoint(path: str | Path) -> dict:
    """Read a Lightning checkpoint of a ``LanguageModel``, tensors on the CPU, executing nothing.

    Raises:
        TaperlitError: missing, truncated, not a checkpoint, or another program's.
    """
    path = Path(path)
    if not path.exists():
        raise TaperlitError(f"{path}: no such checkpoint.")
    if path.is_dir():
        raise TaperlitError(f"{path} is a directory; name the .ckpt file in it.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds, by where the damage is
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise TaperlitError(f"{path} is truncated, damaged or not a checkpoint ({reason}); use another one.") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise TaperlitError(f"{path} is not a checkpoint of `taperlit fit`; use the last.ckpt that it wrote.")
    return checkpoint


def load_checkpoint(path: str | Path) -> LoadedModel:
    """The transformer, tokenizer and sample blocks in a checkpoint of ``taperlit fit``.

    Raises:
        TaperlitError: as :func:`read_checkpoint`, or its weights do not fit its own config.
    """
    checkpoint = read_checkpoint(path)
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
    return load_folded(path) if Path(path).is_dir() else load_checkpoint(path)
