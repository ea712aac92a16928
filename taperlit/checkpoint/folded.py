"""Folded models as directories, and any model of ours from disk."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from taperlit.checkpoint.assign import ModuleT, assign, build_hollow, tied_names
from taperlit.checkpoint.atomic import recover, stamp, write_directory
from taperlit.checkpoint.checksum import checksum, checksum_of
from taperlit.errors import TaperlitError
from taperlit.hub.causal_lm import CausalLM
from taperlit.hub.families import as_transformer
from taperlit.hub.load import build_pretrained, load_pretrained, tokenizer_json_of
from taperlit.hub.lora import merge_lora
from taperlit.hub.origin import Origin
from taperlit.norm import tapered_norms
from taperlit.structure import Structure, apply_structure, owner
from taperlit.training.policy import taper_as_saved
from taperlit.training.source import source_of
from taperlit.transformer import Transformer, TransformerConfig

FORMAT = "taperlit-folded-2"
WEIGHTS, BUFFERS, TOKENIZER = "model.safetensors", "buffers.safetensors", "tokenizer.json"


class Config(TypedDict, total=False):
    """What ``config.json`` holds.

    Keys:
        format: :data:`FORMAT`.
        model_class: the name of the model's class.
        structure: what folding did, see :class:`taperlit.structure.Structure`.
        model: the fields of :class:`taperlit.TransformerConfig`, where the model is our ``Transformer``.
        pretrained: the fields of :class:`taperlit.hub.origin.Origin`, where it is a ``CausalLM``.
        tied: other names of a tensor, and the one that it is stored under.
        checksums: the CRC-32 of each file, and of this one's other keys.
    """

    format: str
    model_class: str
    structure: Structure
    model: dict[str, Any]
    pretrained: dict[str, Any]
    tied: dict[str, str]
    checksums: dict[str, int]


ModelT = TypeVar("ModelT", bound=nn.Module, covariant=True)


@dataclass(frozen=True)
class LoadedModel(Generic[ModelT]):
    """A model read from disk.

    Args:
        model: in eval mode and float32, whatever it was stored in.
        tokenizer_json: the text of its ``tokenizer.json``, or None where none was stored.
        sample: (n, T) token blocks of its validation split, or None.
        structure: what folding did to it, or None where it is not folded.
    """

    model: ModelT
    tokenizer_json: str | None
    sample: Tensor | None = None
    structure: Structure | None = None


def write_folded(
    directory: str | Path,
    model: nn.Module,
    structure: Structure,
    tokenizer_json: str | None = None,
    force: bool = False,
) -> Path:
    """Write a folded model of any class: ``config.json``, ``model.safetensors`` and what else it has, all or nothing.

    Args:
        directory: made here; its files appear under this name only when all are safely on disk.
        model: after :func:`taperlit.fold`. Of a class that is not ours, its buffers that are not in its state dict are
            written too, into ``buffers.safetensors``: a constructor may not make them alike twice.
        structure: what ``fold`` returned.
        tokenizer_json: the text for ``tokenizer.json``, or None.
        force: replace a directory that exists.

    Returns:
        The directory.

    Raises:
        TaperlitError: the directory exists or cannot be written, the model still has a TaperNorm, or it keeps state
            that is no dense tensor.
    """
    if left := next(iter(tapered_norms(model)), None):
        raise TaperlitError(f"{left} is still a TaperNorm; fold the model before it is written.")
    config: Config = {"format": FORMAT, "model_class": type(model).__name__, "structure": structure}
    weights = model.state_dict()
    for name, value in weights.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            raise TaperlitError(f"{name} of {type(model).__name__} is no dense tensor with values, so it has no file.")
    buffers = {name: value for name, value in model.named_buffers(remove_duplicate=False) if name not in weights}
    if type(model) is Transformer:
        config["model"] = asdict(model.config)
        buffers = {}  # its constructor makes them of its config alone
    elif type(model) is CausalLM:
        config["pretrained"] = asdict(model.origin)
        buffers = {}

    def fill(partial: Path) -> None:
        config["tied"] = _write_tensors(partial / WEIGHTS, weights)
        if buffers:
            config["tied"] |= _write_tensors(partial / BUFFERS, buffers)
        if tokenizer_json is not None:
            (partial / TOKENIZER).write_text(tokenizer_json)
        config["checksums"] = {path.name: checksum(path) for path in sorted(partial.iterdir())}
        config["checksums"]["config.json"] = checksum_of(config)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in partial.glob("*.safetensors"):  # which safetensors makes for the user alone, whatever the umask
            shutil.copymode(partial / "config.json", path)

    return write_directory(Path(directory), fill, force)


def load_folded(directory: str | Path, build: Callable[[], ModuleT]) -> ModuleT:
    """Load a folded model of any class.

    The parameters that the constructor makes hold no memory, so that the peak is one copy of the weights.

    Example::

        structure = fold(model, lambda: model(x))
        write_folded("folded", model, structure)
        ...
        model = load_folded("folded", build=lambda: MyModel(width=256))

    Args:
        directory: written by :func:`write_folded`, ``FoldOnEnd`` or ``taperlit fold``.
        build: returns the model as its class builds it: plain, neither tapered nor folded.

    Returns:
        The folded model on the CPU, in eval mode and in the dtypes it was written in; its parameters are tied as they
        were then.

    Raises:
        TaperlitError: a file is missing, damaged, another program's or another version's; ``build`` returns another
            class, or a model that the tensors do not fit; or its constructor needs the values of parameters.
    """
    directory = Path(directory)
    recover(directory)
    before = _stamps(directory)
    return _load(directory, build, _read_config(directory), before)


def load_checkpoint(path: str | Path) -> LoadedModel[Transformer | CausalLM]:
    """The model, tokenizer and sample blocks in a checkpoint of ``taperlit fit``; adapters are merged.

    Raises:
        TaperlitError: as :func:`taperlit.checkpoint.reader.read_checkpoint`, or its weights do not fit its own config.
    """
    # Imported here, as it takes a good part of a second, which a folded model need not wait for.
    from taperlit.checkpoint.reader import open_checkpoint, read_weights, weight_names

    path = Path(path)
    recover(path)
    before = stamp(path) if path.exists() else None  # open_checkpoint says what is wrong
    checkpoint = open_checkpoint(path)
    hparams, data = checkpoint["hyper_parameters"], checkpoint.get("TextDataModule", {})
    tokenizer_json, sample = data.get("tokenizer"), data.get("sample")
    sample = None if sample is None else sample.clone()
    try:
        policy = hparams["taper"]
        if not {"preset", "pretrained"} & {name for name, value in hparams.items() if value is not None}:
            raise KeyError("preset")
        source = source_of(hparams, origin_in(checkpoint))
    except (TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise TaperlitError(f"{path} does not say which model it is of ({reason}); use another one.") from error
    del checkpoint, data  # what is mapped of the file
    build: Callable[[], Transformer | CausalLM] = source.build
    model = build_hollow(build)
    taper_as_saved(model, policy, weight_names(path, "model."))
    assign(model, read_weights(path, "model.", torch.float32, tied_names(model)), str(path))
    if stamp(path) != before:
        raise TaperlitError(f"{path} was replaced while it was read; load it again.")
    merge_lora(model)
    return LoadedModel(model.eval(), tokenizer_json, sample)


def origin_in(checkpoint: dict[str, Any]) -> Origin | None:
    """Where the pretrained model of a checkpoint's run came from; None of a run that had none."""
    written = checkpoint["taperlit"].get("origin")
    return None if written is None else Origin(**written)


