"""Folded models as directories, and any model of ours from disk.

Everything in ``config.json`` is checked against the types here, sizes against the tensors before a model is built, each
file against its checksum there, and the tensors once more, as they come to memory, against the checksum in the metadata
of their own file. A folder that was written before there was such metadata loads without that last check.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from taperlit.checkpoint.assign import ModuleT, assign, build_hollow, check_finite, tied_names
from taperlit.checkpoint.atomic import recover, stamp, write_directory
from taperlit.checkpoint.checksum import TENSORS, checksum, checksum_of, checksum_of_tensor
from taperlit.checkpoint.plain import (
    cannot_be_read,
    check_fields,
    check_file,
    check_texts,
    damaged,
    read_json,
    read_text,
)
from taperlit.checkpoint.sizes import check_counts, check_sizes
from taperlit.errors import TaperlitError
from taperlit.hub.causal_lm import CausalLM
from taperlit.hub.families import as_transformer
from taperlit.hub.load import build_pretrained, load_pretrained, tokenizer_json_of
from taperlit.hub.lora import merge_lora
from taperlit.hub.origin import Origin
from taperlit.norm import tapered_norms
from taperlit.structure import Structure, apply_structure, owner
from taperlit.training.policy import taper_as_saved
from taperlit.training.source import Preset, source_of
from taperlit.transformer import Transformer, TransformerConfig, TransformerOverrides

FORMAT = "taperlit-folded-2"
WEIGHTS, BUFFERS, TOKENIZER = "model.safetensors", "buffers.safetensors", "tokenizer.json"
MEND = "fold the checkpoint again"
USE_ANOTHER = "use another one"


class _OriginRecord(TypedDict):
    """A :class:`taperlit.hub.origin.Origin` as plain data."""

    name: str
    files: dict[str, str]


class _Always(TypedDict):
    format: str
    model_class: str
    structure: Structure
    tied: dict[str, str]
    checksums: dict[str, int]


class Config(_Always, total=False):
    """What ``config.json`` holds.

    Keys:
        format: :data:`FORMAT`.
        model_class: the name of the model's class.
        structure: what folding did, see :class:`taperlit.structure.Structure`.
        model: the fields of :class:`taperlit.TransformerConfig`, where the model is our ``Transformer``.
        pretrained: the fields of :class:`taperlit.hub.origin.Origin`, where it is a ``CausalLM``.
        tied: other names of a tensor, and the one that it is stored under.
        checksums: the CRC-32 of each file, and of this one's other keys.
        step: optimizer steps that its run had taken, where it is of a run.
    """

    model: TransformerOverrides
    pretrained: _OriginRecord
    step: int


ModelT = TypeVar("ModelT", bound=nn.Module, covariant=True)


@dataclass(frozen=True)
class LoadedModel(Generic[ModelT]):
    """A model read from disk.

    Args:
        model: in eval mode and float32, whatever it was stored in.
        tokenizer_json: the text of its ``tokenizer.json``, or None where none was stored.
        sample: (n, T) token blocks of its validation split, or None.
        structure: what folding did to it, or None where it is not folded.
        step: optimizer steps that its run had taken, or None where that was not stored.
    """

    model: ModelT
    tokenizer_json: str | None
    sample: Tensor | None = None
    structure: Structure | None = None
    step: int | None = None


def write_folded(
    directory: str | Path,
    model: nn.Module,
    structure: Structure,
    tokenizer_json: str | None = None,
    force: bool = False,
    step: int | None = None,
) -> Path:
    """Write a folded model of any class: ``config.json``, ``model.safetensors`` and what else it has, all or nothing.

    Args:
        directory: made here; its files appear under this name only when all are safely on disk.
        model: after :func:`taperlit.fold`. Of a class that is not ours, its buffers that are not in its state dict are
            written too, into ``buffers.safetensors``: a constructor may not make them alike twice.
        structure: what ``fold`` returned.
        tokenizer_json: the text for ``tokenizer.json``, or None.
        force: replace a directory that exists.
        step: optimizer steps that its run had taken, which a report tells; None where it is of no run.

    Returns:
        The directory.

    Raises:
        TaperlitError: the directory exists or cannot be written, the model still has a TaperNorm or a parameter that is
            not finite, or it keeps state that is no dense tensor.
    """
    if left := next(iter(tapered_norms(model)), None):
        raise TaperlitError(f"{left} is still a TaperNorm; fold the model before it is written.")
    check_finite(model, type(model).__name__, "a model that diverged is not worth a folder")
    config: Config = {
        "format": FORMAT,
        "model_class": type(model).__name__,
        "structure": structure,
        "tied": {},
        "checksums": {},
    }
    if step is not None:
        config["step"] = step
    weights = model.state_dict()
    for name, value in weights.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            raise TaperlitError(f"{name} of {type(model).__name__} is no dense tensor with values, so it has no file.")
    buffers = {name: value for name, value in model.named_buffers(remove_duplicate=False) if name not in weights}
    if type(model) is Transformer:
        config["model"] = cast(TransformerOverrides, asdict(model.config))
        buffers = {}  # its constructor makes them of its config alone
    elif type(model) is CausalLM:
        config["pretrained"] = cast(_OriginRecord, asdict(model.origin))
        buffers = {}

    def fill(partial: Path) -> None:
        config["tied"] = _write_tensors(partial / WEIGHTS, weights)
        if buffers:
            config["tied"] |= _write_tensors(partial / BUFFERS, buffers)
        if tokenizer_json is not None:
            (partial / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
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
    before = _begin(directory)
    return _load(directory, build, _read_whole(directory), before)


def load_checkpoint(path: str | Path) -> LoadedModel[Transformer | CausalLM]:
    """The model, tokenizer and sample blocks in a checkpoint of ``taperlit fit``; adapters are merged.

    Raises:
        TaperlitError: as :func:`taperlit.checkpoint.reader.read_checkpoint`, or its weights do not fit its own config.
    """
    # Imported here, as it takes a good part of a second, which a folded model need not wait for.
    from taperlit.checkpoint.reader import open_checkpoint, read_weights, weight_shapes

    path = Path(path)
    try:
        recover(path)
        before = stamp(path) if path.exists() else None  # open_checkpoint says what is wrong
    except OSError as error:
        raise cannot_be_read(path, error, USE_ANOTHER) from error
    checkpoint = open_checkpoint(path)
    hparams, data = checkpoint["hyper_parameters"], checkpoint.get("TextDataModule", {})
    tokenizer_json, sample = data.get("tokenizer"), data.get("sample")
    sample = None if sample is None else sample.clone()
    step = checkpoint.get("global_step")
    try:
        policy = hparams["taper"]
        if not {"preset", "pretrained"} & {name for name, value in hparams.items() if value is not None}:
            raise KeyError("preset")
        source = source_of(hparams, origin_in(checkpoint))
    except TaperlitError as error:
        raise _within(path, error, USE_ANOTHER) from error
    except (TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise TaperlitError(f"{path} does not say which model it is of ({reason}); use another one.") from error
    del checkpoint, data  # what is mapped of the file
    shapes = weight_shapes(path, "model.")
    if isinstance(source, Preset):
        check_sizes(source.config, shapes, str(path), USE_ANOTHER)
    else:
        check_counts(source.origin.config, shapes, str(path), USE_ANOTHER)
    build: Callable[[], Transformer | CausalLM] = source.build
    model = build_hollow(build)
    taper_as_saved(model, policy, set(shapes))
    assign(model, read_weights(path, "model.", torch.float32, tied_names(model)), str(path))
    if stamp(path) != before:
        raise TaperlitError(f"{path} was replaced while it was read; load it again.")
    check_finite(model, str(path), "the run diverged before it was saved; use an earlier one")
    merge_lora(model)
    return LoadedModel(model.eval(), tokenizer_json, sample, step=step if isinstance(step, int) else None)


def origin_in(checkpoint: dict[str, Any]) -> Origin | None:
    """Where the pretrained model of a checkpoint's run came from; None of a run that had none."""
    written = checkpoint["taperlit"].get("origin")
    if written is None:
        return None
    path = Path("The checkpoint")
    check_fields(written, _OriginRecord, path, "origin", USE_ANOTHER)
    check_texts(written["files"], path, USE_ANOTHER)
    return Origin(**written)


