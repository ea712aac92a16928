"""The archives that ``torch.save`` writes, compared with their checksums: ``torch.load`` does not.

The checksums are read by Python's ``zipfile`` and the tensors by torch's reader or from the mapped file. The two look
for an archive's parts in different ways, so that of a file that is two archives each can read another one. Therefore an
archive must also be laid out as torch writes it, where there is but one way to read it.
"""

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import IO

_END, _END_SIZE = b"PK\x05\x06", 22  # of the directory, where the file ends
_LOCATOR, _LOCATOR_SIZE = b"PK\x06\x07", 20  # before it, where the record of 64 bits is
_RECORD, _RECORD_SIZE = b"PK\x06\x06", 56  # before that
_LOCAL, _LOCAL_SIZE = b"PK\x03\x04", 30  # before each part


def check_zip(file: str | Path | io.BytesIO) -> None:
    """Compare every part of a ``torch.save`` archive with its checksum, and see that torch reads these parts.

    Raises:
        ValueError: a part differs, or the file is not one archive from its first byte to its last.
        zipfile.BadZipFile: it is truncated or no archive.
        OSError: the system does not give it.
    """
    with zipfile.ZipFile(file) as archive:
        stream = archive.fp
        assert stream is not None
        _check_ends(stream, archive)
        _check_parts(stream, archive)
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} in it is damaged")


def _check_ends(stream: IO[bytes], archive: zipfile.ZipFile) -> None:
    """See that the directory ends where the file does, and that all records say so."""
    length = stream.seek(0, os.SEEK_END)
    end = length - _END_SIZE
    tail = _read(stream, end, _END_SIZE)
    if tail[:4] != _END or tail[-2:] != b"\0\0":
        raise ValueError("something follows the archive in it")
    size, start = struct.unpack("<2I", tail[12:20])
    locator = _read(stream, end - _LOCATOR_SIZE, _LOCATOR_SIZE)
    if locator[:4] == _LOCATOR:
        record = end - _LOCATOR_SIZE - _RECORD_SIZE
        if struct.unpack("<Q", locator[8:16])[0] != record:
            raise ValueError("the archive's directory is somewhere else")
        content = _read(stream, record, _RECORD_SIZE)
        if content[:4] != _RECORD:
            raise ValueError("the archive's directory is damaged")
        size, start = struct.unpack("<2Q", content[40:56])
        end = record
    if start != archive.start_dir or start + size != end:
        raise ValueError("it is more than one archive")


def _check_parts(stream: IO[bytes], archive: zipfile.ZipFile) -> None:
    """See that parts lie one after another from the first byte on, each stored as it is and named once."""
    parts = sorted(archive.infolist(), key=lambda part: part.header_offset)
    names = [part.filename for part in parts]
    if len({*names}) != len(names):
        raise ValueError("it has a part twice")
    if not parts or parts[0].header_offset != 0:
        raise ValueError("something precedes the archive in it")
    following = [*(part.header_offset for part in parts[1:]), archive.start_dir]
    for part, following_part in zip(parts, following, strict=True):
        header = _read(stream, part.header_offset, _LOCAL_SIZE)
        name, extra = struct.unpack("<2H", header[26:30])
        behind = part.header_offset + _LOCAL_SIZE + name + extra + part.compress_size
        if header[:4] != _LOCAL or behind > following_part:
            raise ValueError(f"{part.filename} in it is damaged")
        if part.compress_type != zipfile.ZIP_STORED or part.compress_size != part.file_size:
            raise ValueError(f"{part.filename} in it is compressed, which torch does not do")


def _read(stream: IO[bytes], place: int, count: int) -> bytes:
    if place < 0:
        return bytes(count)
    stream.seek(place)
    return stream.read(count).ljust(count, b"\0")
