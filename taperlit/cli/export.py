"""``taperlit export``: a model for other programs."""

from typing import Literal

from taperlit.checkpoint.atomic import named, require_apart
from taperlit.errors import TaperlitError


def export(
    to: Literal["onnx", "transformers", "transformer-lens"],
    model: str,
    out: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    results: str | None = None,
    force: bool = False,
) -> None:
    """Write a folded model or a checkpoint for another program, and compare it with the original first.

    Args:
        to: the program: onnx, for onnxruntime; transformers, for AutoModelForCausalLM; or transformer-lens, for
            HookedTransformer, where no norm is left. The last two take folded models only.
        model: a directory that ``taperlit fold`` wrote, or a checkpoint.
        out: directory to write; by default ``<model's name>-<to>`` beside the model.
        dtype: of the weights: float32 or float16 for onnx, float32 or bfloat16 for transformers, float32 for
            transformer-lens.
        results: a JSON file of figures by name, such as losses before and after, for the model card of transformers.
        force: replace ``out`` if it exists.

    Raises:
        TaperlitError: an unusable model, outputs that differ from it, or ``out`` exists, or is or holds the model.
    """
    path = named(model)
    # A folded model's folder may have a dot in its name; a sharded checkpoint's ends in .ckpt, as a file's does.
    stem = path.stem if path.suffix == ".ckpt" else path.name
    directory = named(out) if out is not None else path.with_name(f"{stem}-{to}")
    require_apart(path, directory)
    if directory.exists() and not force:
        raise TaperlitError(f"{directory} exists; name another --out or pass --force.")
    if results is not None and to != "transformers":
        raise TaperlitError(f"--results is for the model card of --to transformers; {to} has none.")
    import torch  # here, so that the help and a wrong option are told without it

    from taperlit.cli.exports import TARGETS

    TARGETS[to](path, directory, getattr(torch, dtype), results, force)
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"wrote {directory} ({size / 1e6:.1f} MB, {dtype})")
