"""The stress test itself: a model on single tokens, repeated ones, random ones, every length, and with a cache."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taperlit.compare import in_a_line
from taperlit.errors import TaperlitError
from taperlit.modes import evaluating
from taperlit.stress.cached import CASE as CACHED
from taperlit.stress.cached import MakeDecoder, compare_cached, decoder_of, tolerance_of
from taperlit.stress.report import Outcome, StressReport
from taperlit.stress.sizes import FULL, Sizes, brief_sizes, cache_runs, likeliest_tokens, spread_lengths
from taperlit.stress.tally import Residual, Tally, find_residual

PASS_LOGITS = 1 << 23  # of a pass, where that is more than one context: 32 MB in float32
PASS_TOKENS = 1 << 12
HALVES = (torch.bfloat16, torch.float16)


def stress(
    model: nn.Module,
    vocab_size: int,
    block_size: int,
    *,
    others: Sequence[torch.dtype] = HALVES,
    sizes: Sizes = FULL,
    residual: str | None = None,
    decoder: MakeDecoder | None = decoder_of,
    seed: int = 0,
    tokenizer_json: str | None = None,
) -> StressReport:
    """Run a model on input that no text has.

    The cases are every single token of the vocabulary as a context of its own; one token repeated to the full context,
    those that were worst alone first; random tokens; random contexts of all lengths (or a spread of them); and decoding
    with the cache at all lengths (or a spread), whose logits must be those of the forward pass. A few rows are run at a
    time; the memory is that of the model, of its copy in one dtype at a time, and of the logits of one context.

    Example::

        report = stress(model, vocab_size=2048, block_size=256)
        print(report.verdict())

    Args:
        model: from (B, T) int64 token ids to (B, T, vocab_size) logits (or an output that has ``logits``), causal. It
            is run in eval mode where it is, and left as it was.
        vocab_size: token ids are below it.
        block_size: the longest context.
        others: dtypes to run it in besides its parameters' own. Buffers that are not saved, such as tables of
            positions, stay as they are.
        sizes: how much is run.
        residual: name of the module that is called with the pre-logit residual, whose root mean square is the scale;
            by default the final norm, or the head where none is found.
        decoder: makes what decodes with a cache, given the model, rows and tokens; by default our engine for our
            transformer and the own cache of a ``transformers`` model. None leaves that out.
        seed: of the random tokens.
        tokenizer_json: to tell tokens as text.

    Raises:
        TaperlitError: the model cannot be run on token ids in its own dtype, or gives no such logits; there is no
            module ``residual``.
    """
    if vocab_size < 1 or block_size < 1:
        raise TaperlitError(f"stress needs a vocabulary and a context of 1 or more, not {vocab_size} and {block_size}.")
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    outcomes: list[Outcome] = []
    with evaluating(model), torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        plan = _Plan(model, vocab_size, min(block_size, sizes.length or block_size), sizes, generator)
        for dtype in dict.fromkeys((own, *others)):
            name = _name(dtype)
            try:
                subject = model if dtype == own else in_dtype(model, dtype)
                outcomes += _Subject(subject, name, vocab_size, residual).outcomes(plan, decoder)
            except TaperlitError:
                raise
            except Exception as error:  # what a stranger's forward raises, and kernels that a dtype has not
                if dtype == own:
                    raise TaperlitError(
                        f"{type(model).__name__} cannot be run on token ids: {in_a_line(error)}."
                    ) from error
                outcomes.append(Outcome("all", name, note=f"not tried: {in_a_line(error)}"))
    return StressReport(outcomes, _name(own), tolerance_of(own), tokenizer_json)


def brief_line(model: nn.Module, example: Any, tokenizer_json: str | None = None) -> tuple[str, bool]:
    """The line that folding prints: a few seconds of single, repeated and random tokens in the model's own dtype.

    Args:
        model: folded.
        example: what it is run on: a tensor, a tuple of arguments or a dict of keyword arguments. Where that is one
            (B, T) tensor of token ids and nothing else, others of that length are put in its place.
        tokenizer_json: to tell tokens as text.

    Returns:
        The line, and whether all is well; whatever goes wrong is in the line.
    """
    try:
        fed, tokens = _fed(model, example)
        with evaluating(model), torch.no_grad():
            size = logits_of(fed(tokens[:1]), tokens[:1]).shape[-1]
        report = stress(
            fed, size, tokens.shape[1], others=(), sizes=brief_sizes(model), decoder=None, tokenizer_json=tokenizer_json
        )
    except Exception as error:  # the model is folded, and this is no reason to lose it
        reason = str(error).rstrip(".") if isinstance(error, TaperlitError) else in_a_line(error)
        return f"stress: left out, since token ids cannot be fed here ({reason})", True
    return report.line(), report.calm


class _ByName(nn.Module):
    """A model that takes token ids by keyword."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, tokens: Tensor) -> Any:
        return self.model(**{self.name: tokens})


