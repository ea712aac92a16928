"""The stress test against models whose faults are planted, and against formulas in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import build
from torch import nn

from taperlit.decode.engine import Engine
from taperlit.errors import TaperlitError
from taperlit.hub.causal_lm import CausalLM
from taperlit.hub.origin import Origin
from taperlit.stress import QUICK, Sizes, stress
from taperlit.stress import probe as probing
from taperlit.stress.probe import in_dtype
from taperlit.stress.sizes import cache_runs, likeliest_tokens, spread_lengths

VOCAB, BLOCK = 40, 12
SMALL = Sizes(tokens=240)


class Bare(nn.Module):
    """A causal model without norms: each token's state is the mean of squares so far."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.up, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, VOCAB)
        self.seen = []

    def hidden(self, tokens):
        x = self.embed(tokens)
        before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None].to(x.dtype)
        return x + before + self.up(x) ** 2

    def forward(self, tokens):
        self.seen.append(tuple(tokens.shape))
        return self.head(self.hidden(tokens))

    @torch.no_grad()
    def plant(self, token, size):
        self.embed.weight[token] *= size
        return self


def only(report, case, dtype="float32"):
    (found,) = [outcome for outcome in report.outcomes if (outcome.case, outcome.dtype) == (case, dtype)]
    return found


@pytest.mark.parametrize("planted", [0, 17, VOCAB - 1])
def test_a_token_that_explodes_is_found_by_name(planted):
    model = Bare().plant(planted, 1e25)  # its square is more than float32 holds
    report = stress(model, VOCAB, BLOCK, sizes=SMALL)
    assert not report.ok
    assert not report.calm
    for outcome in report.outcomes:
        if outcome.dtype == "float32" and outcome.nonfinite:
            assert outcome.worst_token == planted, outcome
    assert all(only(report, case).nonfinite for case in ("single tokens", "repeated tokens", "random tokens"))
    alone = model.double().eval()(torch.tensor([[planted]])).float()  # float64 holds it
    assert only(report, "single tokens").nonfinite == (~alone.isfinite()).sum()
    assert only(report, "single tokens").scale_ratio == float("inf")
    assert f"single tokens: token {planted} at position 0" in report.verdict()
    assert report.verdict().split()[1:7] == ["logits", "are", "not", "finite", "in", "float32,"]
    assert f"token {planted} at position 0" in report.line()
    assert "WARNING" in report.line()


def test_scales_and_logits_are_those_of_float64():
    model = Bare().plant(23, 30.0)
    report = stress(model, VOCAB, BLOCK, sizes=SMALL, others=())
    twin = copy.deepcopy(model).double()
    tokens = torch.arange(VOCAB)[:, None]
    rms = twin.hidden(tokens).square().mean(-1).sqrt().flatten()
    single = only(report, "single tokens")
    assert single.scale_ratio == pytest.approx((rms.max() / rms.median()).item(), rel=1e-5)
    assert single.scale_ratio > 20
    assert single.largest_logit == pytest.approx(twin(tokens).abs().max().item(), rel=1e-5)
    assert (single.worst_token, single.worst_position, single.tokens) == (23, 0, VOCAB)
    assert report.largest.worst_token == 23
    assert report.ok
    assert not report.calm
    assert f"largest scale {report.largest.scale_ratio:.3g} times the median" in report.line()


def test_what_only_float16_cannot_hold_is_told_and_is_no_failure():
    model = Bare().plant(5, 1000.0)  # squared and through the head it is above 65504, and far below float32's end
    assert 65504 < model(torch.tensor([[5]])).abs().max() < 1e12
    report = stress(model, VOCAB, BLOCK, sizes=SMALL)
    assert report.ok
    assert only(report, "single tokens", "float16").nonfinite > 0
    assert only(report, "single tokens", "bfloat16").nonfinite == 0
    verdict = report.verdict()
    assert verdict.startswith("no non-finite logits in float32 and bfloat16; ")
    assert "not for float16: " in verdict
    assert "token 5 at position 0" in verdict
    assert report.largest.worst_token == 5


