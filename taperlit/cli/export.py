"""``taperlit export``: a model for other programs."""

from pathlib import Path
from typing import Literal

import torch

from taperlit.checkpoint.folded import load_model
from taperlit.decode.onnx_export import export_onnx
from taperlit.decode.onnx_graph import library
from taperlit.errors import TaperlitError


def export(
    to: Literal["onnx"],
    model: str,
    out: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    force: bool = False,
) -> None:
    """Write a folded model or a checkpoint for another program, and compare it with the original first.

    Args:
        to: the program: onnx, for onnxruntime.
        model: a directory that ``taperlit fold`` wrote, or a checkpoint.
        out: directory to write; by default ``<model's name>-onnx`` beside the model.
        dtype: of weights, activations and cache.
        force: replace ``out`` if it exists.

    Raises:
        TaperlitError: an unusable model, outputs that differ from it, or ``out`` exists.
    """
    path = Path(model)
    directory = Path(out) if out is not None else path.with_name(f"{path.stem}-{to}")
    if directory.exists() and not force:
        raise TaperlitError(f"{directory} exists; name another --out or pass --force.")
    for name in ("onnx", "onnxruntime"):  # before a large model is read
        library(name)
    loaded = load_model(path)
    export_onnx(loaded.model, directory, loaded.tokenizer_json, getattr(torch, dtype), force)
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"compared with the model: prompts and steps agree\nwrote {directory} ({size / 1e6:.1f} MB, {dtype})")
