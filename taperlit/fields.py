"""Plain data, as JSON has it, against the type hints that say what it should be."""

import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

_KINDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text", NoneType: "null"}
_SHOWN = 60  # characters of a value


def mismatch(value: object, hint: Any, name: str) -> str | None:
    """What in a value is not what a hint says.

    A bool is no number here, a float no integer, and NaN and infinity no float; an integer is a float.

    Args:
        value: of dictionaries, lists, texts, numbers, bools and None, however deep.
        hint: of ``bool``, ``int``, ``float``, ``str``, ``None``, ``Any``, another class, ``Literal``, ``X | Y``,
            ``list[X]``, ``dict[str, X]``, or a TypedDict, whose keys must be there, and no others.
        name: of the value, with dots.

    Returns:
        The first field that differs and how, as the beginning of a sentence; None where all is well.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return None
    if hint is None:
        hint = NoneType
    if origin in (Union, UnionType):
        wrong = [mismatch(value, one, name) for one in args]
        if None in wrong:
            return None
        # Of a dictionary or a list that may be None, say what is wrong within.
        deep = [text for text, one in zip(wrong, args, strict=True) if text and _fits_outside(value, one)]
        return deep[0] if deep else f"{name} is {shown(value)}, not {' or '.join(map(_in_words, args))}"
    if not _fits_outside(value, hint):
        return f"{name} is {shown(value)}, not {_in_words(hint)}"
    if is_typeddict(hint):
        assert isinstance(value, Mapping)
        hints = get_type_hints(hint)
        if extra := [key for key in value if key not in hints]:
            return f"{name}.{str(extra[0])[:_SHOWN]} is no field of it"
        if missing := [key for key in hints if key in hint.__required_keys__ and key not in value]:
            return f"{name}.{missing[0]} is missing"
        return _first(mismatch(one, hints[key], f"{name}.{key}") for key, one in value.items())
    if origin is dict:
        assert isinstance(value, Mapping)
        if odd := [key for key in value if not isinstance(key, str)]:
            return f"{name} has the key {shown(odd[0])}, not a text"
        return _first(mismatch(one, args[1], f"{name}.{str(key)[:_SHOWN]}") for key, one in value.items())
    if origin is list:
        assert isinstance(value, list)
        return _first(mismatch(one, args[0], f"{name}[{i}]") for i, one in enumerate(value))
    return None


def shown(value: object) -> str:
    """A value in an error's line, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to print longer ones
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, dict | list) and value:
        return f"a {'dictionary' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _first(texts: Any) -> str | None:
    return next((text for text in texts if text is not None), None)


def _fits_outside(value: object, hint: Any) -> bool:
    """Whether a value is of the hint's kind, whatever is within."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits_outside(value, one) for one in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if is_typeddict(hint) or origin is dict:
        return isinstance(value, Mapping)
    if origin is list:
        return isinstance(value, list)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, NoneType if hint is None else hint)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _in_words(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if is_typeddict(hint) or origin is dict:
        return "a dictionary"
    if origin is list:
        return "a list"
    return _KINDS.get(NoneType if hint is None else hint, f"a {getattr(hint, '__name__', hint)}")
