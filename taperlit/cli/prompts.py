"""What ``taperlit generate`` does with its prompts: read, encode, continue in batches, print in order."""

import json
import random
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from taperlit.decode.engine import Engine
from taperlit.decode.sampling import Sampling
from taperlit.decode.text import TextStream
from taperlit.errors import TaperlitError


class Job:
    """A prompt and the text that continues it.

    Args:
        prompt: as text.
        ids: as tokens.
        tokenizer: of both.
        ends: token ids that end the text.
        max_new_tokens: most tokens of it.
        block_size: the model's context; the token after it is the last that a model can tell.
    """

    def __init__(
        self,
        prompt: str,
        ids: list[int],
        tokenizer: Tokenizer,
        ends: Collection[int],
        max_new_tokens: int,
        block_size: int,
    ) -> None:
        self.prompt, self.ids = prompt, ids
        limit = min(max_new_tokens, block_size - len(ids) + 1)
        self.short = limit < max_new_tokens
        self.slots = len(ids) + limit - 1  # the last token is not read
        self.stream = TextStream(tokenizer, ids, ends, limit)

    @property
    def so_far(self) -> list[int]:
        """Prompt and text."""
        return self.ids + self.stream.tokens

    @property
    def left(self) -> int:
        """Most tokens to come."""
        return self.slots + 1 - len(self.so_far)

    @property
    def ended(self) -> Literal["stop", "length", "context"] | None:
        """Why it is whole, if so."""
        return "context" if self.short and self.stream.ended == "length" else self.stream.ended

    def record(self) -> dict[str, Any]:
        """A line of the file."""
        stream = self.stream
        return {"prompt": self.prompt, "text": stream.text, "tokens": stream.tokens, "ended": self.ended}


def continue_all(
    engine: Engine, jobs: list[Job], sampling: Sampling, ends: Collection[int], seed: int
) -> Iterator[None]:
    """Continue all prompts, in batches of similar lengths; yields whenever some tokens have come."""
    seeds = random.Random(str(seed))  # one per batch, or batches of the same prompt would have the same texts
    waiting = sorted(jobs, key=lambda job: len(job.ids))
    while waiting:
        batch, waiting = waiting[: engine.batch_size], waiting[engine.batch_size :]
        prompts, steps = [job.so_far for job in batch], max(job.left for job in batch)
        for block in engine.stream(prompts, steps, sampling, ends, seeds.getrandbits(63)):
            for job, tokens in zip(batch, block.t().tolist(), strict=True):
                job.stream.take(tokens)
            yield
        # A longer row may fill the cache when a shorter one has not ended: that one goes on in another batch.
        waiting = sorted([*waiting, *(job for job in batch if not job.ended)], key=lambda job: len(job.so_far))


def print_as_it_comes(job: Job, progress: Iterator[None]) -> None:
    """Print one prompt and its text to the standard output, each piece when it is there."""
    print(job.prompt, end="", flush=True)
    for _ in progress:
        print(job.stream.piece(), end="", flush=True)
    print(job.stream.rest())


def print_in_order(jobs: list[Job], progress: Iterator[None]) -> None:
    """Print each text when it and those before it are whole."""
    shown = 0
    for _ in progress:
        while shown < len(jobs) and jobs[shown].ended:
            job = jobs[shown]
            shown += 1
            print(f"== {shown}/{len(jobs)}\n{job.prompt}{job.stream.text}", flush=True)


def tell(line: str) -> None:
    """Say something beside the texts, on the standard error."""
    print(f"taperlit: {line}", file=sys.stderr, flush=True)


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file; see :func:`taperlit.cli.generate.generate`.

    Raises:
        TaperlitError: there is none of that name, or what it holds is not prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaperlitError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if not lines[-1]:
        lines.pop()
    prompts = []
    for number, line in enumerate(lines, 1):
        prompt: Any = line
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TaperlitError(f"{path}, line {number}, is no JSON: {error}.") from error
            prompt = next((row[key] for key in ("prompt", "text") if key in row), None) if type(row) is dict else None
        if not isinstance(prompt, str):
            raise TaperlitError(f"{path}, line {number}, has no `prompt` or `text` that is a string; give it one.")
        if not prompt:
            raise TaperlitError(f"{path}, line {number}, is empty; give it at least one character or leave it out.")
        prompts.append(prompt)
    return prompts


def encode(tokenizer: Tokenizer, prompt: str, name: str, block_size: int) -> list[int]:
    """A prompt's token ids.

    Args:
        tokenizer: of the model.
        prompt: as text.
        name: what to call it in an error.
        block_size: the model's context.

    Raises:
        TaperlitError: it is not UTF-8, has no token, or more than the context.
    """
    _require_utf8(prompt, name)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise TaperlitError(f"{name} has no tokens; give it at least one character.")
    if len(ids) > block_size:
        raise TaperlitError(f"{name} has {len(ids)} tokens, and the model's context is {block_size}; shorten it.")
    return ids


def _require_utf8(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TaperlitError(f"{name} is not UTF-8; give it as such.") from error


def stop_ids(tokenizer: Tokenizer, texts: list[str], ids: int | list[int] | None, vocab_size: int) -> Iterator[int]:
    """The ids of the tokens that end a text, given as texts or as ids.

    Raises:
        TaperlitError: a text is not UTF-8 or not one token, or an id not one of the model's.
    """
    for text in texts:
        _require_utf8(text, "stop")
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        if len(tokens) != 1:
            raise TaperlitError(
                f"stop {text!r} is {len(tokens)} tokens of this tokenizer, and a text ends at a single one; give one "
                "that is, or its id with --stop_tokens."
            )
        yield tokens[0]
    for token in [ids] if isinstance(ids, int) else ids or []:
        if not 0 <= token < vocab_size:
            raise TaperlitError(f"stop_tokens has {token}; the model's tokens are 0 to {vocab_size - 1}.")
        yield token


def find_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is the GPU where there is one.

    Raises:
        TaperlitError: there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TaperlitError(f"There is no device {name!r}; give auto, cpu or cuda.") from error
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cpu" and not (device.type == "cuda" and (device.index or 0) < there):
        raise TaperlitError(f"There is no device {name!r} here for decoding; give cpu{' or cuda' if there else ''}.")
    return device