def read_model(path: str | Path) -> LoadedModel[Transformer | CausalLM]:
    """Load a folded model's directory or a checkpoint of ``taperlit fit``, whichever ``path`` is, as it was written.

    Raises:
        TaperlitError: as :func:`load_folded` or :func:`load_checkpoint`, or it is a folded model of another class.
    """
    path = Path(path)
    try:
        recover(path)
        is_checkpoint = not path.is_dir() or _is_sharded(path)
    except OSError as error:
        raise cannot_be_read(path, error, USE_ANOTHER) from error
    if is_checkpoint:
        return load_checkpoint(path)
    before = _begin(path)
    config = _read_whole(path)
    build: Callable[[], Transformer | CausalLM]
    file = path / "config.json"
    if "model" in config:
        try:
            shape = TransformerConfig(**config["model"])
        except TaperlitError as error:
            raise _within(file, error, MEND) from error
        check_sizes(shape, _shapes(path / WEIGHTS, config["tied"]), str(file), MEND)
        build = partial(Transformer, shape)
    elif "pretrained" in config:
        origin = Origin(**config["pretrained"])
        check_texts(origin.files, file, MEND)
        check_counts(origin.config, _shapes(path / WEIGHTS, config["tied"]), str(file), MEND)
        build = partial(build_pretrained, origin)
    else:
        raise TaperlitError(
            f"{path} holds a {config['model_class']}, not taperlit's Transformer; load it with "
            f"taperlit.load_folded(directory, build=lambda: {config['model_class']}(...))."
        )
    model = cast("Transformer | CausalLM", _load(path, build, config, before, torch.float32))
    text = read_text(path / TOKENIZER, MEND) if TOKENIZER in config["checksums"] else None
    return LoadedModel(model, text, structure=config["structure"], step=config.get("step"))


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
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
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
    try:
        apply_structure(model, config["structure"])
    except (RuntimeError, ValueError, StopIteration) as error:  # a TaperlitError among them
        raise _within(directory / "config.json", error, MEND) from error
    assign(model, _read_tensors(directory / WEIGHTS, config["tied"], dtype), str(directory / WEIGHTS))
    if "model" not in config and "pretrained" not in config:
        _assign_buffers(model, directory / BUFFERS, config["tied"])
    check_finite(model, str(directory / WEIGHTS), MEND)
    if _stamps(directory) != before:
        raise TaperlitError(f"{directory} was replaced while it was read; load it again.")
    return model.eval()


