"""``taperlit generate``: continue prompts, printing as it goes."""

import json
import os
import random
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from taperlit.checkpoint.atomic import write_file
from taperlit.checkpoint.folded import load_model
from taperlit.cli.options import Texts
from taperlit.data.tokenizer import end_of_text_id
from taperlit.decode.engine import Engine
from taperlit.decode.sampling import Sampling
from taperlit.decode.text import TextStream
from taperlit.errors import TaperlitError


def generate(
    model: str,
    prompt: Texts | None = None,
    prompts: str | None = None,
    out: str | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Texts | None = None,
    stop_tokens: int | list[int] | None = None,
    batch_size: int = 8,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    backend: Literal["eager", "compile", "auto"] = "auto",
    device: str = "auto",
) -> None:
    """Continue prompts with a folded model or a checkpoint, printing as it goes.

    Texts go to the standard output and to ``out``, all else to the standard error. One prompt's text is printed as it
    comes; of several, each when it is whole, in the order given.

    Args:
        model: a directory that ``taperlit fold`` wrote, or a checkpoint.
        prompt: text to continue; may be given several times.
        prompts: a file of more of them: a line each, or, where its name ends in ``.jsonl``, a JSON object per line with
            a ``prompt`` or ``text``.
        out: a file to write: a JSON object per prompt with ``prompt``, ``text``, ``tokens`` (the ids of the text) and
            ``ended``: by ``stop``, at a stop token or the end of the text; ``length``, at ``max_new_tokens``; or
            ``context``, where the model's is full.
        max_new_tokens: most tokens per text.
        temperature: 0 takes the likeliest token.
        top_k: draw from this many of the likeliest tokens.
        top_p: draw from the likeliest tokens that together reach this probability.
        min_p: draw from tokens with at least this fraction of the likeliest one's probability.
        repetition_penalty: above 1, tokens that were there before become less likely.
        seed: of the draws.
        stop: a token, as text, that ends a text too; may be given several times.
        stop_tokens: ids of tokens that do.
        batch_size: prompts continued together.
        dtype: of weights and activations; by default bfloat16 on a GPU and float32 elsewhere.
        backend: ``compile`` compiles the step first, which takes a while; ``auto`` does on a GPU.
        device: such as ``cpu`` or ``cuda:1``; ``auto`` is the GPU where there is one.

    Raises:
        TaperlitError: an unusable model, or one without a tokenizer; no prompt, an empty one or one longer than the
            model's context; an option out of its range; or ``out`` exists or cannot be written.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    for option, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise TaperlitError(f"{option} is {value}; give 1 or more.")
    texts = [*(prompt or []), *(_read_prompts(Path(prompts)) if prompts is not None else [])]
    if not texts:
        raise TaperlitError("There is nothing to continue; give --prompt TEXT or --prompts FILE.")
    place = _device(device)
    number_type = getattr(torch, dtype or ("bfloat16" if place.type == "cuda" else "float32"))
    if out is not None:
        _check_writable(Path(out))
    loaded = load_model(model)
    if loaded.tokenizer_json is None:
        raise TaperlitError(f"{model} has no tokenizer; fold a checkpoint that was trained with text data.")
    tokenizer, config = Tokenizer.from_str(loaded.tokenizer_json), loaded.model.config
    ends = {end_of_text_id(tokenizer), *_stop_ids(tokenizer, stop or [], stop_tokens, config.vocab_size)}
    names = ["The prompt"] if len(texts) == 1 else [f"Prompt {number}" for number in range(1, len(texts) + 1)]
    jobs = [
        Job(text, _encode(tokenizer, text, name, config.block_size), tokenizer, ends, max_new_tokens, config.block_size)
        for name, text in zip(names, texts, strict=True)
    ]
    batch_size, length = min(batch_size, len(jobs)), max(job.slots for job in jobs)
    size = Engine.cache_bytes(config, batch_size, length, place, number_type)
    _tell(f"the cache takes {size / 1e6:.1f} MB: {batch_size} x {length} tokens")
    engine = Engine(loaded.model, batch_size, length, place, number_type, backend=backend)
    start = time.perf_counter()
    progress = _continue(engine, jobs, sampling, ends, seed)
    try:
        if len(jobs) == 1:
            _print_as_it_comes(jobs[0], progress)
        else:
            _print_in_order(jobs, progress)
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush at the end goes there
        raise TaperlitError("nobody reads the standard output any more.") from error
    seconds = time.perf_counter() - start
    if out is not None:
        lines = "".join(f"{json.dumps(job.record(), ensure_ascii=False)}\n" for job in jobs)
        write_file(Path(out), lambda partial: partial.write_text(lines, encoding="utf-8"))
    if full := [name for name, job in zip(names, jobs, strict=True) if job.ended == "context"]:
        which = "" if len(jobs) == 1 else f" with the texts of {', '.join(full).lower()}"
        _tell(f"the model's context of {config.block_size} tokens is full{which}")
    tokens = sum(len(job.stream.tokens) for job in jobs)
    _tell(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s")


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


def _continue(engine: Engine, jobs: list[Job], sampling: Sampling, ends: Collection[int], seed: int) -> Iterator[None]:
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


def _print_as_it_comes(job: Job, progress: Iterator[None]) -> None:
    print(job.prompt, end="", flush=True)
    for _ in progress:
        print(job.stream.piece(), end="", flush=True)
    print(job.stream.rest())


def _print_in_order(jobs: list[Job], progress: Iterator[None]) -> None:
    """Print each text when it and those before it are whole."""
    shown = 0
    for _ in progress:
        while shown < len(jobs) and jobs[shown].ended:
            job = jobs[shown]
            shown += 1
            print(f"== {shown}/{len(jobs)}\n{job.prompt}{job.stream.text}", flush=True)


def _tell(line: str) -> None:
    print(f"taperlit: {line}", file=sys.stderr, flush=True)


def _read_prompts(path: Path) -> list[str]:
    """The prompts in a file; see :func:`generate`.

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
            except ValueError as error:
                raise TaperlitError(f"{path}, line {number}, is no JSON: {error}.") from error
            prompt = next((row[key] for key in ("prompt", "text") if key in row), None) if type(row) is dict else None
        if not isinstance(prompt, str):
            raise TaperlitError(f"{path}, line {number}, has no `prompt` or `text` that is a string; give it one.")
        if not prompt:
            raise TaperlitError(f"{path}, line {number}, is empty; give it at least one character or leave it out.")
        prompts.append(prompt)
    return prompts


def _encode(tokenizer: Tokenizer, prompt: str, name: str, block_size: int) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise TaperlitError(f"{name} is not UTF-8; give it as such.") from error
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise TaperlitError(f"{name} has no tokens; give it at least one character.")
    if len(ids) > block_size:
        raise TaperlitError(f"{name} has {len(ids)} tokens, and the model's context is {block_size}; shorten it.")
    return ids


def _stop_ids(tokenizer: Tokenizer, texts: list[str], ids: int | list[int] | None, vocab_size: int) -> Iterator[int]:
    for text in texts:
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


def _device(name: str) -> torch.device:
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


def _check_writable(path: Path) -> None:
    """Refuse a place for the texts before they are made.

    Raises:
        TaperlitError: it is taken, or nothing can be written there.
    """
    if path.exists():
        raise TaperlitError(f"{path} exists; name another --out.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TaperlitError(f"{path} cannot be written: {error.strerror or error}.") from error
    if not os.access(path.parent, os.W_OK):
        raise TaperlitError(f"{path} cannot be written: its folder is read-only.")