def read_model(path: str | Path) -> LoadedModel[Transformer | CausalLM]:
    """Load a folded model's directory or a checkpoint of ``taperlit fit``, whichever ``path`` is, as it was written.

    Raises:
        TaperlitError: as :func:`load_folded` or :func:`load_checkpoint`, or it is a folded model of another class.
    """
    path = Path(path)
    recover(path)
    if not path.is_dir() or _is_sharded(path):
        return load_checkpoint(path)
    before = _stamps(path)
    config = _read_config(path)
    build: Callable[[], Transformer | CausalLM]
    try:
        if "model" in config:
            shape = TransformerConfig(**config["model"])
            build = partial(Transformer, shape)
        elif "pretrained" in config:
            build = partial(build_pretrained, Origin(**config["pretrained"]))
        else:
            raise TaperlitError(
                f"{path} holds a {config['model_class']}, not taperlit's Transformer; load it with "
                f"taperlit.load_folded(directory, build=lambda: {config['model_class']}(...))."
            )
    except TypeError as error:
        raise _damaged(path / "config.json", error) from error
    model = cast("Transformer | CausalLM", _load(path, build, config, before, torch.float32))
    tokenizer = path / TOKENIZER
    text = tokenizer.read_text() if tokenizer.exists() else None
    return LoadedModel(model, text, structure=config["structure"])


def load_model(path: str | Path) -> LoadedModel[Transformer]:
    """As :func:`read_model`, with a pretrained model made ours, which is what decodes and is exported to ONNX.

    Raises:
        TaperlitError: as :func:`read_model`, or a pretrained model of a family that has no table of names.
    """
    loaded = read_model(path)
    return replace(loaded, model=as_transformer(loaded.model))  # type: ignore[return-value]


def load_any(source: str | Path) -> LoadedModel[Transformer | CausalLM]:
    """A folded model or a checkpoint as :func:`read_model` has it, or else a pretrained model.

    Args:
        source: a path of ours; or a name on the hub, a folder of ``transformers``, or a ``.gguf`` file.

    Raises:
        TaperlitError: it is neither, or cannot be read.
    """
    path = Path(source)
    if path.exists() and path.suffix != ".gguf" and (path.is_file() or _is_ours(path)):
        return read_model(path)
    return LoadedModel(load_pretrained(str(source)), tokenizer_json_of(str(source)))


