"""``taperlit bench decode``: normalized, explicit and folded on our engine, and the engines of others."""

import copy
import dataclasses
import gc
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from taperlit.bench.kernels import compiled, dispatched, launched
from taperlit.bench.models import folded, random_model, tapered
from taperlit.bench.peers import Unavailable, converted, onnxruntime_engine
from taperlit.bench.results import Row
from taperlit.bench.turns import ratios, seconds, spread, take_turns
from taperlit.compare import largest_difference
from taperlit.decode.engine import Backend, Engine
from taperlit.decode.layout import Layouts, in_words
from taperlit.decode.norms import RmsForm, fastest_rms_form
from taperlit.errors import TaperlitError
from taperlit.training.policy import Policy
from taperlit.transformer import Transformer, TransformerConfig

COLUMNS = {
    "ratio": "against normalized",
    "variant": "variant",
    "preset": "preset",
    "batch": "batch",
    "prompt": "prompt",
    "dtype": "dtype",
    "backend": "backend",
    "tokens_per_s": "tokens/s",
    "step_ms": "ms/step",
    "ttft_ms": "ms to first",
    "gb_s": "GB/s",
    "bandwidth_share": "of memory",
    "kernels_per_token": "kernels/step",
    "kernels_per_layer": "per layer",
    "layout": "layout",
    "norm": "norm",
    "tokens": "tokens",
    "skipped": "skipped",
}
FLOAT32_TOLERANCE = 1e-4  # of logits relative to the largest: rounding of float32 through many layers
COARSE = 4  # times the model's own error in a half precision is rounding too
CHECKED_TOKENS = 32
PAUSE = 0.3  # seconds between turns: onnxruntime's threads wait busily for a while after theirs


class Decodes(Protocol):
    """What an engine is to the bench."""

    def prefill(self, prompts: Tensor) -> Tensor:
        """(B, T) prompts to (B, vocab_size) logits."""

    def step(self, tokens: Tensor) -> Tensor:
        """(B,) tokens to (B, vocab_size) logits."""


@dataclass(frozen=True)
class Timing:
    """One run of a decoder.

    Args:
        first: seconds to the first token.
        step: seconds per token after it.
    """

    first: float
    step: float