def test_a_healthy_normalised_model_passes(tiny):
    model = tiny()
    report = stress(model, 300, 32, sizes=Sizes(tokens=640))
    assert report.ok
    assert report.calm
    assert sum(outcome.nonfinite for outcome in report.outcomes) == 0
    assert [o.case for o in report.outcomes if o.dtype == "float32"] == [
        "single tokens", "repeated tokens", "random tokens", "random contexts of 32 lengths", "cached decoding",
    ]  # fmt: skip
    assert [o.note for o in report.outcomes] == [None] * 15
    assert report.verdict().startswith("no non-finite logits in float32, bfloat16 and float16; largest scale ")
    assert only(report, "cached decoding").tokens == 2 * 32  # every length of the cache, in two rows
    assert only(report, "cached decoding").difference < 1e-4
    assert 0 < only(report, "cached decoding", "bfloat16").difference < 0.1
    residual = []
    model.final_norm.register_forward_pre_hook(lambda module, args: residual.append(args[0].double()))
    with torch.no_grad():
        model(torch.arange(300)[:, None])
    rms = residual[0].square().mean(-1).sqrt().flatten()
    assert only(report, "single tokens").scale_ratio == pytest.approx((rms.max() / rms.median()).item(), rel=1e-4)


def test_every_token_and_every_length_is_run():
    model = Bare()
    report = stress(model, VOCAB, BLOCK, sizes=SMALL, others=())
    assert only(report, "single tokens").tokens == VOCAB
    assert {T for _, T in model.seen} == set(range(1, BLOCK + 1))
    assert only(report, f"random contexts of {BLOCK} lengths").tokens == sum(range(1, BLOCK + 1))


def test_a_pretrained_model_decodes_with_its_own_cache():
    model = CausalLM(build("llama"), Origin("llama", {}))
    report = stress(model, 300, 24, sizes=Sizes(singles=50, tokens=96), others=(torch.bfloat16,))
    assert report.ok
    assert only(report, "cached decoding").difference < 1e-4
    assert only(report, "cached decoding").tokens == 2 * 24


class Forgetful:
    """Decodes by whole forward passes, and forgets the first token once there are more than ``most``."""

    def __init__(self, model, most):
        self.model, self.most = model, most

    def prefill(self, prompts):
        self.tokens = prompts
        return self.look()

    def step(self, tokens):
        self.tokens = torch.cat((self.tokens, tokens[:, None]), 1)
        return self.look()

    def look(self):
        tokens = self.tokens[:, 1:] if self.tokens.shape[1] > self.most else self.tokens
        return self.model(tokens)[:, -1]


@pytest.mark.parametrize("most", [BLOCK, 9, 1])
def test_a_decoder_with_a_wrong_cache_is_found(most):
    model = Bare()
    report = stress(
        model, VOCAB, BLOCK, sizes=SMALL, others=(), decoder=lambda model, rows, length: Forgetful(model, most)
    )
    outcome = only(report, "cached decoding")
    assert report.ok == (most == BLOCK)
    if most < BLOCK:
        assert most < outcome.difference_length <= BLOCK
        assert "cached decoding differs from the forward pass by" in report.verdict()


def test_a_decoder_that_is_wrong_once_is_found_with_its_length(tiny):
    class Once(Engine):
        def step(self, tokens):
            logits = super().step(tokens)
            return logits + 0.5 * (self.filled == 21)

    def make(model, rows, length):
        return Once(model, rows, length, backend="eager")

    report = stress(tiny(), 300, 32, sizes=QUICK, others=(), decoder=make)
    assert only(report, "cached decoding").difference_length == 21
    assert not report.ok


def test_what_only_the_forward_pass_runs_fails_in_the_cache(tiny):
    model = tiny()
    of_all = torch.nn.modules.module.register_module_forward_hook  # which the engine cannot see
    hook = of_all(lambda module, args, output: 3 * output if module is model.blocks[0].mlp else None)
    try:
        report = stress(model, 300, 32, sizes=QUICK, others=())
    finally:
        hook.remove()
    assert only(report, "cached decoding").difference > 0.01
    assert not report.ok
    assert "cached decoding differs from the forward pass by" in report.verdict()


def test_what_cannot_decode_is_a_note(tiny):
    model = tiny()
    model.blocks[1].attn_norm = nn.Sequential(model.blocks[1].attn_norm)
    report = stress(model, 300, 32, sizes=QUICK, others=())
    assert report.ok
    note = only(report, "cached decoding").note
    assert note.startswith("not tried: blocks.1.attn_norm is a Sequential, which the decoding engine does not know")
    assert f"; cached decoding {note}" in report.verdict()
    model = tiny()
    model.blocks[0].mlp.register_forward_hook(lambda module, args, output: 3 * output)
    verdict = stress(model, 300, 32, sizes=QUICK, others=()).verdict()
    assert "cached decoding not tried: blocks.0.mlp has forward hooks, which decoding does not call" in verdict
    assert only(stress(Bare(), VOCAB, BLOCK, sizes=SMALL, others=()), "cached decoding").note.endswith("this model")