def _is_sharded(directory: Path) -> bool:
    """Whether a directory is a sharded checkpoint; one that holds a folded model is known without the slow import."""
    if (directory / "config.json").exists():
        return False
    from taperlit.checkpoint.sharded import META

    return (directory / META).exists()


def _begin(directory: Path) -> dict[str, tuple[int, ...]]:
    """Undo what a killed process left half done, and note which files are there."""
    try:
        recover(directory)
        return _stamps(directory)
    except OSError as error:
        raise cannot_be_read(directory, error, MEND) from error


def _stamps(directory: Path) -> dict[str, tuple[int, ...]]:
    return {path.name: stamp(path) for path in directory.glob("*")}


def read_config(directory: Path) -> Config:
    """What a folded model's ``config.json`` says, without a look at the files beside it.

    Args:
        directory: that :func:`write_folded` made.

    Raises:
        TaperlitError: it is no such directory, of another version, or the file is missing or not as it was written.
    """
    path = directory / "config.json"
    try:
        is_other, is_there = directory.is_file() or _is_sharded(directory), path.exists()
    except OSError as error:
        raise cannot_be_read(path, error, MEND) from error
    if is_other:
        raise TaperlitError(f"{directory} is not a folded model's directory; fold the checkpoint first.")
    if not is_there:
        raise TaperlitError(f"{directory} has no config.json; name a directory that `taperlit fold` wrote.")
    config = read_json(path, MEND)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        written = str(config.get("format")) if isinstance(config, dict) else ""
        if written.startswith("taperlit-folded-"):
            raise TaperlitError(f"{directory} was written by another version of taperlit; fold the checkpoint again.")
        raise TaperlitError(f"{path} is not of a folded model; name a directory that `taperlit fold` wrote.")
    record = config.get("structure")
    # A record that was made by hand may have measured nothing.
    measured = {"structure": {"difference": 0.0, **record}} if isinstance(record, dict) else {}
    check_fields({**config, **measured}, Config, path, "it", MEND)
    sums = config["checksums"]
    if path.name not in sums:
        raise TaperlitError(f"{path}: checksums.{path.name} is missing; {MEND}.")
    if sums[path.name] != checksum_of(config):
        raise damaged(path, "its checksum differs", MEND)
    return cast(Config, config)


