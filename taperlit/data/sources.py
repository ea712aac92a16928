"""Where documents come from: local files, a hub data set, or the Python source that every machine has.

A document is handed on in pieces of bounded size, so that one giant file needs no more memory than many small ones.
"""

import codecs
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any

import fsspec

from taperlit.errors import TaperlitError

PIECE_CHARACTERS = 1 << 18
ROW_FORMATS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Piece:
    """Part of a document.

    Args:
        text: at most ``PIECE_CHARACTERS`` characters, or a little more.
        document: 8-byte hash of the whole document.
        last: the document ends here.
    """

    text: str
    document: bytes
    last: bool


def expand_globs(patterns: str | list[str]) -> list[str]:
    """The files that match, sorted; each pattern must match some. A ``[`` in a path that exists is its own.

    Raises:
        TaperlitError: a pattern that matches no file.
    """
    files: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [path for path in glob(_literal_brackets(pattern), recursive=True) if Path(path).is_file()]
        if not found:
            raise TaperlitError(f"data.files: no file matches {pattern}.")
        files.update(found)
    return sorted(files)


def _literal_brackets(pattern: str) -> str:
    """The pattern with ``[`` as itself in every file or folder that has one in its name."""
    first, *parts = Path(pattern).expanduser().parts or (".",)
    before, escaped = Path(first), escape(first) if "[" in first and Path(first).exists() else first
    for part in parts:
        before /= part
        escaped = str(Path(escaped) / (escape(part) if "[" in part and before.exists() else part))
    return escaped


def python_files(packages: bool = False) -> list[str]:
    """The standard library's source without its tests and, with ``packages``, that of the installed packages."""
    paths = sysconfig.get_paths()
    stdlib = Path(paths["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = {path for path in stdlib.rglob("*.py") if not skip & set(path.relative_to(stdlib).parts)}
    if packages:
        for root in {Path(paths["purelib"]), Path(paths["platlib"])}:
            files.update(path for path in root.rglob("*.py") if path.is_file())
    return sorted(map(str, files))


def describe_files(files: Iterable[str]) -> list[tuple[str, int, int]]:
    """What tells a set of files from another, or from itself after an edit: path, size and time of each."""
    return [(path, (stat := Path(path).stat()).st_size, stat.st_mtime_ns) for path in files]


def read_files(files: Iterable[str], column: str) -> Iterator[Piece]:
    """The documents in local files: a row each of ``.jsonl`` (also ``.zst``, ``.gz``) and ``.parquet``, a file each of
    everything else.

    Raises:
        TaperlitError: a damaged file, or rows without the column.
    """
    for path in files:
        try:
            if path.endswith(".parquet"):
                yield from read_rows(_load_parquet(path), column, path)
            elif path.endswith(ROW_FORMATS):
                yield from read_rows(_parse_lines(path), column, path)
            else:
                yield from _read_plain(path)
        except TaperlitError:
            raise
        except Exception as error:  # each format's library has its own exceptions
            raise TaperlitError(f"{path} cannot be read: {_reason(error)}") from error


def read_hub(name: str, config: str | None, split: str, streaming: bool, column: str) -> Iterator[Piece]:
    """The documents of a hub data set, a row each.

    Raises:
        TaperlitError: the hub or the data set cannot be reached, or not to the end; or rows have no such column.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:
        raise TaperlitError(
            f"The hub data set {name!r} cannot be loaded ({_reason(error)}); for data on this machine set data.files."
        ) from error
    try:
        yield from read_rows(rows, column, name)
    except TaperlitError:
        raise
    except Exception as error:  # a broken row, or the network lost under way
        raise TaperlitError(
            f"The hub data set {name!r} cannot be read to its end ({_reason(error)}); begin again, or for data on this "
            "machine set data.files."
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _load_parquet(path: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    # It takes a path for a pattern, in which a name's own brackets would match other files.
    return load_dataset("parquet", data_files=escape(path), split="train", streaming=True)


def _parse_lines(path: str) -> Iterator[dict[str, Any]]:
    # Not by `datasets`, which takes brackets in a compressed file's name for those of a network address.
    with fsspec.open(path, "rt", compression="infer", encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip("\n"))
            except ValueError as error:
                raise TaperlitError(f"{path}, line {number} is not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise TaperlitError(f"{path}, line {number} is not a JSON object.")
            yield row


def read_rows(rows: Iterable[dict[str, Any]], column: str, where: str) -> Iterator[Piece]:
    """A document a row; empty and null ones are passed over.

    Raises:
        TaperlitError: a row without the column, or with something else than text in it.
    """
    for row in rows:
        if column not in row:
            raise TaperlitError(f"{where} has no column {column!r}; set data.text_column to one of {', '.join(row)}.")
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise TaperlitError(f"{where}: column {column!r} holds {type(text).__name__}, not text.")
        if text:
            data = text.encode("utf-8", "surrogatepass")
            text = data.decode("utf-8", "replace")  # a lone surrogate, which JSON allows and UTF-8 does not
            pieces = list(_cut(text))
            digest = _digest(data)
            for index, piece in enumerate(pieces):
                yield Piece(piece, digest, index == len(pieces) - 1)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def _cut(text: str) -> Iterator[str]:
    """Cut after a line break where there is one, so that no token of ordinary text spans the cut."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
        if end <= start:
            end = start + PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def _read_plain(path: str) -> Iterator[Piece]:
    def blocks() -> Iterator[bytes]:
        with fsspec.open(path, "rb", compression="infer") as file:
            while block := file.read(PIECE_CHARACTERS):
                yield block

    hasher = hashlib.blake2b(digest_size=8)  # a pass of its own: the split must be known before the first token
    for known in blocks():
        hasher.update(known)
    digest = hasher.digest()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    replaced = 0
    previous = None
    for block in (*blocks(), None):
        text = decoder.decode(b"", final=True) if block is None else decoder.decode(block)
        replaced += text.count("\ufffd")
        if text:
            if previous is not None:
                yield Piece(previous, digest, last=False)
            previous = text
    if replaced:
        warnings.warn(f"{path}: {replaced} byte sequences are not UTF-8; they are read as U+FFFD.", stacklevel=2)
    if previous is not None:
        yield Piece(previous, digest, last=True)
