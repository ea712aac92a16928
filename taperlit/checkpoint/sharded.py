"""Sharded checkpoints, the directories that FSDP and FSDP2 write, read whole and without executing code.

torch's own reader unpickles the directory's ``.metadata`` and every value that is no tensor; the classes here take
only what such a checkpoint needs. Lightning resumes sharded runs through torch's reader, so :func:`check_sharded` goes
first.
"""

import hashlib
import io
import pickle
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from taperlit.checkpoint.archive import check_zip

META = "meta.pt"  # Lightning's name for all that is not sharded
DIGEST = ".metadata.sha256"  # ours: the one file of torch's without a checksum

_ALLOWED = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def digest(directory: Path) -> str:
    """The checksum of its ``.metadata``."""
    return hashlib.sha256((directory / ".metadata").read_bytes()).hexdigest()


def read_metadata(directory: Path) -> Metadata:
    """What torch wrote about the shards, without executing code.

    Raises:
        ValueError: it asks for anything that no checkpoint needs, or names files outside the directory.
    """
    with open(directory / ".metadata", "rb") as file:
        metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise ValueError(".metadata is no list of shards")
    for item in metadata.storage_data.values():
        if item.relative_path != Path(item.relative_path).name:
            raise ValueError(f"it names {item.relative_path}, outside the checkpoint")
    return metadata


def check_sharded(directory: Path) -> None:
    """Read every byte of a sharded checkpoint and see that nothing is missing, damaged or code.

    Raises:
        Exception: of many kinds, by where the damage is.
    """
    if (directory / DIGEST).read_text() != digest(directory):
        raise ValueError(".metadata in it is damaged")
    metadata = read_metadata(directory)
    check_zip(directory / META)
    for item in metadata.storage_data.values():
        with open(directory / item.relative_path, "rb") as file:
            file.seek(item.offset)
            part = io.BytesIO(file.read(item.length))
        check_zip(part)
        part.seek(0)
        torch.load(part, map_location="cpu", weights_only=True)


def read_sharded(directory: Path, optimizer: bool) -> dict[str, Any]:
    """The whole checkpoint as Lightning writes it on one process: all tensors on the CPU.

    Raises:
        Exception: of many kinds, by where the damage is.
    """
    checkpoint = torch.load(directory / META, map_location="cpu", weights_only=True)
    metadata = read_metadata(directory)
    flat = {
        key: _empty(kind)
        for key, kind in metadata.state_dict_metadata.items()
        if optimizer or key.startswith("state_dict.")
    }
    _fill(flat, directory)
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        _insert(nested, metadata.planner_data[key], value)
    checkpoint["state_dict"] = nested.pop("state_dict")
    if optimizer:
        states = [nested[key] for key in sorted(nested)]
        groups = [[state["param_groups"][i] for i in sorted(state["param_groups"])] for state in states]
        checkpoint["optimizer_states"] = [
            {"state": state["state"], "param_groups": group} for state, group in zip(states, groups, strict=True)
        ]
    return checkpoint


def tensors_of_sharded(directory: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """The shape and the bytes of each tensor in its state dict, () and 0 for what is none.

    Raises:
        Exception: of many kinds, by where the damage is.
    """
    metadata = read_metadata(directory)
    return {
        name: (tuple(kind.size), kind.size.numel() * kind.properties.dtype.itemsize)
        if isinstance(kind, TensorStorageMetadata)
        else ((), 0)
        for key, kind in metadata.state_dict_metadata.items()
        for part, name, *_ in [metadata.planner_data[key]]
        if part == "state_dict"
    }


def read_sharded_weights(directory: Path, names: Collection[str]) -> dict[str, Any]:
    """Some of its state dict, all tensors on the CPU.

    Raises:
        Exception: of many kinds, by where the damage is.
    """
    metadata = read_metadata(directory)
    wanted = {path: key for key, path in metadata.planner_data.items()}
    flat = {key: _empty(metadata.state_dict_metadata[key]) for key in (wanted["state_dict", name] for name in names)}
    _fill(flat, directory)
    return {name: flat[wanted["state_dict", name]] for name in names}


def _empty(kind: Any) -> torch.Tensor | None:
    return torch.empty(kind.size, dtype=kind.properties.dtype) if isinstance(kind, TensorStorageMetadata) else None


def _fill(flat: dict[str, Any], directory: Path) -> None:
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on one process it should be
        try:
            load(flat, storage_reader=_Reader(directory), planner=planner)
        except CheckpointException as error:  # no Exception of Python's
            reason, _ = next(iter(error.failures.values()))
            raise ValueError(str(reason)) from error


def _insert(tree: dict, path: tuple, value: Any) -> None:
    *parents, leaf = path
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value