def _read_whole(directory: Path) -> Config:
    """The same, once every file is known to be as it was written."""
    config = read_config(directory)
    _check_files(directory, config["checksums"])
    return config


def _check_files(directory: Path, checksums: dict[str, int]) -> None:
    """Compare every file but ``config.json`` with its checksum, and see that each has one."""
    optional = [name for name in (BUFFERS, TOKENIZER) if (directory / name).exists()]
    for name in (WEIGHTS, *optional):
        if name not in checksums:
            raise TaperlitError(f"{directory / 'config.json'}: checksums.{name} is missing; {MEND}.")
    for name, expected in checksums.items():
        file = directory / name
        if name not in ("config.json", WEIGHTS, BUFFERS, TOKENIZER):
            raise TaperlitError(f"{directory / 'config.json'}: checksums.{name[:60]} is of no file of ours; {MEND}.")
        if name != "config.json":
            check_file(file, MEND)
            try:
                differs = expected != checksum(file)
            except OSError as error:
                raise cannot_be_read(file, error, MEND) from error
            if differs:
                raise damaged(file, "its checksum differs", MEND)


def _within(path: Path, error: Exception, mend: str) -> TaperlitError:
    """An error about what a file says, with the file's name."""
    words = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return TaperlitError(f"{path}: {words}; {mend}.")


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
    value = 0
    for name in sorted(kept):
        value = checksum_of_tensor(name, kept[name], value)
    try:
        save_file(kept, path, {TENSORS: f"{value:08x}"})
    except (SafetensorError, KeyError) as error:  # the disk, or a dtype that it does not know
        raise TaperlitError(f"{path.name} cannot be written: {' '.join(str(error).split())}.") from error
    return tied


def _shapes(path: Path, tied: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a safetensors file under each of its names; no tensor is read."""
    with _told(path), safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes | {name: shapes[same] for name, same in tied.items() if same in shapes}


def _read_tensors(path: Path, tied: dict[str, str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of a safetensors file under each of its names, floating ones as ``dtype``.

    Raises:
        TaperlitError: missing or damaged, or the tensors are not those that its checksum is of.
    """
    tensors, value = {}, 0
    with _told(path):
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            expected = (file.metadata() or {}).get(TENSORS)
        for name in names:
            # The pages of a mapped file that were read count as memory: map it anew for each tensor that is copied.
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
                if expected is not None:
                    value = checksum_of_tensor(name, tensor, value)
                tensors[name] = tensor.to(dtype if tensor.is_floating_point() else None, copy=True)
    if expected not in (None, f"{value:08x}"):
        raise damaged(path, "its tensors are not those that its checksum is of", MEND)
    if both := sorted(tied.keys() & tensors.keys()):
        raise TaperlitError(f"{path}: {both[0]} is stored, and tied to {tied[both[0]]} in config.json; {MEND}.")
    return tensors | {name: tensors[same] for name, same in tied.items() if same in tensors}


@contextmanager
def _told(path: Path) -> Iterator[None]:
    check_file(path, MEND)
    try:
        yield
    except OSError as error:
        raise cannot_be_read(path, error, MEND) from error
    except (SafetensorError, TypeError, ValueError, RuntimeError) as error:  # the last: a dtype that torch has not
        raise damaged(path, error, MEND) from error


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
