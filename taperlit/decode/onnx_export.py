"""A model exported for onnxruntime, and compared with itself before its directory appears."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from taperlit.checkpoint.atomic import write_directory
from taperlit.compare import largest_difference
from taperlit.decode.decoder import read_decoder
from taperlit.decode.layout import Layouts, shapes_of
from taperlit.decode.onnx_engine import TOKENIZER, OnnxEngine, write_config
from taperlit.decode.onnx_graph import library, padded_head, write_graph
from taperlit.errors import TaperlitError
from taperlit.transformer import Transformer

DTYPES = (torch.float32, torch.float16)
TOLERANCE = {torch.float64: 0, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # of the largest logit
CHECKED_PROMPT, CHECKED_STEPS = 8, 2  # tokens


def export_onnx(
    model: Transformer,
    directory: str | Path,
    tokenizer_json: str | None = None,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> Path:
    """Write a model for onnxruntime, all or nothing.

    The directory holds ``model.onnx``, its weights in ``model.onnx.data``, ``config.json`` and ``tokenizer.json``;
    :class:`taperlit.decode.onnx_engine.OnnxEngine` decodes from it. Before it appears, the logits of onnxruntime are
    compared with the model's own.

    Args:
        model: plain, tapered or folded. What is left of its norms is in the graph.
        directory: made here.
        tokenizer_json: the text for ``tokenizer.json``, or None.
        dtype: of weights, activations and cache: float32 or float16.
        force: replace a directory that exists.

    Returns:
        The directory.

    Raises:
        TaperlitError: onnx or onnxruntime is not installed, a dtype that is neither, a model that decoding does not
            know, the directory exists or cannot be written, or onnxruntime's logits differ from the model's.
    """
    for name in ("onnx", "onnxruntime"):
        library(name)
    if dtype not in DTYPES:
        raise TaperlitError(f"ONNX export has float32 and float16, not {str(dtype).removeprefix('torch.')}.")
    config = model.config
    shapes = {
        "n_layer": config.n_layer,
        "n_kv_head": config.kv_heads,
        "d_head": padded_head(config.head_width),
        "vocab_size": config.vocab_size,
        "block_size": config.block_size,
        "dtype": str(dtype).removeprefix("torch."),
    }

    def fill(partial: Path) -> None:
        rows: Layouts = dict.fromkeys(shapes_of(config), "rows")
        # In float32 until it is written, so that a tied head is seen to be the embedding's matrix.
        write_graph(read_decoder(model, torch.device("cpu"), torch.float32, rows, "fused"), partial, dtype)
        if tokenizer_json is not None:
            (partial / TOKENIZER).write_text(tokenizer_json)
        write_config(partial, shapes)
        _check(model, partial, dtype)

    return write_directory(Path(directory), fill, force)


@torch.no_grad()
def _check(model: Transformer, directory: Path, dtype: torch.dtype) -> None:
    """Compare onnxruntime's logits with the model's own forward pass: a prompt, a padded one, and steps.

    Raises:
        TaperlitError: they differ by more than rounding, or the model's are not finite.
    """
    T = min(CHECKED_PROMPT, model.config.block_size)
    steps = min(CHECKED_STEPS, model.config.block_size - T)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, T + steps), generator=generator)
    lengths = (T, max(T // 2, 1))
    engine = OnnxEngine(directory, batch_size=2, length=T + steps)
    prompts = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    got = [engine.prefill(prompts)]
    for step in range(steps):
        got.append(engine.step(torch.stack([row[length + step] for row, length in zip(tokens, lengths, strict=True)])))
    every = model(tokens.to(model.head.weight.device)).cpu()
    wanted = torch.stack([row[n - 1 : n + steps] for row, n in zip(every, lengths, strict=True)], 1)
    if not wanted.isfinite().all():
        raise TaperlitError("The model's logits are not finite, so nothing can be compared; its weights are damaged.")
    difference = largest_difference(wanted, torch.stack(got))
    # The coarser of the two roundings counts: the graph's, and that of the forward pass.
    if not difference <= max(TOLERANCE[dtype], TOLERANCE[wanted.dtype]):
        raise TaperlitError(
            f"onnxruntime's logits differ from the model's own by {difference:.2g}, relative to the largest: something "
            "was put on the model that decoding does not read, or it overflows in "
            f"{str(dtype).removeprefix('torch.')}; remove the one, or export with dtype float32."
        )


def onnx_engine(
    model: Transformer, batch_size: int = 1, length: int | None = None, dtype: torch.dtype = torch.float32
) -> OnnxEngine:
    """Decode a model in onnxruntime, with nothing left on the disk.

    Args:
        model: see :func:`export_onnx`.
        batch_size: see :class:`taperlit.decode.onnx_engine.OnnxEngine`.
        length: see there.
        dtype: see :func:`export_onnx`.

    Raises:
        TaperlitError: as both.
    """
    with TemporaryDirectory(prefix="taperlit-onnx-") as folder:  # files that are mapped stay readable
        return OnnxEngine(export_onnx(model, Path(folder, "model"), dtype=dtype), batch_size, length)
