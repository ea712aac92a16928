"""Texts and JSON files of ours: read whole and as they should be, or refused in one line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from taperlit.errors import TaperlitError
from taperlit.fields import mismatch


def read_text(path: Path, mend: str) -> str:
    """The text of a file in UTF-8.

    Args:
        path: of the file.
        mend: what helps where it is damaged, for the error's message.

    Raises:
        TaperlitError: missing, no file, not to be read, or not UTF-8.
    """
    check_file(path, mend)
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise cannot_be_read(path, error, mend) from error
    except UnicodeDecodeError as error:
        raise damaged(path, error, mend) from error


def read_json(path: Path, mend: str) -> Any:
    """What a JSON file holds, in the strict sense: no key twice, no NaN.

    Args:
        path: of the file.
        mend: as in :func:`read_text`.

    Raises:
        TaperlitError: as :func:`read_text`, or no JSON.
    """
    text = read_text(path, mend)
    try:
        return parse_json(text)
    except ValueError as error:
        raise damaged(path, error, mend) from error


def parse_json(text: str) -> Any:
    """What a JSON text says, in the strict sense: no key twice, no NaN, no nesting beyond Python's own limit.

    Raises:
        ValueError: it is not that.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_fields(value: object, hint: Any, path: Path, name: str, mend: str) -> None:
    """Refuse a part of a file that is not what a type hint says (see :func:`taperlit.fields.mismatch`).

    Args:
        value: that was read.
        hint: of what it should be.
        path: of the file.
        name: of the part; the error names the field within.
        mend: as in :func:`read_text`.

    Raises:
        TaperlitError: names the file, the field, its value and the mend.
    """
    if (wrong := mismatch(value, hint, name)) is not None:
        raise TaperlitError(f"{path}: {wrong}; {mend}.")


def check_file(path: Path, mend: str) -> None:
    """Refuse what is no plain file: to open a pipe would wait for ever.

    Raises:
        TaperlitError: missing, no file, or not to be looked at.
    """
    try:
        if path.exists() and not path.is_file():
            raise TaperlitError(f"{path} is no file; {mend}.")
        path.stat()
    except OSError as error:
        raise cannot_be_read(path, error, mend) from error


def damaged(path: Path, reason: object, mend: str) -> TaperlitError:
    """The error of a file whose content is wrong."""
    words = " ".join(str(reason).split())[:200] or type(reason).__name__
    return TaperlitError(f"{path} is damaged ({words}); {mend}.")


def check_texts(files: Mapping[str, str], path: Path, mend: str) -> None:
    """Refuse the small files of a pretrained model, as a file of ours holds them, if a JSON file among them is none.

    Args:
        files: their texts by name.
        path: of our file, for the error's message.
        mend: what helps then.

    Raises:
        TaperlitError: names the file.
    """
    if "config.json" not in files:
        raise TaperlitError(f"{path} holds no config.json of its pretrained model; {mend}.")
    for name, text in files.items():
        if name.endswith(".json"):
            try:
                whole = isinstance(json.loads(text), dict)
            except (ValueError, RecursionError):
                whole = False
            if not whole:
                raise TaperlitError(f"{path}: the {name} of its pretrained model is no JSON object; {mend}.")


def cannot_be_read(path: Path, error: OSError, mend: str) -> TaperlitError:
    """The error of a file that the system does not give: that is no damage, unless it is not there."""
    path = Path(error.filename) if isinstance(error.filename, str) else path
    if isinstance(error, FileNotFoundError):
        return TaperlitError(f"{path} is missing; {mend}.")
    return TaperlitError(f"{path} cannot be read: {error.strerror or error}.")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {twice[:60]!r} twice")
    return made


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")