@dataclass
class Contender:
    """What takes part in a comparison.

    Args:
        run: decodes once and says how long it took.
        facts: entries of its row that are not measured in turns.
    """

    run: Callable[[], Timing]
    facts: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """One cell of the grid.

    Args:
        preset: the model's shape.
        batch: rows decoded together.
        prompt: tokens of each prompt.
        new_tokens: decoded after it.
        dtype: of weights and activations.
        backend: of the engine.
        device: where it runs.
        rounds: times that each variant is measured.
        bandwidth: of the memory, in GB/s.
    """

    preset: str
    batch: int
    prompt: int
    new_tokens: int
    dtype: torch.dtype
    backend: Backend
    device: torch.device
    rounds: int
    bandwidth: float

    @property
    def length(self) -> int:
        """Tokens per row in all."""
        return self.prompt + self.new_tokens

    def prompts(self, vocab_size: int) -> Tensor:
        """(batch, prompt) random tokens, always the same."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(vocab_size, (self.batch, self.prompt), generator=generator).to(self.device)


@dataclass
class Models:
    """The three variants of one set of weights, on the CPU in float32, in the order that they are told.

    Args:
        config: of all.
        taper: which norms of the second are tapered.
        variants: by name.
    """

    config: TransformerConfig
    taper: Policy
    variants: dict[str, Transformer]

    @classmethod
    def build(cls, config: TransformerConfig, taper: Policy, seed: int) -> "Models":
        """Random weights, tapered by a policy, and folded."""
        plain = random_model(config, seed)
        explicit = tapered(plain, taper)
        return cls(config, taper, {"normalized": plain, "explicit": explicit, "folded": folded(explicit)})


def decode_rows(models: Models, setting: Setting, peers: bool = True, count_layers: bool = True) -> Iterator[Row]:
    """Measure one cell of the grid.

    Args:
        models: of the preset.
        setting: see :class:`Setting`.
        peers: measure ``transformers`` and ``onnxruntime`` too.
        count_layers: compile a model of other depth too, to say how many kernels a layer takes.

    Yields:
        A row per variant, ``normalized`` first. One that cannot be measured says why in ``skipped``.

    Raises:
        TaperlitError: a variant does not give the tokens of the plain forward pass.
    """
    torch.compiler.reset()  # what is compiled of other cells would count against torch's limit
    prompts = setting.prompts(models.config.vocab_size)
    contenders: dict[str, Contender] = {}
    texts: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    layout: Layouts | Literal["auto"] = "auto"
    rms_form = _rms_form(models.config, setting)
    variants = dict(models.variants)
    if rms_form != "fused":  # torch's own function is slower here; it is what others run, and is told too
        variants = {"normalized": models.variants["normalized"], "normalized-fused": models.variants["normalized"]}
        variants |= models.variants
    for name, model in variants.items():
        form = "fused" if name == "normalized-fused" else rms_form
        engine, kernels = _build(model, setting, layout, form)
        layout = engine.layout
        texts[name], agreement, size = check(name, engine, model, prompts, setting)
        if kernels is None:
            kernels = _count(engine, prompts)
        facts: Row = {
            "kernels_per_token": len(kernels),
            "bytes_per_step": size,
            "tokens": agreement,
            "layout": in_words(layout),
            "norm": form if name.startswith("normalized") and models.config.norm == "rmsnorm" else None,
        }
        if name == "folded" and count_layers:
            facts["kernels_per_layer"] = _kernels_per_layer(models, setting, layout, len(kernels))
        contenders[name] = Contender(partial(_run, engine, prompts, setting), facts)
    if setting.dtype is torch.float32:
        _require_same(texts, models.variants["explicit"], prompts)
    if peers:
        for name, build in _peers(models, setting, prompts, texts["normalized"]).items():
            try:
                contenders[name] = build()
            except Unavailable as reason:
                skipped[name] = str(reason)
    timings = take_turns({name: contender.run for name, contender in contenders.items()}, setting.rounds, pause=PAUSE)
    for name, contender in contenders.items():
        yield _row(name, setting, timings[name], timings["normalized"], contender.facts)
    for name, why in skipped.items():
        yield {**_row(name, setting, [], [], {}), "skipped": why}
    gc.collect()


def _row(name: str, setting: Setting, own: list[Timing], first: list[Timing], facts: Row) -> Row:
    row: Row = {
        "preset": setting.preset,
        "batch": setting.batch,
        "prompt": setting.prompt,
        "new_tokens": setting.new_tokens,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "backend": setting.backend,
        "variant": name,
        "rounds": setting.rounds,
    }
    keys = (
        "tokens_per_s",
        "ratio",
        "low",
        "high",
        "kernels_per_token",
        "step_ms",
        "ttft_ms",
        "gb_s",
        "bandwidth_share",
    )
    row |= dict.fromkeys(keys)
    if own:
        step = spread([timing.step for timing in own]).median
        ratio = ratios([1 / timing.step for timing in own], [1 / timing.step for timing in first])
        row |= {"tokens_per_s": setting.batch / step, "ratio": ratio.median, "low": ratio.low, "high": ratio.high}
        row |= {"step_ms": 1e3 * step, "ttft_ms": 1e3 * spread([timing.first for timing in own]).median}
        if "bytes_per_step" in facts:
            row["gb_s"] = facts["bytes_per_step"] / step / 1e9
            row["bandwidth_share"] = row["gb_s"] / setting.bandwidth
    return row | facts


# ---- our engine


def _rms_form(config: TransformerConfig, setting: Setting) -> RmsForm:
    """The fastest form of the norms, so that folding is compared with no slower one."""
    if config.norm != "rmsnorm" or setting.backend == "compile":
        return "fused"
    return fastest_rms_form(torch.ones(setting.batch, config.d_model, device=setting.device, dtype=setting.dtype))


def _build(
    model: Transformer,
    setting: Setting,
    layout: Layouts | Literal["auto"],
    rms_form: RmsForm | Literal["auto"] = "auto",
) -> tuple[Engine, list[str] | None]:
    """An engine, and the kernels that its compiled step calls, if they are known by its being compiled."""
    engine: Engine | None = None

    def build() -> None:
        nonlocal engine
        engine = Engine(
            model,
            setting.batch,
            setting.length,
            setting.device,
            setting.dtype,
            backend=setting.backend,
            layout=layout,
            rms_form=rms_form,
        )

    if setting.backend == "compile" and setting.device.type == "cpu":
        kernels = compiled(build)
    else:
        build()
        kernels = None
    assert engine is not None
    return engine, kernels


def _count(engine: Engine, prompts: Tensor) -> list[str]:
    """The kernels of one step, where compiling did not tell."""
    engine.prefill(prompts)
    tokens = prompts[:, -1].contiguous()
    if engine.device.type == "cuda":
        return launched(lambda: engine.step(tokens))
    step = inspect.unwrap(type(engine).step)  # without its inference mode, see dispatched()
    return dispatched(lambda: step(engine, tokens))


def _kernels_per_layer(models: Models, setting: Setting, layout: Layouts, kernels: int) -> float:
    """By a folded model of another depth, so that embedding and head are left out."""
    config = models.config
    depth = 2 if config.n_layer != 2 else 3
    model = folded(tapered(random_model(dataclasses.replace(config, n_layer=depth)), models.taper))
    engine, counted = _build(model, setting, layout)
    if counted is None:
        counted = _count(engine, setting.prompts(config.vocab_size))
    return (kernels - len(counted)) / (config.n_layer - depth)


def _run(engine: Decodes, prompts: Tensor, setting: Setting) -> Timing:
    tokens = torch.empty(0)

    def first() -> None:
        nonlocal tokens
        tokens = engine.prefill(prompts).argmax(-1)

    def others() -> None:
        nonlocal tokens
        for _ in range(setting.new_tokens - 1):
            tokens = engine.step(tokens).argmax(-1)

    to_first = seconds(first, setting.device)
    return Timing(to_first, seconds(others, setting.device) / (setting.new_tokens - 1))


def _greedy(engine: Decodes, prompts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B, n) tokens and (B, n, vocab_size) float32 logits on the CPU."""
    tokens: list[Tensor] = []
    logits: list[Tensor] = []
    for i in range(count):
        out = engine.prefill(prompts) if i == 0 else engine.step(tokens[-1])
        tokens.append(out.argmax(-1))
        logits.append(out.float().cpu())
    return torch.stack(tokens, 1), torch.stack(logits, 1)


