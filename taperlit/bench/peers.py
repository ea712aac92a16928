"""The models that ours are measured beside: ``transformers``' own of the same weights, and onnxruntime's."""

import copy
from importlib.util import find_spec

import torch
from torch import nn

from taperlit.decode.onnx_engine import OnnxEngine
from taperlit.decode.onnx_export import DTYPES, onnx_engine
from taperlit.errors import TaperlitError
from taperlit.hub.families import as_causal_lm
from taperlit.transformer import Transformer


class Unavailable(Exception):
    """A peer cannot be measured here; the message says why."""


def converted(model: Transformer) -> nn.Module:
    """A model of ours as ``transformers``' own, with a copy of its weights, on the same device and in eval mode.

    Raises:
        Unavailable: ``transformers`` is not installed or has no such model.
    """
    if find_spec("transformers") is None:
        raise Unavailable("transformers is not installed")
    try:
        return as_causal_lm(copy.deepcopy(model)).lm.eval()  # the copy shares its memory, and is trained
    except TaperlitError as error:
        raise Unavailable(str(error)) from error


def onnxruntime_engine(model: Transformer, batch_size: int, length: int, dtype: torch.dtype) -> OnnxEngine:
    """A model of ours exported to ONNX and opened in onnxruntime, on the CPU.

    Raises:
        Unavailable: onnx or onnxruntime is not installed, or has no such dtype.
    """
    for name in ("onnx", "onnxruntime"):
        if find_spec(name) is None:
            raise Unavailable(f"{name} is not installed")
    if dtype not in DTYPES:
        raise Unavailable(f"the ONNX export has no {str(dtype).removeprefix('torch.')}")
    return onnx_engine(model, batch_size, length, dtype)
