"""Folded models as directories, and any model of ours from disk."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from taperlit.checkpoint.assign import ModuleT, assign, build_hollow, tied_names
from taperlit.checkpoint.atomic import recover, stamp, write_directory
from taperlit.checkpoint.checksum import checksum, checksum_of
from taperlit.errors import TaperlitError
from taperlit.norm import tapered_norms
from taperlit.structure import Structure, apply_structure, owner
from taperlit.training.policy import apply_policy
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
        tied: other names of a tensor, and the one that it is stored under.
        checksums: the CRC-32 of each file, and of this one's other keys.
    """

    format: str
    model_class: str
    structure: Structure
    model: dict[str, Any]
    tied: dict[str, str]
    checksums: dict[str, int]


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
    sample: Tensor | None = None


def config_from_hparams(preset: str, overrides: Mapping[str, Any] | None = None, **_: object) -> TransformerConfig:
    """The transformer's config from the hyper-parameters that ``LanguageModel`` keeps in its checkpoints.

    Raises:
        TaperlitError: no preset or field of that name.
    """
    return TransformerConfig.from_preset(preset, **(overrides or {}))


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
        model: after :func:`taperlit.fold`. Where it is not our ``Transformer``, its buffers that are not in its state
            dict are written too, into ``buffers.safetensors``: a constructor may not make them alike twice.
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


def load_checkpoint(path: str | Path) -> LoadedModel:
    """The transformer, tokenizer and sample blocks in a checkpoint of ``taperlit fit``.

    Raises:
        TaperlitError: as :func:`taperlit.checkpoint.reader.read_checkpoint`, or its weights do not fit its own config.
    """
    # Imported here, as it takes a good part of a second, which a folded model need not wait for.
    from taperlit.checkpoint.reader import open_checkpoint, read_weights

    path = Path(path)
    recover(path)
    before = stamp(path) if path.exists() else None  # open_checkpoint says what is wrong
    checkpoint = open_checkpoint(path)
    hparams, data = checkpoint["hyper_parameters"], checkpoint.get("TextDataModule", {})
    tokenizer_json, sample = data.get("tokenizer"), data.get("sample")
    sample = None if sample is None else sample.clone()
    del checkpoint, data  # what is mapped of the file
    try:
        config, taper = config_from_hparams(**hparams), hparams["taper"]
    except (TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise TaperlitError(f"{path} does not say which model it is of ({reason}); use another one.") from error
    model = build_hollow(lambda: Transformer(config))
    apply_policy(model, taper)
    assign(model, read_weights(path, "model.", torch.float32, tied_names(model)), str(path))
    if stamp(path) != before:
        raise TaperlitError(f"{path} was replaced while it was read; load it again.")
    return LoadedModel(model.eval(), tokenizer_json, sample)


def load_model(path: str | Path) -> LoadedModel:
    """Load a folded ``Transformer``'s directory or a checkpoint of ``taperlit fit``, whichever ``path`` is.

    Raises:
        TaperlitError: as :func:`load_folded` or :func:`load_checkpoint`, or it is a folded model of another class.
    """
    path = Path(path)
    recover(path)
    if not path.is_dir() or _is_sharded(path):
        return load_checkpoint(path)
    before = _stamps(path)
    config = _read_config(path)
    if "model" not in config:
        raise TaperlitError(
            f"{path} holds a {config['model_class']}, not taperlit's Transformer; load it with "
            f"taperlit.load_folded(directory, build=lambda: {config['model_class']}(...))."
        )
    try:
        shape = TransformerConfig(**config["model"])
    except TypeError as error:
        raise _damaged(path / "config.json", error) from error
    model = _load(path, lambda: Transformer(shape), config, before, torch.float32)
    tokenizer = path / TOKENIZER
    return LoadedModel(model, tokenizer.read_text() if tokenizer.exists() else None)


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
    if "model" not in config:
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