def _fed(model: nn.Module, example: Any) -> tuple[nn.Module, Tensor]:
    """What takes token ids alone, and the example's."""
    given: list[tuple[Any, Any]] = list(enumerate(example if isinstance(example, tuple) else (example,)))
    if isinstance(example, Mapping):
        given = list(example.items())
    name, tokens = given[0] if len(given) == 1 else (None, None)
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32) or tokens.dim() != 2:
        raise TaperlitError("the example is not one (B, T) tensor of them")
    if not tokens.numel():
        raise TaperlitError("the example has none")
    return (_ByName(model, str(name)) if isinstance(example, Mapping) else model), tokens


def logits_of(output: Any, tokens: Tensor) -> Tensor:
    """The logits in a model's output.

    Raises:
        TaperlitError: there is none of (B, T, vocab_size).
    """
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None:
        found = output[0] if isinstance(output, list | tuple) and output else output
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape[:-1] != tokens.shape:
        what = f"a tensor of {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise TaperlitError(f"the model gives {what} for {tuple(tokens.shape)} token ids, and not a row of logits each")
    return found


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype. Buffers that are not saved stay: models keep rotary tables in float32."""
    twin = copy.deepcopy(model)
    kept = [
        (module, name, module._buffers[name])
        for module in twin.modules()
        for name in module._non_persistent_buffers_set
    ]
    twin.to(dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer
    return twin


class _Plan:
    """The contexts, the same in every dtype."""

    def __init__(
        self, model: nn.Module, vocab_size: int, longest: int, sizes: Sizes, generator: torch.Generator
    ) -> None:
        self.longest, self.sizes, self.vocab_size = longest, sizes, vocab_size
        self.singles = likeliest_tokens(model, vocab_size, sizes.singles, generator)
        rows = max(1, sizes.tokens // longest)
        self.random = torch.randint(vocab_size, (rows, longest), generator=generator)
        # To be repeated: half the worst alone, which are known once they have run, and half at random.
        self._rows, self._others = min(rows, vocab_size), torch.randperm(vocab_size, generator=generator)
        self.repeated: Tensor | None = None
        lengths = spread_lengths(longest, sizes.tokens) if sizes.lengths else []
        self.contexts = [torch.randint(vocab_size, (1, length), generator=generator) for length in lengths]
        self.decoded = torch.randint(vocab_size, (2, longest), generator=generator)
        self.runs = cache_runs(longest, sizes.steps) if sizes.steps else []

    def repeat_worst(self, badness: Tensor) -> None:
        """Settle which tokens are repeated, by how bad each of ``singles`` was alone, (n,)."""
        worst = self.singles[badness.topk(min((self._rows + 1) // 2, len(badness))).indices]
        others = self._others[~torch.isin(self._others, worst)]
        tokens = torch.cat((worst, others))[: self._rows]
        self.repeated = tokens[:, None].expand(-1, self.longest).contiguous()


class _Subject:
    """A model in one dtype."""

    def __init__(self, model: nn.Module, dtype: str, vocab_size: int, residual: str | None) -> None:
        self.model, self.dtype, self.vocab_size = model, dtype, vocab_size
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        first = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        if residual is None:
            module = find_residual(model, vocab_size, first)
        else:
            try:
                module = model.get_submodule(residual)
            except AttributeError as error:
                raise TaperlitError(
                    f"{type(model).__name__} has no module {residual!r}; name its final norm."
                ) from error
        self.residual = Residual(module)

    def outcomes(self, plan: _Plan, decoder: MakeDecoder | None) -> Iterator[Outcome]:
        """One per case."""
        singles, badness = self._case("single tokens", [plan.singles[:, None]])
        yield singles
        if plan.repeated is None:
            plan.repeat_worst(badness)
        assert plan.repeated is not None
        if plan.longest > 1:
            yield self._case("repeated tokens", [plan.repeated])[0]
            yield self._case("random tokens", [plan.random])[0]
        if plan.contexts:
            yield self._case(f"random contexts of {len(plan.contexts)} lengths", plan.contexts)[0]
        if plan.runs and decoder is not None:
            yield self._cached(plan, decoder)

    def _case(self, name: str, contexts: list[Tensor]) -> tuple[Outcome, Tensor]:
        tally, badness = Tally(name, self.dtype), []
        with self.residual.watched():
            for tokens in contexts:
                rows = max(1, min(PASS_LOGITS // (tokens.shape[1] * self.vocab_size), PASS_TOKENS // tokens.shape[1]))
                for part in tokens.split(rows):
                    logits = self._logits(part)
                    badness.append(tally.add(part, logits, self.residual.take(part.shape)).cpu())
        return tally.outcome(), torch.cat([part.flatten() for part in badness])

    def _logits(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.device)
        return logits_of(self.model(tokens), tokens)

    def _cached(self, plan: _Plan, make: MakeDecoder) -> Outcome:
        rows = 2 if 2 * plan.longest * self.vocab_size <= PASS_LOGITS else 1
        tokens = plan.decoded[:rows].to(self.device)
        try:
            decoder = make(self.model, rows, plan.longest)
        except TaperlitError as error:
            return Outcome(CACHED, self.dtype, note=f"not tried: {error}")
        if decoder is None:
            return Outcome(CACHED, self.dtype, note="not tried: no decoder is known for this model")
        return compare_cached(decoder, tokens, self._logits(tokens), plan.runs, self.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
