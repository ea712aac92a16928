"""A model as an ONNX graph for onnxruntime: one graph reads prompts and takes steps.

Shapes: B rows, T new tokens per row, N = B T, H query heads, K key/value heads, n = H + 2K, D head width, which
onnxruntime's attention wants as a multiple of 16: other heads are padded with zeros.
"""

import math
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from taperlit.decode.decoder import Decoder
from taperlit.decode.norms import Blend, FusedRmsNorm, LayerNorm, LinearMap, Norm
from taperlit.decode.product import Product
from taperlit.errors import TaperlitError
from taperlit.transformer import MLP_KINDS

GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
OPSET, IR_VERSION = 23, 10  # the first opset with RMSNormalization
CONTRIB = "com.microsoft"  # onnxruntime's own operators
HEAD_MULTIPLE = 16
PAGE = 4096  # bytes; larger tensors are in the file of weights, each at a multiple, so that it can be mapped

DESCRIPTION = """\
One step of a language model, or the reading of its prompts.

tokens: the new ones of each row; prompts that are shorter than others of the batch are padded on the right.
lengths: tokens of each row so far, the new ones counted, the padding not.
longest: when prompts are read, the number of new tokens per row; later the largest of the lengths.
past_key_values: the cache, with slots for the past alone (none at first) or for all that will come; in that case, if
each past and its present are one buffer, nothing of it is copied.
logits: of the token after each row."""


def library(name: str) -> Any:
    """Import ``onnx`` or ``onnxruntime``.

    Raises:
        TaperlitError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise TaperlitError(f"ONNX needs {name}, which is not installed: pip install 'taperlit[onnx]'.") from error


def padded_head(d_head: int) -> int:
    """D in the graph, for a model's head width."""
    return -(-d_head // HEAD_MULTIPLE) * HEAD_MULTIPLE


def write_graph(decoder: Decoder, directory: Path, dtype: torch.dtype) -> None:
    """Write ``model.onnx`` and, beside it, its weights.

    Args:
        decoder: on the CPU, read with fused RMSNorms. The graph computes what it does, operation by operation.
        directory: that exists.
        dtype: of weights, activations and cache: float32 or float16.

    Raises:
        TaperlitError: onnx is not installed.
        OSError: the disk refuses.
    """
    with open(directory / WEIGHTS, "wb") as weights:
        graph = Graph(weights, dtype)
        _write_nodes(graph, decoder)
    config, D = decoder.config, padded_head(decoder.config.head_width)
    caches = [f"{layer}.{name}" for layer in range(config.n_layer) for name in ("key", "value")]
    inputs = [
        graph.port("tokens", torch.int64, ["batch", "new"]),
        graph.port("lengths", torch.int64, ["batch"]),
        graph.port("longest", torch.int32, []),
        *(graph.port(f"past_key_values.{name}", dtype, ["batch", config.kv_heads, "past", D]) for name in caches),
    ]
    outputs = [
        graph.port("logits", dtype, ["batch", config.vocab_size]),
        *(graph.port(f"present.{name}", dtype, ["batch", config.kv_heads, "slots", D]) for name in caches),
    ]
    (directory / GRAPH).write_bytes(graph.model(inputs, outputs).SerializeToString())


class Graph:
    """A graph being written: small tensors go into it, large ones into a file, one at a time.

    Args:
        weights: the file.
        dtype: of floating tensors.
    """

    def __init__(self, weights: BinaryIO, dtype: torch.dtype) -> None:
        self.onnx, self.weights, self.dtype = library("onnx"), weights, dtype
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self._names: dict[tuple[object, ...], tuple[str, Tensor]] = {}  # of what is there, by its place in memory

    def add(self, kind: str, *inputs: str, outputs: list[str] | None = None, **attributes: object) -> str:
        """Append a node and return the name of its first output."""
        place = f"{len(self.nodes)}.{kind}"
        outputs = [place] if outputs is None else outputs
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, outputs, name=place, **attributes))
        return outputs[0]

    def tensor(self, name: str, value: Tensor) -> str:
        """Put a tensor into the graph and return its name: that of an earlier one where it is the same memory."""
        place = (value.data_ptr(), value.shape, value.stride())
        if place in self._names:
            return self._names[place][0]
        self._names[place] = name, value  # kept, so that its memory does not become another's
        array = value.to(self.dtype if value.is_floating_point() else value.dtype).contiguous().numpy()
        proto = self.onnx.TensorProto(
            name=name, dims=array.shape, data_type=self.onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        )
        if array.nbytes < PAGE:
            proto.raw_data = array.tobytes()
        else:
            self.weights.seek(-(-self.weights.tell() // PAGE) * PAGE)
            proto.data_location = self.onnx.TensorProto.EXTERNAL
            for key, entry in {"location": WEIGHTS, "offset": self.weights.tell(), "length": array.nbytes}.items():
                proto.external_data.add(key=key, value=str(entry))
            self.weights.write(array.data)
        self.tensors.append(proto)
        return name

    def integers(self, *values: int) -> str:
        """A constant vector."""
        return self.tensor(f"{len(self.tensors)}.integers", torch.tensor(values))

    def port(self, name: str, dtype: torch.dtype, shape: list[int | str]) -> Any:
        """An input or output; a dimension with a name may have any size."""
        element = self.onnx.helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype)
        return self.onnx.helper.make_tensor_value_info(name, element, shape)

    def model(self, inputs: list[Any], outputs: list[Any]) -> Any:
        """The whole."""
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, "taperlit", inputs, outputs, self.tensors, doc_string=DESCRIPTION)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="taperlit")


