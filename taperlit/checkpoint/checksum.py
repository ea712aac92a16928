"""Checksums of a directory's files, kept in its ``config.json`` with one of that file's other keys; and of tensors,
kept in the file that holds them."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

CHECKSUMS = "checksums"  # the key


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def checksum_of(config: Mapping[str, object]) -> int:
    """The CRC-32 of a config, but for its checksums."""
    others = {key: value for key, value in config.items() if key != CHECKSUMS}
    return zlib.crc32(json.dumps(others, sort_keys=True).encode())


TENSORS = "taperlit.crc32"  # the key in a safetensors file's metadata


def checksum_of_tensor(name: str, tensor: Tensor, value: int = 0) -> int:
    """The CRC-32 of a tensor's name, dtype, shape and values.

    Args:
        name: of the tensor.
        tensor: dense, on any device.
        value: that of the tensors before it: those of a file are taken in the order of their names.
    """
    value = zlib.crc32(f"{name} {tensor.dtype} {[*tensor.shape]}".encode(), value)
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
