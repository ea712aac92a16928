"""``taperlit generate``: continue prompts, printing as it goes."""

import json
import os
import time
from pathlib import Path
from typing import Literal

from taperlit.checkpoint.atomic import write_file
from taperlit.cli.options import Texts
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
    # Here, so that the help and a wrong option are told without torch.
    import torch

    from taperlit.checkpoint.folded import load_model
    from taperlit.cli.prompts import (
        Job,
        continue_all,
        encode,
        find_device,
        print_as_it_comes,
        print_in_order,
        read_prompts,
        stop_ids,
        tell,
    )
    from taperlit.data.tokenizer import end_of_text_id, parse_tokenizer
    from taperlit.decode.engine import Engine
    from taperlit.decode.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    for option, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise TaperlitError(f"{option} is {value}; give 1 or more.")
    texts = [*(prompt or []), *(read_prompts(Path(prompts)) if prompts is not None else [])]
    if not texts:
        raise TaperlitError("There is nothing to continue; give --prompt TEXT or --prompts FILE.")
    place = find_device(device)
    number_type = getattr(torch, dtype or ("bfloat16" if place.type == "cuda" else "float32"))
    if out is not None:
        _check_writable(Path(out))
    loaded = load_model(model)
    if loaded.tokenizer_json is None:
        raise TaperlitError(f"{model} has no tokenizer; fold a checkpoint that was trained with text data.")
    tokenizer, config = parse_tokenizer(loaded.tokenizer_json, f"of {model}"), loaded.model.config
    ends = {end_of_text_id(tokenizer), *stop_ids(tokenizer, stop or [], stop_tokens, config.vocab_size)}
    names = ["The prompt"] if len(texts) == 1 else [f"Prompt {number}" for number in range(1, len(texts) + 1)]
    jobs = [
        Job(text, encode(tokenizer, text, name, config.block_size), tokenizer, ends, max_new_tokens, config.block_size)
        for name, text in zip(names, texts, strict=True)
    ]
    batch_size, length = min(batch_size, len(jobs)), max(job.slots for job in jobs)
    size = Engine.cache_bytes(config, batch_size, length, place, number_type)
    tell(f"the cache takes {size / 1e6:.1f} MB: {batch_size} x {length} tokens")
    engine = Engine(loaded.model, batch_size, length, place, number_type, backend=backend)
    start = time.perf_counter()
    progress = continue_all(engine, jobs, sampling, ends, seed)
    if len(jobs) == 1:
        print_as_it_comes(jobs[0], progress)
    else:
        print_in_order(jobs, progress)
    seconds = time.perf_counter() - start
    if out is not None:
        lines = "".join(f"{json.dumps(job.record(), ensure_ascii=False)}\n" for job in jobs)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_file(Path(out), lambda partial: partial.write_text(lines, encoding="utf-8"))
    if full := [name for name, job in zip(names, jobs, strict=True) if job.ended == "context"]:
        which = "" if len(jobs) == 1 else f" with the texts of {', '.join(full).lower()}"
        tell(f"the model's context of {config.block_size} tokens is full{which}")
    tokens = sum(len(job.stream.tokens) for job in jobs)
    tell(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s")


def _check_writable(path: Path) -> None:
    """Refuse a place for the texts before they are made.

    Raises:
        TaperlitError: it is taken, or nothing can be written there.
    """
    if path.exists():
        raise TaperlitError(f"{path} exists; name another --out.")
    folder = path.parent
    try:
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise TaperlitError(f"{path} cannot be written: {folder} is a file.")
    except OSError as error:
        raise TaperlitError(f"{path} cannot be written: {error.strerror or error}.") from error
    if not os.access(folder, os.W_OK):
        raise TaperlitError(f"{path} cannot be written: its folder is read-only.")