def _write_nodes(graph: Graph, decoder: Decoder) -> None:
    config, d_head = decoder.config, decoder.config.head_width
    H, K, D = config.n_head, config.kv_heads, padded_head(d_head)
    add, one = graph.add, graph.integers(1)
    shape = add("Shape", "tokens")
    new = add("Shape", "tokens", start=1, end=2)  # T
    rows = graph.integers(-1, config.d_model)
    per_token = add("Concat", shape, graph.integers(-1), axis=0)  # (B, T, whatever is left)
    attended_rows = graph.integers(-1, H * D)
    # Attention counts a row's slots from 0.
    last_slot = add("Cast", add("Sub", "lengths", one), to=graph.onnx.TensorProto.INT32)
    turns = []
    if decoder.angles is not None:
        padded = F.pad(decoder.angles, (0, 0, 0, (D - d_head) // 2))
        turns = [graph.tensor(name, padded[..., i]) for i, name in enumerate(("cos", "sin"))]

    x = add("Gather", graph.tensor("embed", decoder.embed), "tokens")  # (B, T, d_model)
    if decoder.pos_embed is not None:
        # A prompt, which may be padded beyond its length, is at 0 to T - 1; later tokens are the last of their rows.
        first = add("Max", add("Sub", "lengths", new), graph.integers(0))
        zero = graph.tensor("zero", torch.tensor(0))
        offset = add("Range", zero, add("Squeeze", new), graph.tensor("step", torch.tensor(1)))
        position = add("Add", add("Unsqueeze", first, one), offset)
        x = add("Add", x, add("Gather", graph.tensor("pos_embed", decoder.pos_embed), position))
    x = add("Reshape", x, rows)

    for i, block in enumerate(decoder.blocks):
        at = f"blocks.{i}"
        qkv = _pad_heads(block.qkv, d_head, D)
        y = _product(graph, f"{at}.qkv", qkv, _norm(graph, f"{at}.attn_norm", block.attn_norm, x, config.d_model))
        presents = [f"present.{i}.key", f"present.{i}.value"]
        pasts = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        y = add(
            "GroupQueryAttention",
            *(add("Reshape", y, per_token), "", "", *pasts, last_slot, "longest", *turns),
            outputs=[f"{at}.attended", *presents],
            domain=CONTRIB,
            num_heads=H,
            kv_num_heads=K,
            scale=1 / math.sqrt(d_head),
            do_rotary=int(bool(turns)),
            rotary_interleaved=int(bool(turns)),
        )
        o = Product(_pad_heads(Product(block.o.weight.t(), None), d_head, D).weight.t(), block.o.bias)
        x = _product(graph, f"{at}.o", o, add("Reshape", y, attended_rows), x)
        y = _product(graph, f"{at}.up", block.up, _norm(graph, f"{at}.mlp_norm", block.mlp_norm, x, config.d_model))
        if MLP_KINDS[block.mlp].gated:
            gate = add("Split", y, outputs=[f"{at}.gate", f"{at}.value"], axis=-1, num_outputs=2)
            y = add("Mul", _activation(graph, f"{at}.mlp", block.mlp, gate), f"{at}.value")
        else:
            y = _activation(graph, f"{at}.mlp", block.mlp, y)
        x = _product(graph, f"{at}.down", block.down, y, x)

    # Only the last token of each row goes on; where T is 1 the row may be long, and where it is padded it is shorter.
    last = add("Unsqueeze", add("Sub", add("Min", "lengths", new), one), one)  # (B, 1)
    x = add("GatherND", add("Reshape", x, per_token), last, batch_dims=1)  # (B, d_model)
    x = _norm(graph, "final_norm", decoder.final_norm, x, config.d_model)
    # The head as (vocab_size, d_model), so that one that is tied is in the file once.
    head = [graph.tensor("head.weight", decoder.head.weight.t())]
    if decoder.head.bias is not None:
        head.append(graph.tensor("head.bias", decoder.head.bias))
    add("Gemm", x, *head, outputs=["logits"], transB=1)


def _activation(graph: Graph, name: str, mlp: str, x: str) -> str:
    """What a kind of MLP does between its linear maps, one operation of onnxruntime."""
    match mlp:
        case "swiglu":
            return graph.add("QuickGelu", x, domain=CONTRIB, alpha=1.0)  # at alpha 1 it is SiLU
        case "glu":
            return graph.add("Sigmoid", x)
        case "gelu":
            return graph.add("Gelu", x, approximate="tanh")
        case "relu":
            return graph.add("Relu", x)
    raise TaperlitError(f"{name} is of the kind {mlp}, which ONNX export does not know.")


def _pad_heads(product: Product, d_head: int, D: int) -> Product:
    """Give every head of a product's output (d_in, heads d_head) D columns."""
    if d_head == D:
        return product

    def pad(tensor: Tensor) -> Tensor:
        return F.pad(tensor.unflatten(-1, (-1, d_head)), (0, D - d_head)).flatten(-2)

    return Product(pad(product.weight), None if product.bias is None else pad(product.bias))


def _product(graph: Graph, name: str, product: Product, x: str, residual: str | None = None) -> str:
    """``x W + b``, and a residual added in the same operation."""
    weight = graph.tensor(f"{name}.weight", product.weight)
    added = residual
    if product.bias is not None:
        bias = graph.tensor(f"{name}.bias", product.bias)
        added = bias if residual is None else graph.add("Add", residual, bias)
    return graph.add("MatMul", x, weight) if added is None else graph.add("Gemm", x, weight, added)


def _norm(graph: Graph, name: str, norm: Norm | None, x: str, width: int) -> str:
    """What is left of a norm; a normalization is one operation, which onnxruntime has a kernel for."""
    if norm is None:
        return x
    if isinstance(norm, FusedRmsNorm | LayerNorm):
        kind = "RMSNormalization" if isinstance(norm, FusedRmsNorm) else "LayerNormalization"
        parameters = [graph.tensor(f"{name}.weight", torch.ones(width) if norm.weight is None else norm.weight)]
        if isinstance(norm, LayerNorm) and norm.bias is not None:
            parameters.append(graph.tensor(f"{name}.bias", norm.bias))
        return graph.add(kind, x, *parameters, axis=-1, epsilon=norm.eps)
    if isinstance(norm, Blend):
        parts: list[str] = []
        for part, share in ((norm.norm, norm.gate), (norm.linear, 1 - norm.gate)):
            y = _norm(graph, f"{name}.{len(parts)}", part, x, width)
            parts.append(graph.add("Mul", y, graph.tensor(f"{name}.share.{len(parts)}", torch.tensor(share))))
        return graph.add("Add", *parts)
    if not isinstance(norm, LinearMap):
        raise TaperlitError(f"{name} is a {type(norm).__name__}, which ONNX export does not know.")
    if norm.centred:
        x = graph.add("Sub", x, graph.add("ReduceMean", x, graph.integers(-1)))
    x = graph.add("Mul", x, graph.tensor(f"{name}.scale", norm.scale))
    return x if norm.bias is None else graph.add("Add", x, graph.tensor(f"{name}.bias", norm.bias))
