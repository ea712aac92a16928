"""Any ``AutoModelForCausalLM`` behind the interface of our ``Transformer``."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from taperlit.errors import TaperlitError
from taperlit.hub.origin import Origin
from taperlit.loss import chunked_cross_entropy, token_losses
from taperlit.modes import evaluating

CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "context_length")
"""How configs name the longest context."""
UNLIMITED = 2048
"""The longest context of a model whose config names none (ALiBi, state spaces): one that it was trained on at least."""


@dataclass(frozen=True)
class Names:
    """Where a language model keeps its parts: dotted names in it.

    Args:
        blocks: the list of blocks.
        final_norm: the norm after them.
        head: what maps the last hidden state to the logits.
    """

    blocks: str
    final_norm: str
    head: str


class CausalLM(nn.Module):
    """A ``transformers`` language model that computes what our :class:`taperlit.Transformer` does, in its words.

    ``blocks``, ``final_norm`` and ``head`` are the model's own modules by our names: callbacks can name them
    (``model.final_norm``), and they are in the state dict once, under the model's own names.

    Args:
        lm: of a class of ``AutoModelForCausalLM``; kept as it is, and called without its cache.
        origin: where it came from.

    Raises:
        TaperlitError: it has no head, no list of blocks, or no norm after them.
    """

    def __init__(self, lm: nn.Module, origin: Origin) -> None:
        super().__init__()
        self.lm = lm
        self.origin = origin
        self.names = find_names(lm)
        self._checkpoints = False
        self.vocab_size, self.block_size = sizes_of(self._config.get_text_config().to_dict())
        # Whether the logits are just the head's output: tried now, or at the first loss of a model without values yet.
        self._plain_head: bool | None = None
        if not any(tensor.is_meta for tensor in (*lm.parameters(), *lm.buffers())):
            self._plain_head = self._head_makes_the_logits(torch.arange(4)[None])

    @property
    def _config(self) -> Any:
        return self.lm.config

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return cast(nn.ModuleList, self.lm.get_submodule(self.names.blocks))

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the head; an identity where it was folded."""
        return self.lm.get_submodule(self.names.final_norm)

    @property
    def head(self) -> nn.Module:
        """Maps the last hidden state to the logits."""
        return self.lm.get_submodule(self.names.head)

    @property
    def activation_checkpointing(self) -> bool:
        """Whether training keeps only the blocks' inputs and computes the rest again in the backward pass."""
        return self._checkpoints

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        lm: Any = self.lm
        if on:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        elif self._checkpoints:
            lm.gradient_checkpointing_disable()
        self._checkpoints = on

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        chunk_tokens: int = 4096,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """Predict the next token.

        Args:
            tokens: (B, T) token ids.
            targets: (B, T) next-token ids, -100 where none counts. With them the result is a 0-d float32 loss.
            chunk_tokens: tokens whose logits are held at once while computing the loss, where the head's output is the
                logits; a model that changes them after its head (Gemma 2, Cohere) makes all at once.
            reduction: ``none`` gives each target's own loss instead, (B, T), and keeps no graph.

        Returns:
            (B, T, vocab_size) logits, or the mean loss over the targets that count, or each target's.

        Raises:
            TaperlitError: more tokens than ``block_size``.
        """
        if targets is None:
            return self._logits(tokens)
        compute = chunked_cross_entropy if reduction == "mean" else token_losses
        return compute(*self._head_and_hidden(tokens), targets, chunk_tokens)

    def token_losses(self, tokens: Tensor, targets: Tensor, chunk_tokens: int = 4096) -> Tensor:
        """(B, T) float32 losses, one per target and 0 where it is -100; no graph is kept."""
        with torch.no_grad():
            return cast(Tensor, self(tokens, targets, chunk_tokens=chunk_tokens, reduction="none"))

    def num_parameters(self) -> int:
        """Parameters, shared ones once, the taper's second branch not at all: what the model has once folded."""
        return sum(p.numel() for name, p in self.named_parameters() if ".taper_" not in name)

    def _logits(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.block_size:
            raise TaperlitError(f"{tokens.shape[1]} tokens are more than the model's context of {self.block_size}.")
        return cast(Tensor, self.lm(input_ids=tokens, use_cache=False).logits)

    def _head_and_hidden(self, tokens: Tensor) -> tuple[nn.Module, Tensor]:
        """A head, and what to give it: the model's own, or, where that is not all, an identity on the logits."""
        if self._plain_head is None:
            self._plain_head = self._head_makes_the_logits(tokens[:1, : min(tokens.shape[1], 4)])
        if not self._plain_head:
            return nn.Identity(), self._logits(tokens)
        if tokens.shape[1] > self.block_size:
            raise TaperlitError(f"{tokens.shape[1]} tokens are more than the model's context of {self.block_size}.")
        return self.head, self._hidden(tokens)

    def _hidden(self, tokens: Tensor) -> Tensor:
        """What the head is given: (B, T, d_model)."""
        base: Any = self.lm.base_model
        return cast(Tensor, base(input_ids=tokens, use_cache=False)[0])

    @torch.no_grad()
    def _head_makes_the_logits(self, tokens: Tensor) -> bool:
        """Whether the logits are just the head's output: tried, since models scale and cap them in many ways."""
        with evaluating(self):
            logits, hidden = self._logits(tokens), self._hidden(tokens)
            if hidden.shape[-1] != cast(Tensor, self.head.weight).shape[-1]:
                return False
            made = self.head(hidden)
        return made.shape == logits.shape and torch.equal(made.float(), logits.float())


def sizes_of(config: dict[str, Any]) -> tuple[int, int]:
    """Vocabulary and longest context, in tokens, of a ``config.json``.

    Raises:
        TaperlitError: it names no vocabulary.
    """
    text = {**config, **(config.get("text_config") or {})}
    if not text.get("vocab_size"):
        raise TaperlitError("The model's config.json has no vocab_size; it is not of a causal language model.")
    return int(text["vocab_size"]), next((int(size) for name in CONTEXTS if (size := text.get(name))), UNLIMITED)


def find_names(lm: nn.Module) -> Names:
    """Find the blocks, the final norm and the head of a ``transformers`` language model.

    Args:
        lm: of any class of ``AutoModelForCausalLM``.

    Raises:
        TaperlitError: it is built in another way; the part that is missing is named.
    """
    kind = type(lm).__name__
    named = dict(lm.named_modules())
    model: Any = lm
    head = model.get_output_embeddings()
    head_name = next((name for name, module in named.items() if module is head), None)
    if head_name is None:
        raise TaperlitError(f"{kind} has no head that maps hidden states to logits; it is not a causal language model.")
    n_layer = model.config.get_text_config().num_hidden_layers
    lists = [name for name, module in named.items() if isinstance(module, nn.ModuleList) and len(module) == n_layer]
    if not lists:
        raise TaperlitError(f"{kind} has no list of its {n_layer} blocks; taper its backbone from Python instead.")
    blocks = lists[0]
    parent, _, leaf = blocks.rpartition(".")
    siblings = [name for name, _ in lm.get_submodule(parent).named_children()]
    after = siblings[siblings.index(leaf) + 1 :]
    norms = [name for name in after if _is_named_norm(name)]
    norms += [name for name in siblings if _is_named_norm(name) and "final" in name]  # OPT makes it before its blocks
    if not norms:
        raise TaperlitError(f"{kind} has no norm after its blocks {blocks}; it is not a pre-norm model.")
    return Names(blocks, f"{parent}.{norms[0]}" if parent else norms[0], head_name)


def _is_named_norm(name: str) -> bool:
    """Whether a module's own name says that it is a norm; its class cannot, once it was folded."""
    return "norm" in name.lower() or name.lower().startswith("ln_") or name.lower() == "ln"
