"""Checksums of a directory's files, kept in its ``config.json`` with one of that file's other keys."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

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
