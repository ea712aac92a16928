"""Folded models as directories, and any model of ours from disk."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save_model
from torch import nn

from taperlit.checkpoint.atomic import write_directory
from taperlit.checkpoint.reader import read_checkpoint
from taperlit.checkpoint.sharded import META
from taperlit.errors import TaperlitError
from taperlit.transformer import Transformer, TransformerConfig

FORMAT = "taperlit-folded-1"


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


def write_folded(
    directory: str | Path, model: nn.Module, folded: list[str], tokenizer_json: str | None, force: bool = False
) -> Path:
    """Write ``model.safetensors``, ``config.json`` and ``tokenizer.json``: all of them or nothing.

    Args:
        directory: made here; its files appear under this name only when all are safely on disk.
        model: the folded model. A ``config_dict()`` of its own goes into ``config.json``.
        folded: a line for each norm that is gone.
        tokenizer_json: the tokenizer's text, or None.
        force: replace a directory that exists.

    Raises:
        TaperlitError: the directory exists, or cannot be written.
    """
    config = {"format": FORMAT, "model_class": type(model).__name__, "folded_norms": folded}
    if hasattr(model, "config_dict"):
        config["model"] = model.config_dict()

    def fill(partial: Path) -> None:
        save_model(model, str(partial / "model.safetensors"))
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer_json is not None:
            (partial / "tokenizer.json").write_text(tokenizer_json)

    return write_directory(Path(directory), fill, force)


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
