"""Prompts in, tokens out: the loop over prefill and steps that every engine shares."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from operator import index
from typing import cast

import torch
from torch import Tensor

from taperlit.decode.sampling import Sampling, sample
from taperlit.errors import TaperlitError

Prompts = Tensor | Sequence[Sequence[int]]
"""(B, T) token ids, or B lists of them."""

GREEDY = Sampling(temperature=0)
LOOK_EVERY = 8  # steps between two looks at a GPU's tokens: every look waits for it


class Decoding(ABC):
    """An engine: it reads prompts, then takes one token per row and step.

    Args:
        batch_size: rows decoded together.
        length: most tokens per row, prompt included; None is ``block_size``.
        block_size: the model's context.
        vocab_size: tokens that there are.
        device: of tokens and logits.

    Attributes:
        filled: tokens of the longest row so far.

    Raises:
        TaperlitError: ``batch_size`` or ``length`` is out of range.
    """

    def __init__(
        self, batch_size: int, length: int | None, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self.batch_size, self.length = batch_size, block_size if length is None else length
        self.block_size, self.vocab_size, self.device = block_size, vocab_size, device
        self.filled = 0
        self._moves = 0  # prefills and steps so far
        if batch_size < 1:
            raise TaperlitError(f"batch_size must be at least 1, not {batch_size}.")
        if not 1 <= self.length <= block_size:
            raise TaperlitError(
                f"A length of {self.length} tokens is outside the model's context; give 1 to {block_size}."
            )

    @torch.inference_mode()
    def prefill(self, prompts: Prompts) -> Tensor:
        """Read one prompt per row, from an empty cache.

        Args:
            prompts: (B, T) token ids, or B lists of them, which may differ in length.

        Returns:
            (B, vocab_size) logits of the token after each prompt.

        Raises:
            TaperlitError: not ``batch_size`` prompts, an empty one, one longer than ``length``, or ids that the model
                does not have; or the model's weights were changed since the engine was built.
        """
        rows = as_lists(prompts)
        if len(rows) != self.batch_size:
            raise TaperlitError(f"The engine was built for {self.batch_size} prompts at a time, not {len(rows)}.")
        self.check(rows)
        self._moves += 1
        logits = self._read(rows)
        self.filled = max(map(len, rows))
        return logits

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Append one token per row.

        Args:
            tokens: (B,) token ids, on the engine's device.

        Returns:
            (B, vocab_size) logits of the next ones. On a GPU the next step overwrites them.

        Raises:
            TaperlitError: nothing was prefilled, the cache is full, not one token per row, or, on the CPU, one that the
                model does not have. A GPU is not waited for to look.
        """
        if not self.filled:
            raise TaperlitError("The engine has read no prompt; call prefill first.")
        if self.filled == self.length:
            raise TaperlitError(f"The context of {self.length} tokens is full; the model's is {self.block_size}.")
        if tokens.shape != (self.batch_size,):
            raise TaperlitError(f"A step takes {self.batch_size} tokens, one per row, not {list(tokens.shape)}.")
        if tokens.device.type == "cpu" and not 0 <= min(ids := tokens.tolist()) <= max(ids) < self.vocab_size:
            raise TaperlitError(f"A step has a token outside of 0 to {self.vocab_size - 1}, the model's.")
        self._moves += 1
        logits = self._append(tokens)
        self.filled += 1
        return logits

    @abstractmethod
    def _read(self, rows: list[list[int]]) -> Tensor:
        """What :meth:`prefill` does with prompts that can be read."""

    @abstractmethod
    def _append(self, tokens: Tensor) -> Tensor:
        """What :meth:`step` does where there is room."""

    def stream(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Collection[int] = (),
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Continue prompts, giving the tokens as they come.

        Args:
            prompts: up to ``batch_size`` of them.
            max_new_tokens: most tokens per row; fewer where the longest row fills ``length``.
            sampling: how tokens are drawn.
            stop: a row ends before any of these token ids.
            seed: of the draws; None is another one each time.

        Returns:
            An iterator of (n, rows) int64 token ids on the CPU: n is 1 there, and up to 8 on a GPU, which is not waited
            for at every step. A row that has ended has -1 from then on; when all have, the iterator ends.

        Raises:
            TaperlitError: no prompt or too many, an empty one, one longer than ``length``, tokens that the model does
                not have; or, while it goes on, logits that are not finite, or another prompt that the engine has read.
        """
        rows = as_lists(prompts)
        if not 1 <= len(rows) <= self.batch_size:
            raise TaperlitError(f"The engine takes 1 to {self.batch_size} prompts at a time, not {len(rows)}.")
        if max_new_tokens < 1:
            raise TaperlitError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
        self.check(rows)
        return self._stream(rows, max_new_tokens, sampling, frozenset(map(int, stop)), seed)

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Collection[int] = (),
        seed: int | None = None,
    ) -> list[list[int]]:
        """As :meth:`stream`, and the new tokens of each row at the end, without the stop token."""
        blocks = list(self.stream(prompts, max_new_tokens, sampling, stop, seed))
        return [[token for token in row if token >= 0] for row in torch.cat(blocks).t().tolist()]

    def check(self, rows: list[list[int]]) -> None:
        """Refuse prompts that cannot be read.

        Raises:
            TaperlitError: an empty one, one longer than ``length``, or tokens that the model does not have.
        """
        for row in rows:
            if not row:
                raise TaperlitError("A prompt has no tokens; give it at least one.")
            if len(row) > self.length:
                raise TaperlitError(
                    f"A prompt of {len(row)} tokens is longer than the {self.length} that fit; shorten it."
                )
            if not 0 <= min(row) <= max(row) < self.vocab_size:
                raise TaperlitError(f"A prompt has a token outside of 0 to {self.vocab_size - 1}, the model's.")

    def _stream(
        self, rows: list[list[int]], max_new_tokens: int, sampling: Sampling, stop: frozenset[int], seed: int | None
    ) -> Iterator[Tensor]:
        n_rows, spare = len(rows), self.batch_size - len(rows)
        generator = None
        if not sampling.greedy:
            generator = torch.Generator(self.device)
            _ = generator.seed() if seed is None else generator.manual_seed(seed)
        seen = None
        if sampling.remembers:
            seen = torch.zeros(self.batch_size, self.vocab_size, dtype=torch.bool, device=self.device)
            for row, marks in zip(rows, seen, strict=False):
                marks[row] = True
        logits, moves = self.prefill(rows + spare * rows[-1:]), self._moves
        steps = min(max_new_tokens, self.length - max(map(len, rows)) + 1)
        every = 1 if self.device.type == "cpu" else LOOK_EVERY
        ended, drawn = torch.zeros(n_rows, dtype=torch.bool), []
        for done in range(1, steps + 1):
            tokens = sample(logits, sampling, generator, seen)
            drawn.append(tokens)
            if done % every == 0 or done == steps:
                block = torch.stack(drawn)[:, :n_rows].cpu()
                drawn = []
                _end(block, ended, stop)
                yield block
                if ended.all():
                    return
            if done < steps:
                tokens = tokens.clamp(min=0)  # -1 says that there is none, and is refused at the next look
                if seen is not None:
                    seen.scatter_(1, tokens[:, None], True)
                if self._moves != moves:
                    raise TaperlitError("The engine has read another prompt since; use one engine per stream.")
                logits, moves = self.step(tokens), self._moves


def as_lists(prompts: Prompts) -> list[list[int]]:
    """Prompts as lists of ints.

    Raises:
        TaperlitError: it has another shape, or numbers that are no ids.
    """
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or prompts.is_floating_point() or prompts.is_complex():
            kind = str(prompts.dtype).removeprefix("torch.")
            raise TaperlitError(f"Prompts are (B, T) token ids, not {kind} of shape {list(prompts.shape)}.")
        return cast(list[list[int]], prompts.tolist())
    try:
        return [[index(token) for token in row] for row in prompts]
    except TypeError as error:
        raise TaperlitError("Prompts are lists of token ids, one list for each.") from error


def _end(block: Tensor, ended: Tensor, stop: frozenset[int]) -> None:
    """Put -1 from the first stop token of each row on, and note the rows that have ended; (n, rows) and (rows,)."""
    for tokens in block:
        for row, token in enumerate(tokens.tolist()):
            if token in stop:
                ended[row] = True
            elif token < 0 and not ended[row]:
                raise TaperlitError(
                    "The model's logits are not finite, so there is no next token; its weights are damaged, or decode "
                    "with dtype float32."
                )
        tokens[ended] = -1