@torch.no_grad()
def _plain(model: nn.Module, prompts: Tensor, tokens: Tensor) -> Tensor:
    """(B, n, vocab_size) float32 logits of a forward pass without a cache over prompts and what was decoded."""
    device = next(model.parameters()).device
    sequence = torch.cat((prompts, tokens[:, :-1]), 1).to(device)
    return model(sequence)[:, prompts.shape[1] - 1 :].float().cpu()


@torch.no_grad()
def check(
    name: str, engine: Decodes, model: Transformer, prompts: Tensor, setting: Setting
) -> tuple[Tensor, str, int | None]:
    """Compare an engine's greedy decoding with the plain forward pass without a cache, in float32.

    Given the tokens so far, the forward pass must find each next one too, which is what decoding without a cache would
    give. In half precision what is compared is the logits: within a few times of what that precision does to the plain
    pass itself.

    Args:
        name: of the variant, for the error.
        engine: to check.
        model: in float32.
        prompts: (B, T).
        setting: see :class:`Setting`.

    Returns:
        The (B, n) tokens, in words how they agree, and the bytes of one step, halfway.

    Raises:
        TaperlitError: they differ by more than rounding, or the forward pass itself overflows.
    """
    count = min(CHECKED_TOKENS, setting.new_tokens)
    tokens, logits = _greedy(engine, prompts, count)
    size = engine.bytes_per_step(setting.prompt + setting.new_tokens // 2) if isinstance(engine, Engine) else None
    plain = _plain(model, prompts, tokens)
    difference = largest_difference(plain, logits)
    same = torch.equal(plain.argmax(-1), tokens.cpu())
    tolerance = FLOAT32_TOLERANCE
    if setting.dtype is not torch.float32:
        coarse = _plain(copy.deepcopy(model).to(setting.dtype), prompts, tokens)
        own = largest_difference(plain, coarse)
        if not math.isfinite(own):
            number_type = str(setting.dtype).removeprefix("torch.")
            raise TaperlitError(f"{name} ({setting.preset}) overflows in {number_type}; measure another dtype.")
        tolerance = COARSE * max(own, torch.finfo(setting.dtype).eps)
    if not difference <= tolerance:
        raise TaperlitError(
            f"{name} ({setting.preset}, batch {setting.batch}, prompt {setting.prompt}, {setting.backend}) does not "
            f"decode what its forward pass gives: logits differ by {difference:.1e} relative, more than "
            f"{tolerance:.1e}; its figures would be of another model."
        )
    if same:
        return tokens, "equal", size
    # The logits agree, so where the tokens do not two logits were as good as equal.
    return tokens, f"equal within rounding ({difference:.0e})", size


def _require_same(texts: Mapping[str, Tensor], model: Transformer, prompts: Tensor) -> None:
    """Refuse explicit and folded tokens that differ, but where two logits are equal within rounding."""
    first_difference(
        "folded", texts["folded"], "explicit", texts["explicit"], lambda tokens: _plain(model, prompts, tokens)
    )


def first_difference(
    name: str, tokens: Tensor, base: str, expected: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> str:
    """In words how two greedy texts agree.

    Args:
        name: of the one.
        tokens: its (B, n).
        base: the other's name.
        expected: its (B, n).
        logits_of: (B, n, vocab_size) logits given the other's tokens.

    Raises:
        TaperlitError: they differ where two logits were not equal within rounding.
    """
    tokens, expected = tokens.cpu(), expected.cpu()
    differ = tokens != expected
    if not bool(differ.any()):
        return "equal"
    logits = logits_of(expected)
    for row in differ.any(1).nonzero().flatten().tolist():
        at = int(differ[row].nonzero()[0])
        own = logits[row, at]
        gap = (own[expected[row, at]] - own[tokens[row, at]]).abs() / own.abs().max()
        if not gap <= FLOAT32_TOLERANCE:
            raise TaperlitError(
                f"{name} decodes other tokens than {base}: row {row} differs from token {at} on, where the logits are "
                f"{gap:.1e} apart; its figures would be of another model."
            )
    return "equal until two logits tie"


# ---- others


def _peers(models: Models, setting: Setting, prompts: Tensor, expected: Tensor) -> dict[str, Callable[[], Contender]]:
    normalized = models.variants["normalized"]
    theirs: list[nn.Module] = []

    def transformers(cache: str, compile: bool) -> Contender:
        if not theirs:
            theirs.append(converted(normalized).to(setting.device, setting.dtype))
        return _transformers(theirs[0], setting, prompts, expected, normalized, cache, compile)

    if setting.backend == "compile":
        return {"transformers-compiled": lambda: transformers("static", True)}
    return {
        "transformers-dynamic": lambda: transformers("dynamic", False),
        "transformers-static": lambda: transformers("static", False),
        "onnxruntime-normalized": lambda: _onnxruntime("normalized", models, setting, prompts),
        "onnxruntime-folded": lambda: _onnxruntime("folded", models, setting, prompts),
    }


def _transformers(
    model: nn.Module,
    setting: Setting,
    prompts: Tensor,
    expected: Tensor,
    plain: Transformer,
    cache: str,
    compile: bool,
) -> Contender:
    """``generate`` with a cache; what a call for one token takes is taken off, so that prefill stands apart."""
    import transformers

    def generate(count: int) -> Tensor:
        config = transformers.GenerationConfig(
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            cache_implementation=cache,
            disable_compile=not compile,
        )
        if compile:
            config.compile_config = transformers.CompileConfig(
                mode="default" if prompts.device.type == "cpu" else "reduce-overhead"
            )
            # A CPU is left out unless this is set; where it is not there any more, that is found below.
            config.compile_config._compile_all_devices = True
        mask = torch.ones_like(prompts)
        return model.generate(prompts, attention_mask=mask, generation_config=config)[:, prompts.shape[1] :]  # type: ignore[operator]

    def run() -> Timing:
        # A static cache keeps the length of the longest call so far, so that both calls have the same.
        first = seconds(lambda: generate(1), setting.device)
        others = seconds(lambda: generate(setting.new_tokens), setting.device) - first
        return Timing(first, others / (setting.new_tokens - 1))

    try:
        tokens = generate(setting.new_tokens)[:, : expected.shape[1]]
    except Exception as error:  # whatever a compiler raises
        words = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise Unavailable(f"generate failed ({words})") from error
    if tokens.shape != expected.shape:
        raise Unavailable(f"generate gave {tokens.shape[1]} tokens where {expected.shape[1]} were asked for")
    if compile and not hasattr(model, "_compiled_call"):
        raise Unavailable("generate did not compile")
    facts: Row = {"tokens": None}
    if setting.dtype is torch.float32:
        name = f"transformers-{'compiled' if compile else cache}"
        facts["tokens"] = first_difference(
            name, tokens, "normalized", expected, lambda tokens: _plain(plain, prompts, tokens)
        )
    return Contender(run, facts)


def _onnxruntime(variant: str, models: Models, setting: Setting, prompts: Tensor) -> Contender:
    if setting.device.type != "cpu":
        raise Unavailable("onnxruntime is measured on the CPU")
    model = models.variants[variant]
    engine = onnxruntime_engine(model, setting.batch, setting.length, setting.dtype)
    _, agreement, _ = check(f"onnxruntime-{variant}", engine, model, prompts, setting)
    return Contender(partial(_run, engine, prompts, setting), {"tokens": agreement})


# ---- for reports


@dataclass(frozen=True)
class Comparison:
    """Rates of one alternative against the first.

    Args:
        name: of the alternative.
        rate: median rate, in units a second.
        ratio: median over rounds of its rate by the first's in the same round.
        low: smallest of those ratios.
        high: largest of them.
    """

    name: str
    rate: float
    ratio: float
    low: float
    high: float


def compare_decoding(
    models: Mapping[str, Transformer],
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    batch_size: int = 1,
    rounds: int = 7,
) -> list[Comparison]:
    """Tokens a second of greedy decoding after the first token, on engines of one layout that take turns.

    Args:
        models: by name, of one vocabulary and context.
        prompt_tokens: length of the prompt; a shorter context takes less of both.
        new_tokens: tokens decoded.
        batch_size: sequences decoded together.
        rounds: times that each is measured.

    Returns:
        A comparison each, in the order given; the first has ratio 1.
    """
    config = next(iter(models.values())).config
    prompt_tokens = min(prompt_tokens, max(1, config.block_size // 4))
    new_tokens = max(2, min(new_tokens, config.block_size - prompt_tokens))
    layout: Layouts | Literal["auto"] = "auto"
    works = {}
    for name, model in models.items():
        device, dtype = model.head.weight.device, model.head.weight.dtype
        setting = Setting(name, batch_size, prompt_tokens, new_tokens, dtype, "eager", device, rounds, math.nan)
        engine, _ = _build(model, setting, layout)
        layout = engine.layout
        works[name] = partial(_run, engine, setting.prompts(config.vocab_size), setting)
    timings = take_turns(works, rounds)
    first = next(iter(timings.values()))
    results = []
    for name, own in timings.items():
        rates = [batch_size / timing.step for timing in own]
        ratio = ratios(rates, [batch_size / timing.step for timing in first])
        results.append(Comparison(name, spread(rates).median, ratio.median, ratio.low, ratio.high))
    return results