def test_the_model_and_the_generators_are_left_as_they_were(tiny):
    model = tiny(["*norm"]).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state, hooks = copy.deepcopy(model.state_dict()), len(model.final_norm._forward_pre_hooks)
    rng = torch.get_rng_state()
    first = stress(model, 300, 32, sizes=QUICK, seed=3)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == modes
    assert len(model.final_norm._forward_pre_hooks) == hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(norm.pending.eq(0).all() for norm in model.modules() if hasattr(norm, "pending"))
    assert stress(model, 300, 32, sizes=QUICK, seed=3).outcomes == first.outcomes
    assert stress(model, 300, 32, sizes=QUICK, seed=4).outcomes != first.outcomes


def test_a_copy_in_another_dtype(tiny):
    model = tiny(tied=True)
    twin = in_dtype(model, torch.float16)
    assert {p.dtype for p in twin.parameters()} == {torch.float16}
    assert twin.head.weight is twin.tok_embed.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    llama = build("llama")
    kept = {name: b for name, b in llama.named_buffers() if b.is_floating_point()}
    assert kept
    for name, buffer in in_dtype(llama, torch.bfloat16).named_buffers():
        if name in kept:
            assert torch.equal(buffer, kept[name])
            assert buffer.dtype == torch.float32


def test_passes_are_no_larger_than_they_may_be(monkeypatch):
    monkeypatch.setattr(probing, "PASS_LOGITS", 3 * BLOCK * VOCAB)
    model = Bare()
    stress(model, VOCAB, BLOCK, sizes=SMALL, others=(), decoder=None)
    assert max(B * T for B, T in model.seen) == 3 * BLOCK
    monkeypatch.setattr(probing, "PASS_LOGITS", 1)
    model = Bare()
    stress(model, VOCAB, BLOCK, sizes=SMALL, others=(), decoder=None)
    assert max(B for B, _ in model.seen) == 1


def test_what_cannot_be_run_is_one_line():
    with pytest.raises(TaperlitError, match=r"the model gives a tensor of \(5, 2\) for \(5, 1\) token ids"):
        stress(nn.Sequential(nn.Embedding(5, 1), nn.Flatten(), nn.Linear(1, 2)), 5, 4)
    with pytest.raises(TaperlitError, match=r"Linear cannot be run on token ids: RuntimeError"):
        stress(nn.Linear(1, 3), 5, 4)
    with pytest.raises(TaperlitError, match="Bare has no module 'norm'; name its final norm"):
        stress(Bare(), VOCAB, BLOCK, residual="norm")
    with pytest.raises(TaperlitError, match="a vocabulary and a context of 1 or more, not 0 and 4"):
        stress(Bare(), 0, 4)


def test_a_dtype_without_a_kernel_is_a_note():
    class Picky(Bare):
        def forward(self, tokens):
            if self.embed.weight.dtype == torch.float16:
                raise NotImplementedError("no kernel for Half")
            return super().forward(tokens)

    report = stress(Picky(), VOCAB, BLOCK, sizes=SMALL)
    assert report.ok
    assert report.outcomes[-1].note == "not tried: NotImplementedError: no kernel for Half"
    assert report.verdict().startswith("no non-finite logits in float32 and bfloat16;")


@settings(deadline=None, max_examples=60)
@given(longest=st.integers(1, 700), tokens=st.integers(1, 20_000))
def test_lengths_are_spread_from_one_to_the_longest(longest, tokens):
    lengths = spread_lengths(longest, tokens)
    assert lengths == sorted(set(lengths))
    assert {1, longest} <= {*lengths} <= {*range(1, longest + 1)}
    if longest * (longest + 1) // 2 <= tokens:
        assert len(lengths) == longest


@settings(deadline=None, max_examples=60)
@given(longest=st.integers(1, 5000), steps=st.integers(1, 2000))
def test_the_cache_is_filled_to_the_end(longest, steps):
    runs = cache_runs(longest, steps)
    assert all(prompt >= 1 and count >= 0 and prompt + count <= longest for prompt, count in runs)
    assert max(prompt + count for prompt, count in runs) == longest
    assert sum(count for _, count in runs) <= max(steps, 8)
    if longest - 1 <= steps:
        assert runs == [(1, longest - 1)]


def test_the_longest_embeddings_are_among_the_few_that_are_tried():
    model = Bare().plant(31, 50.0).plant(8, 40.0)
    tokens = likeliest_tokens(model, VOCAB, 6, torch.Generator().manual_seed(0))
    assert {31, 8} <= {*tokens.tolist()}
    assert len({*tokens.tolist()}) == 6
    every = likeliest_tokens(model, VOCAB, None, torch.Generator())
    assert every.tolist() == list(range(VOCAB))
