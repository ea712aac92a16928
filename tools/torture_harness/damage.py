"""What can become of a file: bytes that change, archives that are doubled, values of JSON that are others."""

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from taperlit.checkpoint.atomic import remove
from taperlit.checkpoint.checksum import checksum, checksum_of

NESTED = object()  # lists in lists, deeper than a reader goes
ODD = (
    None, True, False, -1, 0, 1, 2.5, 10**6, 10**9, 10**30, -(10**9), 1e-300, float("nan"), float("inf"), "", "x",
    "../../x", "y" * 10000, [], [1], [[-1]], {}, {"x": 1}, NESTED,
)  # fmt: skip


class Bomb:
    """Pickled, it makes a folder when it is read by what runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def damage_bytes(path: Path, draw: random.Random, pipe: bool = True) -> str:
    """Change a file's bytes in one of many ways, or put something else in its place; in words.

    Args:
        path: of the file.
        draw: decides how.
        pipe: that may be a pipe, which whoever opens waits for.
    """
    content = bytearray(path.read_bytes())
    place = draw.randrange(max(1, len(content)))
    how = draw.choice(("flip", "flip", "flip", "zero", "cut", "insert", "append", "double", "doubled", "swap", "gone"))
    told = f"{how} at {place} of {len(content)}"
    if how == "flip":
        bit = draw.randrange(8)
        told = f"flip bit {bit} of byte {place} of {len(content)}"
        if content:
            content[place] ^= 1 << bit
    elif how == "zero":
        length = draw.choice((1, 16, 512, len(content)))
        content[place : place + length] = bytes(len(content[place : place + length]))
        told = f"zero {length} bytes at {place}"
    elif how == "cut":
        del content[place:]
    elif how == "insert":
        content[place:place] = draw.randbytes(draw.choice((1, 4, 64)))
    elif how == "append":
        content += draw.randbytes(draw.choice((1, 22, 4096)))
    elif how in ("double", "doubled"):  # a damaged one before or behind a whole one
        damaged = bytearray(content)
        if damaged:
            damaged[place] ^= 1 << draw.randrange(8)
        content = damaged + content if how == "double" else content + damaged
        told = f"{how}: a copy with byte {place} damaged {'precedes' if how == 'double' else 'follows'}"
    elif how == "swap":
        half = len(content) // 2
        content = content[half:] + content[:half]
        told = "halves swapped"
    else:
        kind = draw.choice(("missing", "empty", "folder", "text", *["pipe"] * pipe))
        told = f"{kind} in its place"
        remove(path)
        if kind == "empty":
            path.touch()
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "text":
            path.write_bytes("caf\xe9\n".encode("latin-1"))
        return told
    path.write_bytes(bytes(content))
    return told


def plant_bomb(path: Path, canary: Path, draw: random.Random) -> str:
    """Put code where a pickle's values are."""
    if draw.random() < 0.5:
        content = torch.load(path, weights_only=False)
        key = draw.choice(sorted(map(str, content)))
        content[key] = Bomb(canary)
    else:
        key, content = "all of it", Bomb(canary)
    torch.save(content, path)
    return f"code in the place of {key}"


def damage_json(text: str, draw: random.Random) -> tuple[str, str]:
    """Change one value, or one key, of a JSON text: the new text, and what was done."""
    tree = json.loads(text)
    holder, key, name = draw.choice([*_places(tree, "")])
    how = draw.choice(("value", "value", "value", "value", "delete", "rename", "twice", "top"))
    if how == "top":
        value = draw.choice(ODD)
        return dump(value), f"all of it is {_shown(value)}"
    if how == "value":
        holder[key] = value = draw.choice(ODD)
        return dump(tree), f"{name} is {_shown(value)}"
    if how == "delete" or not isinstance(holder, dict):
        del holder[key]
        return dump(tree), f"{name} is gone"
    if how == "rename":
        holder[f"{key}_"] = holder.pop(key)
        return dump(tree), f"{name} is called {key}_"
    value = holder[key]
    holder[key] = {"TWICE": True}
    both = f"{dump(draw.choice(ODD[:14]))}, {json.dumps(key)}: {dump(value)}"
    return dump(tree).replace('{"TWICE": true}', both), f"{name} is there twice"


def mend_checksums(folder: Path) -> None:
    """Make the checksums in a folder's ``config.json`` those of its files, where it still has a place for them."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        sums = config["checksums"]
        for name in sums:
            if name != path.name and (folder / name).is_file():
                sums[name] = checksum(folder / name)
        sums[path.name] = checksum_of(config)
        path.write_text(json.dumps(config))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass


def mend_meta(folder: Path) -> None:
    """The same for a token cache's ``meta.json``."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        meta["checksums"][path.name] = checksum_of(meta)
        path.write_text(json.dumps(meta))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass


def damage_tensors(folder: Path, draw: random.Random) -> tuple[str, bool]:
    """Change a tensor of a folded folder and mend all checksums: what was done, and whether it has to be refused."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name].clone()
    how = draw.choice(("nan", "inf", "int64", "bool", "float16", "shape", "missing", "extra"))
    if how in ("nan", "inf"):
        tensor.view(-1)[draw.randrange(tensor.numel())] = float(how)
    elif how in ("int64", "bool", "float16"):
        tensor = tensor.to(getattr(torch, how))
    elif how == "shape":
        tensor = tensor.reshape(-1)[:-1].clone() if draw.random() < 0.5 else tensor[None].clone()
    if how == "missing":
        del tensors[name]
    else:
        tensors[f"{name}_more" if how == "extra" else name] = tensor
    save_file(tensors, path)  # without a checksum in its metadata, as folders of before have none
    mend_checksums(folder)
    return f"{name}: {how}", how != "float16"


def copy(source: Path, target: Path) -> Path:
    """A copy of a file or a folder; the target."""
    remove(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
    return target


def _places(tree: Any, name: str) -> Iterator[tuple[Any, Any, str]]:
    if isinstance(tree, dict):
        for key in sorted(tree):
            yield tree, key, f"{name}.{key}"
            yield from _places(tree[key], f"{name}.{key}")
    elif isinstance(tree, list):
        for i, one in enumerate(tree[:20]):
            yield tree, i, f"{name}[{i}]"
            yield from _places(one, f"{name}[{i}]")


def dump(value: Any) -> str:
    """As JSON, with what stands for deep nesting spelled out."""
    text = io.StringIO()
    json.dump(value, text, default=lambda _: "NESTED")
    return text.getvalue().replace('"NESTED"', "[" * 5000 + "]" * 5000)


def _shown(value: Any) -> str:
    return "nested 5000 deep" if value is NESTED else repr(value)[:60]
