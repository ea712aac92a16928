"""What ``taperlit export`` does for each program."""

from pathlib import Path

import torch

from taperlit.checkpoint.folded import LoadedModel, load_model, read_model
from taperlit.checkpoint.plain import check_fields, read_json
from taperlit.data.tokenizer import end_of_text_id, parse_tokenizer
from taperlit.decode.onnx_export import export_onnx
from taperlit.decode.onnx_graph import library
from taperlit.errors import TaperlitError
from taperlit.hub.causal_lm import CausalLM
from taperlit.hub.export import export_transformers, tokenizer_files
from taperlit.hub.families import as_transformer
from taperlit.hub.lens import export_lens, hooked_transformer
from taperlit.norm import tapered_norms
from taperlit.transformer import Transformer


def _to_onnx(path: Path, directory: Path, dtype: torch.dtype, results: str | None, force: bool) -> None:
    for name in ("onnx", "onnxruntime"):  # before a large model is read
        library(name)
    loaded = load_model(path)
    export_onnx(loaded.model, directory, loaded.tokenizer_json, dtype, force)
    print("compared with the model: prompts and steps agree")


def _to_transformers(path: Path, directory: Path, dtype: torch.dtype, results: str | None, force: bool) -> None:
    figures = None if results is None else _read_figures(Path(results))
    loaded = _read_folded(path)
    export_transformers(
        loaded.model,
        loaded.structure,
        directory,
        tokenizer_json=loaded.tokenizer_json,
        dtype=dtype,
        end_of_text=_end_of_text(loaded),
        results=figures,
        force=force,
        report=print,
    )


def _to_lens(path: Path, directory: Path, dtype: torch.dtype, results: str | None, force: bool) -> None:
    if dtype is not torch.float32:
        raise TaperlitError(f"Export to transformer-lens has float32, not {str(dtype).removeprefix('torch.')}.")
    hooked_transformer()  # before a large model is read
    loaded = _read_folded(path)
    files = tokenizer_files(_carried(loaded), loaded.tokenizer_json, _end_of_text(loaded))
    export_lens(as_transformer(loaded.model), directory, files, force)
    print("compared with the model: logits agree")


def _read_folded(path: Path) -> LoadedModel[Transformer | CausalLM]:
    loaded = read_model(path)
    if loaded.structure is None:
        raise TaperlitError(
            f"{path} is not folded; run `taperlit fold --ckpt {path}` and export what it writes."
            if tapered_norms(loaded.model)
            else f"{path} has its norms as they were, so there is nothing to export; train it with --model.taper."
        )
    return loaded


def _carried(loaded: LoadedModel[Transformer | CausalLM]) -> dict[str, str]:
    return loaded.model.origin.files if isinstance(loaded.model, CausalLM) else {}


def _end_of_text(loaded: LoadedModel[Transformer | CausalLM]) -> str | None:
    """The tokenizer's token that ends a text; None where there is no tokenizer, or no such token."""
    if loaded.tokenizer_json is None:
        return None
    tokenizer = parse_tokenizer(loaded.tokenizer_json, "of the model")
    try:
        return tokenizer.id_to_token(end_of_text_id(tokenizer))
    except TaperlitError:
        return None


def _read_figures(path: Path) -> dict[str, float]:
    mend = 'give --results a JSON object of numbers, such as {"loss before": 3.01}'
    figures = read_json(path, mend)
    check_fields(figures, dict[str, float], path, "it", mend)
    return figures


TARGETS = {"onnx": _to_onnx, "transformers": _to_transformers, "transformer-lens": _to_lens}
"""By program: takes the model's path, the directory to write, the dtype, a JSON file of figures or None, and whether to
replace the directory."""
