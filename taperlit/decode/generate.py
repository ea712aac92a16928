"""Autoregressive decoding with a static KV cache: prefill, then one token at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from taperlit.errors import TaperlitError
from taperlit.transformer import KVCache, Transformer


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row.

    Args:
        logits: (B, vocab_size).
        temperature: 0 takes the likeliest token.
        top_k: keep this many of the likeliest.
        top_p: keep the likeliest that together reach this probability.
        generator: where the randomness comes from.

    Returns:
        (B,) token ids.

    Raises:
        TaperlitError: a negative temperature, ``top_k`` below 1 or ``top_p`` outside (0, 1].
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise TaperlitError("Sampling needs temperature >= 0, top_k >= 1 and 0 < top_p <= 1.")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, index = logits.softmax(-1).sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


@torch.no_grad()
def decode(
    model: Transformer,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue a prompt; a prompt that fills the context yields its one next token.

    Args:
        model: in eval mode.
        prompt: (B, T) token ids; only the last ``block_size`` are read.
        max_new_tokens: most tokens to yield; fewer where the model's context is full.
        temperature: see :func:`sample`.
        top_k: see :func:`sample`.
        top_p: see :func:`sample`.
        generator: see :func:`sample`.

    Yields:
        (B,) token ids, one position at a time.

    Raises:
        TaperlitError: an empty prompt, or as :func:`sample`.
    """
    if prompt.shape[1] == 0:
        raise TaperlitError("The prompt has no tokens; give it at least one character.")
    prompt = prompt[:, -model.config.block_size :]
    B, T = prompt.shape
    steps = min(max_new_tokens, model.config.block_size - T + 1)
    weight = model.head.weight
    length = min(T + max_new_tokens, model.config.block_size)
    cache = KVCache(model.config, B, length, weight.device, weight.dtype)
    position = torch.arange(T, device=prompt.device)
    tokens = prompt
    for _ in range(steps):
        logits = model(tokens, cache=cache, position=position)[:, -1]  # (B, vocab_size)
        tokens = sample(logits, temperature, top_k, top_p, generator)[:, None]
        yield tokens[:, 0]
        position = position[-1:] + 1


def stream_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, stop: int | None = None, **sampling: Any
) -> Iterator[str]:
    """Continue a text, piece by piece; characters whose bytes are not complete yet are held back.

    Args:
        model: in eval mode.
        tokenizer: the model's.
        prompt: text to continue; may not be empty.
        max_new_tokens: see :func:`decode`.
        stop: id of the token that ends the text.
        **sampling: see :func:`sample`.

    Yields:
        Pieces of text; joined they are the continuation.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    stream = DecodeStream(skip_special_tokens=True)
    tokens = torch.tensor([ids], dtype=torch.int64, device=model.head.weight.device)
    for token in decode(model, tokens, max_new_tokens, **sampling):
        if token.item() == stop:
            return
        if piece := stream.step(tokenizer, token.item()):
            yield piece
