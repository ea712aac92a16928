"""Decoding with onnxruntime, from a directory that an export wrote."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import torch
from torch import Tensor

from taperlit.checkpoint.checksum import checksum, checksum_of
from taperlit.checkpoint.plain import cannot_be_read, check_fields, check_file, damaged, read_json
from taperlit.decode.loop import Decoding
from taperlit.decode.onnx_graph import GRAPH, library
from taperlit.errors import TaperlitError

FORMAT = "taperlit-onnx-1"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
MEND = "export the model again"


class Shapes(TypedDict):
    """What ``config.json`` says of the model: as :class:`taperlit.TransformerConfig`, a head's width padded.

    Keys:
        n_layer: blocks.
        n_kv_head: key/value heads.
        d_head: width of a head of the cache.
        vocab_size: tokens in the vocabulary.
        block_size: longest context, in tokens.
        dtype: of weights, activations and cache.
    """

    n_layer: int
    n_kv_head: int
    d_head: int
    vocab_size: int
    block_size: int
    dtype: Literal["float32", "float16"]


class Config(TypedDict):
    """What ``config.json`` holds.

    Keys:
        format: :data:`FORMAT`.
        model: see :class:`Shapes`.
        checksums: the CRC-32 of each file, and of this one's other keys.
    """

    format: str
    model: Shapes
    checksums: dict[str, int]


class OnnxEngine(Decoding):
    """Decodes in onnxruntime on the CPU, with the interface and the sampling of :class:`taperlit.decode.Engine`.

    Example::

        engine = OnnxEngine("model-onnx", batch_size=2)
        tokens = engine.generate([[5, 7, 11], [2]], max_new_tokens=20)

    It uses as many threads as torch has when it is built. They wait busily for the next operation, as onnxruntime's do
    by default: on processors that others use too, give torch fewer.

    Args:
        directory: written by :func:`taperlit.decode.onnx_export.export_onnx` or ``taperlit export --to onnx``.
        batch_size: rows decoded together.
        length: most tokens per row, prompt included; None is the model's context.
        optimized: a file to write the graph to as onnxruntime runs it, for those who want to look at it.

    Attributes:
        config: what ``config.json`` says of the model.

    Raises:
        TaperlitError: onnxruntime is not installed, the directory is no such one or damaged, or ``batch_size`` or
            ``length`` are out of range.
    """

    def __init__(
        self, directory: str | Path, batch_size: int = 1, length: int | None = None, *, optimized: str | None = None
    ) -> None:
        runtime = library("onnxruntime")
        directory = Path(directory)
        self.config = config = read_config(directory)["model"]
        super().__init__(batch_size, length, config["block_size"], config["vocab_size"], torch.device("cpu"))
        self.dtype: torch.dtype = getattr(torch, config["dtype"])
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        if optimized is not None:
            options.optimized_model_filepath = optimized
        self.session = runtime.InferenceSession(directory / GRAPH, options, providers=["CPUExecutionProvider"])
        shape = config["n_layer"], 2, batch_size, config["n_kv_head"], self.length, config["d_head"]
        self.cache = torch.zeros(shape, dtype=self.dtype)  # keys and values of each layer
        self._lengths = torch.zeros(batch_size, dtype=torch.int64)
        self._longest = torch.zeros((), dtype=torch.int32)
        self._logits = torch.zeros(batch_size, self.vocab_size, dtype=self.dtype)
        self._tokens = torch.zeros(batch_size, 1, dtype=torch.int64)
        self._step = self._bind(self._tokens)

    def _read(self, rows: list[list[int]]) -> Tensor:
        lengths = [len(row) for row in rows]
        T = max(lengths)
        tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])  # which nothing sees, on the right
        self._lengths.copy_(torch.tensor(lengths))
        self._longest.fill_(T)
        self.session.run_with_iobinding(self._bind(tokens))
        return self._logits.clone()

    def _append(self, tokens: Tensor) -> Tensor:
        self._tokens[:, 0] = tokens
        self._lengths += 1
        self._longest += 1
        self.session.run_with_iobinding(self._step)
        return self._logits.clone()

    def _bind(self, tokens: Tensor) -> Any:
        """Where a run finds its inputs and puts its outputs: tensors of ours, of which nothing is copied."""
        binding = self.session.io_binding()

        def place(name: str, tensor: Tensor) -> tuple[object, ...]:
            return name, "cpu", 0, tensor.numpy().dtype.type, list(tensor.shape), tensor.data_ptr()

        for name, tensor in {"tokens": tokens, "lengths": self._lengths, "longest": self._longest}.items():
            binding.bind_input(*place(name, tensor))
        for layer, tensors in enumerate(self.cache):
            for name, tensor in zip(("key", "value"), tensors, strict=True):
                # Both are the same memory, which the graph takes for permission to write the new slots in place.
                binding.bind_input(*place(f"past_key_values.{layer}.{name}", tensor))
                binding.bind_output(*place(f"present.{layer}.{name}", tensor))
        binding.bind_output(*place("logits", self._logits))
        return binding


def write_config(directory: Path, model: Mapping[str, Any]) -> None:
    """Write ``config.json``: the model's :class:`Shapes`, and the checksum of every file that is there."""
    config: dict[str, Any] = {"format": FORMAT, "model": model}
    config["checksums"] = {path.name: checksum(path) for path in sorted(directory.iterdir())}
    config["checksums"][CONFIG] = checksum_of(config)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_config(directory: Path) -> Config:
    """Read ``config.json`` and compare every file with its checksum.

    Raises:
        TaperlitError: it is not there, another program's or version's, or a file is missing or damaged.
    """
    path = directory / CONFIG
    try:
        if not path.exists():
            raise TaperlitError(f"{directory} has no {CONFIG}; name what `taperlit export --to onnx` wrote.")
    except OSError as error:
        raise cannot_be_read(path, error, MEND) from error
    config = read_json(path, MEND)
    written = config.get("format") if isinstance(config, dict) else None
    if written != FORMAT:
        if str(written).startswith("taperlit-onnx-"):
            raise TaperlitError(f"{directory} was written by another version of taperlit; {MEND}.")
        raise TaperlitError(f"{directory} is no ONNX export; name what `taperlit export --to onnx` wrote.")
    check_fields(config, Config, path, "it", MEND)
    config = cast(Config, config)
    for name, value in config["model"].items():
        if isinstance(value, int) and value < 1:
            raise TaperlitError(f"{path}: it.model.{name} is {value}, and must be at least 1; {MEND}.")
    sums = config["checksums"]
    for name in (CONFIG, GRAPH):
        if name not in sums:
            raise TaperlitError(f"{path}: checksums.{name} is missing; {MEND}.")
    if sums[CONFIG] != checksum_of(config):
        raise damaged(path, "its checksum differs", MEND)
    for name, expected in sums.items():
        file = directory / name
        if Path(name).name != name:
            raise TaperlitError(f"{path}: checksums.{name[:60]} is of no file beside it; {MEND}.")
        if name != CONFIG:
            check_file(file, MEND)
            try:
                differs = checksum(file) != expected
            except OSError as error:
                raise cannot_be_read(file, error, MEND) from error
            if differs:
                raise damaged(file, "its checksum differs", MEND)
    return config
