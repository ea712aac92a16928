"""How far a model that was written is from the one that it was made of: on tokens, before anybody relies on it."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from taperlit.compare import largest_difference
from taperlit.errors import TaperlitError
from taperlit.hub.causal_lm import CausalLM
from taperlit.hub.load import quiet

CHECKED_ROWS, CHECKED_TOKENS = 2, 64
# Tokens drawn at random are no text, and what a model does on text differs: its largest activations, say.
CHECKED_TEXT = """The harbour froze in January, and for three weeks nobody could reach the island except on foot.
Maria kept a list of what was left: eleven candles, flour, coffee. "If it holds until Sunday," she said, "we walk."

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

In 1998 the bridge carried 12,400 cars a day; by 2014 it was 31,250, which is more than its builders had planned for.
"""


@dataclass(frozen=True)
class Agreement:
    """How far an exported model, as it is read back, is from the folded one.

    Args:
        logits: the largest absolute difference.
        relative: the same, relative to the largest logit.
        divergence: mean over the tokens of the Kullback-Leibler divergence, exported from folded, in nats.
        rounding: as ``relative``, between the folded model in the exported dtype and in float32.
        mean_square: the largest mean square of what reaches a place where a norm was.
        tokens: that were compared.
    """

    logits: float
    relative: float
    divergence: float
    rounding: float
    mean_square: float
    tokens: int


def check_tokens(model: CausalLM, tokenizer_json: str | None) -> list[Tensor]:
    """Tokens to compare two models on: some at random, and a text where there is a tokenizer; each (B, T)."""
    length = min(CHECKED_TOKENS, model.block_size)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(model.vocab_size, (CHECKED_ROWS, length), generator=generator)]
    if tokenizer_json is not None:
        ids = Tokenizer.from_str(tokenizer_json).encode(CHECKED_TEXT).ids[: min(4 * length, model.block_size)]
        if ids and max(ids) < model.vocab_size:
            tokens.append(torch.tensor([ids]))
    return tokens


def logits_and_mean_square(model: CausalLM, places: Iterable[str], tokens: list[Tensor]) -> tuple[list[Tensor], float]:
    """A model's logits, and the largest mean square of a token's vector that reaches one of some modules.

    Args:
        model: folded.
        places: names in ``model.lm``, of modules where a norm was.
        tokens: of :func:`check_tokens`.

    Raises:
        TaperlitError: the logits are not finite.
    """
    largest = 0.0

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal largest
        largest = max(largest, args[0].double().square().mean(-1).max().item())

    hooks = [model.lm.get_submodule(name).register_forward_pre_hook(look) for name in places]
    try:
        logits = [_logits(model, rows) for rows in tokens]
    finally:
        for hook in hooks:
            hook.remove()
    if not all(rows.isfinite().all() for rows in logits):
        raise TaperlitError("The model's logits are not finite, so nothing can be compared; its weights are damaged.")
    return logits, largest


def rounding_of(model: CausalLM, tokens: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> float:
    """What a dtype's rounding of weights and activations alone does to a model's logits, relative to the largest.

    Args:
        model: in float32.
        tokens: of :func:`check_tokens`.
        wanted: its logits.
        dtype: the coarser one.
    """
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():  # not buffers: rotary frequencies stay float32 in transformers
        parameter.data = parameter.data.to(dtype)
    return max(largest_difference(a, _logits(rounded, rows)) for rows, a in zip(tokens, wanted, strict=True))


def agreement_of(
    folder: Path, dtype: torch.dtype, tokens: list[Tensor], wanted: list[Tensor], rounding: float, mean_square: float
) -> Agreement:
    """Read an exported model back as anybody would, and compare its logits with the folded model's.

    Args:
        folder: of ``transformers``.
        dtype: to read it in.
        tokens: of :func:`check_tokens`.
        wanted: the folded model's logits.
        rounding: of :func:`rounding_of`.
        mean_square: of :func:`logits_and_mean_square`.
    """
    import transformers

    option = "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype"
    with quiet():
        read: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **{option: dtype}
        )
    read.eval()
    logits = relative = divergence = 0.0
    for rows, a in zip(tokens, wanted, strict=True):
        b = read(input_ids=rows, use_cache=False).logits.float()
        logits = max(logits, (a - b).abs().max().item() if b.isfinite().all() else float("inf"))
        relative = max(relative, largest_difference(a, b))
        divergence += sum(map(_divergence, a.flatten(0, 1), b.flatten(0, 1)))
    count = sum(rows.numel() for rows in tokens)
    return Agreement(logits, relative, divergence / count, rounding, mean_square, count)


def _logits(model: CausalLM, tokens: Tensor) -> Tensor:
    """Logits in float32, on the CPU; the model may be anywhere."""
    logits: Tensor = model(tokens.to(next(model.parameters()).device))
    return logits.float().cpu()


def _divergence(a: Tensor, b: Tensor) -> float:
    """The Kullback-Leibler divergence of one token's prediction from another's, from logits (vocab_size,), in nats."""
    a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return (a.exp() * (a - b)).sum().item()
