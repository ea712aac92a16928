"""What a command made, as hashes that compare: every bit of every tensor, and nothing of clocks and places."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from taperlit.checkpoint.folded import read_model
from taperlit.checkpoint.reader import read_checkpoint


def nothing(args: list[str]) -> int:
    """A command that does nothing, where only the result is wanted."""
    return 0


def done() -> str:
    """Of a command that only has to succeed."""
    return "done"


def folded(path: str) -> str:
    """A folded model, or one in a checkpoint: weights, tokenizer and structure."""
    loaded = read_model(path)
    structure = dict(loaded.structure or {})
    return _hash([loaded.model.state_dict(), loaded.tokenizer_json, structure])


def checkpoint(path: str) -> dict[str, str]:
    """All of a checkpoint that says what the run is, part by part."""
    content = read_checkpoint(path)
    callbacks = dict(content.get("callbacks", {}))
    callbacks.pop("RunRecord", None)  # its config names the folder
    kept = ("best_model_score", "current_score")
    for key in [key for key in callbacks if key.startswith("RunCheckpoint")]:
        callbacks[key] = {name: value for name, value in callbacks[key].items() if name in kept}
    return {key: _hash(value) for key, value in [*content.items(), *callbacks.items()] if key != "callbacks"}


def weights_and_rest(path: str) -> str:
    """All of a checkpoint as it is read."""
    return _hash(read_checkpoint(path))


def folded_and_source(out: str, source: str) -> list[str]:
    """A folded model, and the checkpoint that it was made of."""
    return [folded(out), weights_and_rest(source)]


def texts(path: str) -> list[str]:
    """What was generated."""
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


def texts_and_model(out: str, model: str) -> list[Any]:
    """What was generated, and all of the model that did it."""
    return [texts(out), folded(model)]


def run_of(folder: str) -> dict[str, str]:
    """The last checkpoint of the newest run in a logger's folder."""
    newest = max(Path(folder).glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    return checkpoint(str(newest / "checkpoints/last.ckpt"))


def run_and_cache(folder: str, cache: str) -> list[Any]:
    """The same, and the token cache that it was trained on."""
    return [run_of(folder), cache_of(cache)]


def cache_of(cache: str) -> str:
    """The files of a token cache; its description without its layout."""
    files = sorted(path for path in Path(cache).rglob("*") if path.is_file() and not path.name.startswith("."))
    return _hash([[path.name, _plain(path) if path.suffix == ".json" else path.read_bytes()] for path in files])


def _plain(path: Path) -> Any:
    return json.loads(path.read_text())


def _hash(value: Any) -> str:
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()[:24]


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        hasher.update(f"{value.dtype} {[*value.shape]}".encode())
        hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            hasher.update(f"{key}:".encode())
            _feed(hasher, value[key])
    elif isinstance(value, list | tuple):
        hasher.update(f"[{len(value)}".encode())
        for one in value:
            _feed(hasher, one)
    else:
        hasher.update(value if isinstance(value, bytes) else repr(value).encode())