def _is_ours(directory: Path) -> bool:
    """Whether a directory holds a folded model or a sharded checkpoint, damaged or not, of taperlit."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return _is_sharded(directory)
    return isinstance(config, dict) and str(config.get("format")).startswith("taperlit-")


def _load(
    directory: Path,
    build: Callable[[], ModuleT],
    config: Config,
    before: dict[str, tuple[int, ...]],
    dtype: torch.dtype | None = None,
) -> ModuleT:
    model = build_hollow(build)
    if type(model).__name__ != config["model_class"]:
        raise TaperlitError(
            f"{directory} holds a {config['model_class']}, and build() returned a {type(model).__name__}; "
            f"build the {config['model_class']}."
        )
    apply_structure(model, config["structure"])
    assign(model, _read_tensors(directory / WEIGHTS, config["tied"], dtype), str(directory / WEIGHTS))
    if "model" not in config and "pretrained" not in config:
        _assign_buffers(model, directory / BUFFERS, config["tied"])
    if _stamps(directory) != before:
        raise TaperlitError(f"{directory} was replaced while it was read; load it again.")
    return model.eval()


def _is_sharded(directory: Path) -> bool:
    """Whether a directory is a sharded checkpoint; one that holds a folded model is known without the slow import."""
    if (directory / "config.json").exists():
        return False
    from taperlit.checkpoint.sharded import META

    return (directory / META).exists()


def _stamps(directory: Path) -> dict[str, tuple[int, ...]]:
    return {path.name: stamp(path) for path in directory.glob("*")}


def _read_config(directory: Path) -> Config:
    path = directory / "config.json"
    if directory.is_file() or _is_sharded(directory):
        raise TaperlitError(f"{directory} is not a folded model's directory; fold the checkpoint first.")
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise TaperlitError(f"{directory} has no config.json; name a directory that `taperlit fold` wrote.") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        written = str(config.get("format")) if isinstance(config, dict) else ""
        if written.startswith("taperlit-folded-"):
            raise TaperlitError(f"{directory} was written by another version of taperlit; fold the checkpoint again.")
        raise TaperlitError(f"{path} is not of a folded model; name a directory that `taperlit fold` wrote.")
    config = cast(Config, config)
    try:
        for name, expected in config["checksums"].items():
            file = directory / name
            if expected != (checksum_of(config) if name == "config.json" else checksum(file)):
                raise _damaged(file, "its checksum differs")
    except (OSError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(path if not isinstance(error, OSError) else Path(error.filename), error) from error
    return config


def _damaged(path: Path, reason: object) -> TaperlitError:
    if isinstance(reason, FileNotFoundError):
        return TaperlitError(f"{path} is missing; fold the checkpoint again.")
    words = " ".join(str(reason).split())[:200]
    return TaperlitError(f"{path} is damaged ({words}); fold the checkpoint again.")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write a safetensors file, a shared tensor once; return its other names, each with the one that it has there."""
    first: dict[tuple, str] = {}
    tied, kept, storages = {}, {}, set()
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and (same := first.setdefault(place, name)) != name:
            tied[name] = same
            continue
        storage = tensor.untyped_storage().data_ptr()
        # Of what overlaps without being the same, a transposed matrix say, safetensors takes copies only.
        kept[name] = tensor.clone(memory_format=torch.contiguous_format) if storage in storages else tensor.contiguous()
        storages.add(storage)
    try:
        save_file(kept, path)
    except (SafetensorError, KeyError) as error:  # the disk, or a dtype that it does not know
        raise TaperlitError(f"{path.name} cannot be written: {' '.join(str(error).split())}.") from error
    return tied


def _read_tensors(path: Path, tied: dict[str, str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of a safetensors file under each of its names, floating ones as ``dtype``."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            # The pages of a mapped file that were read count as memory: map it anew for each tensor that is copied.
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
                tensors[name] = tensor.to(dtype if tensor.is_floating_point() else None, copy=True)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    return tensors | {name: tensors[same] for name, same in tied.items() if same in tensors}


def _assign_buffers(model: nn.Module, path: Path, tied: dict[str, str]) -> None:
    """Give a model the values of the buffers that are not in its state dict."""
    buffers = _read_tensors(path, tied) if path.exists() else {}
    saved = model.state_dict().keys()
    for name, _ in model.named_buffers(remove_duplicate=False):
        if name not in saved and name not in buffers:
            raise TaperlitError(f"{path.parent} has no buffer {name}, which build() makes; build the model it is of.")
    for name, values in buffers.items():
        try:
            module, leaf = owner(model, name)
            known = leaf in module._buffers
        except AttributeError:
            known = False
        if not known:
            raise TaperlitError(
                f"{path.parent} has a buffer {name}, which build() does not make; build the model it is of, with every "
                "buffer registered in its constructor."
            )
        module._buffers[leaf] = values
