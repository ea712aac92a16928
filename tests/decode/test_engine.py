"""Decoding with a cache gives the tokens of full forward passes without one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from taperlit.bench.peers import converted
from taperlit.decode.engine import Engine
from taperlit.decode.product import layouts_for
from taperlit.decode.sampling import Sampling
from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.norm import shared_gate, tapered_norms
from taperlit.surgery import taper
from taperlit.transformer import MLP_KINDS, PRESETS, Transformer, TransformerConfig

SMALL = dict(vocab_size=98, block_size=24, n_layer=2, d_model=32, d_ff=48)
KINDS = ("normalized", "explicit", "folded")


def build(kind, preset="small_1m", names=("*",), **changes) -> Transformer:
    """A small model of a preset's architecture, with weights large enough for logits that tell tokens apart."""
    config = TransformerConfig.from_preset(preset, **{**SMALL, **changes})
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    if kind != "normalized":
        taper(model, names)
        shared_gate(model).set(0.0)
        with torch.no_grad():
            for norm in tapered_norms(model).values():
                norm.alignment.fill_(0.7)
                norm.taper_weight.add_(0.3 * torch.randn_like(norm.taper_weight))
    if kind == "folded":
        fold(model, lambda: model(torch.arange(12)[None]))
    return model


@torch.no_grad()
def greedy(model, prompt, n) -> list[int]:
    """Greedy tokens of whole forward passes, no cache."""
    tokens = torch.tensor([prompt])
    for _ in range(n):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :].tolist()


def prompts_of(lengths, vocab=97):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_tokens_of_every_preset_are_those_of_full_passes(preset, kind):
    heads = PRESETS[preset].get("n_head", 12)
    kv = PRESETS[preset].get("n_kv_head", heads)
    # As many queries per key as the preset has, at two heads' width.
    model = build(kind, preset, n_head=4 if kv < heads else 2, n_kv_head=2)
    prompts = prompts_of([5, 1, 9])
    engine = Engine(model, batch_size=3, layout="columns", rms_form="composed")
    assert engine.generate(prompts, 10) == [greedy(model, prompt, 10) for prompt in prompts]


@pytest.mark.parametrize("backend", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mlp", [mlp for mlp in MLP_KINDS if mlp != "swiglu"])  # which small_1m has
def test_tokens_of_every_mlp_are_those_of_full_passes(mlp, kind, backend):
    model = build(kind, mlp=mlp)
    prompts = prompts_of([5, 1, 9])
    engine = Engine(model, batch_size=3, backend=backend, layout="rows", rms_form="fused")
    assert engine.generate(prompts, 10) == [greedy(model, prompt, 10) for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_rows_are_divided_once_and_for_all(tied, kind):
    model = build(kind, tied=tied, embed_norm=True)
    prompts = prompts_of([5, 1, 9])
    engine = Engine(model, batch_size=3, backend="eager", layout="rows", rms_form="fused")
    assert engine.generate(prompts, 10) == [greedy(model, prompt, 10) for prompt in prompts]


@pytest.mark.parametrize("g", [0.8, 0.4, 0.1])
def test_norms_with_gates_of_their_own(g):
    """At 0.8 some are still norms, at 0.1 some are linear already."""
    model = build("explicit")
    norms = list(tapered_norms(model).values())
    for norm, stage in zip(norms, [(1.0, 0.7), (0.7, 0.3), None, (0.5, 0.2), (0.2, 0.0)], strict=True):
        norm.set_stage(stage)
    shared_gate(model).set(g)
    prompts = prompts_of([5, 1, 9])
    engine = Engine(model, batch_size=3, layout="columns", rms_form="composed")
    assert engine.generate(prompts, 10) == [greedy(model, prompt, 10) for prompt in prompts]


CASES = [
    build(kind, preset, n_head=4, n_kv_head=n_kv_head)
    for kind in KINDS
    for preset, n_kv_head in (("small_1m", 1), ("gpt2_124m", 4))
]


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=8),
    layout=st.sampled_from(["rows", "columns", "split", "packed"]),
    form=st.sampled_from(["fused", "composed"]),
)
def test_any_batch_of_prompts(case, lengths, layout, form):
    prompts = prompts_of(lengths)
    if layout not in layouts_for(32, 48, torch.device("cpu"), torch.float32, compiled=False):
        layout = "columns"  # one thread alone has nothing to split, and not every torch has oneDNN
    engine = Engine(case, batch_size=len(lengths), layout=layout, rms_form=form)
    room = 24 - max(lengths) + 1
    for _ in range(2):  # the second time on a used cache
        assert engine.generate(prompts, 24) == [greedy(case, prompt, room) for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_float64_logits(kind):
    model = build(kind, n_head=4, n_kv_head=2).double()
    tokens = torch.randint(97, (2, 12))
    engine = Engine(model, batch_size=2, dtype=torch.float32)
    got = [engine.prefill(tokens[:, :7]), *(engine.step(tokens[:, i]) for i in range(7, 12))]
    with torch.no_grad():
        wanted = model(tokens)[:, 6:]
    torch.testing.assert_close(torch.stack(got, 1).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["small_1m", "gpt2_124m"])
def test_half_precision_is_near_float32(preset, dtype):
    model = build("folded", preset, n_head=4)
    tokens = torch.randint(97, (2, 12))
    engine = Engine(model, batch_size=2, dtype=dtype)
    got = [engine.prefill(tokens[:, :7]), *(engine.step(tokens[:, i]) for i in range(7, 12))]
    assert got[0].dtype == dtype
    with torch.no_grad():
        wanted = model(tokens)[:, 6:]
        rounded = model.to(dtype)(tokens)[:, 6:].float()
    # No further from the truth than the model itself is in that precision, give or take.
    ours, models = ((x - wanted).abs().mean() for x in (torch.stack(got, 1).float(), rounded))
    assert ours < 1.5 * models


@pytest.mark.parametrize("preset", ["small_1m", "gpt2_124m"])
def test_tokens_are_those_of_transformers(preset):
    model = build("normalized", preset, n_head=4)
    other = converted(model)
    tokens = torch.tensor(prompts_of([6, 6]))
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
    wanted = other.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=15, do_sample=False, eos_token_id=None
    )
    assert Engine(model, batch_size=2).generate(tokens, 15) == wanted[:, 6:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["small_1m", "gpt2_124m"])
def test_compiled_steps_give_the_same_tokens(preset, kind):
    model = build(kind, preset, n_head=4)
    engine = Engine(model, batch_size=3, backend="compile")
    for lengths in ([4, 9, 2], [3, 3, 3]):
        prompts = prompts_of(lengths)
        assert engine.generate(prompts, 12) == [greedy(model, prompt, 12) for prompt in prompts]


def test_what_cannot_be_compiled_is_told_in_one_line():
    model = build("folded", n_head=4, d_ff=80)  # a step that was not compiled before
    nothing = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True})
    with nothing, pytest.raises(TaperlitError) as told:
        Engine(model, backend="compile")
    assert "cannot be compiled here" in str(told.value)
    assert "--backend eager" in str(told.value)
    assert "\n" not in str(told.value)


def test_static_steps_give_the_same_logits():
    model = build("explicit", n_head=4, n_kv_head=2)
    eager, static = Engine(model, batch_size=2), Engine(model, batch_size=2)
    static._step, static.backend = static._step_static, "compile"  # what is compiled, run as it is
    prompts = prompts_of([3, 8])
    torch.testing.assert_close(static.prefill(prompts), eager.prefill(prompts))
    for _ in range(6):
        tokens = torch.randint(97, (2,))
        with torch.inference_mode():
            torch.testing.assert_close(static.step(tokens), eager.step(tokens), rtol=1e-5, atol=1e-5)


def test_stop_tokens_end_their_rows():
    model = build("folded", n_head=4)
    prompts = prompts_of([4, 7])
    first, second = (greedy(model, prompt, 12) for prompt in prompts)
    engine = Engine(model, batch_size=2)
    at = max(first.index(token) for token in first)  # the latest that has not come before
    stop = first[at]
    cut = [row[: row.index(stop)] if stop in row else row for row in (first, second)]
    assert engine.generate(prompts, 12, stop=[stop, 97]) == cut
    assert engine.generate(prompts, 12, stop=torch.tensor([stop, 97])) == cut
    blocks = list(engine.stream(prompts[:1], 12, stop=[stop]))
    assert torch.cat(blocks).tolist() == [[token] for token in [*first[:at], -1]]  # and then no step more


def test_seeds_and_filters():
    model = build("folded", n_head=4)
    engine = Engine(model, batch_size=4)
    prompts = prompts_of([4, 7, 2])
    sampling = Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    draws = [engine.generate(prompts, 12, sampling, seed=seed) for seed in (1, 1, 2, None, None)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[3] != draws[4]
    assert [len(row) for row in draws[0]] == [12, 12, 12]
    assert engine.generate(prompts, 12, Sampling(temperature=1.0, top_k=1), seed=0) == [
        greedy(model, prompt, 12) for prompt in prompts
    ]


def test_a_strong_penalty_repeats_nothing():
    model = build("folded", n_head=4)
    (row,) = Engine(model).generate([[3, 5, 8]], 20, Sampling(temperature=0, repetition_penalty=1e6))
    assert len({3, 5, 8, *row}) == 23


def test_the_cache_grows_no_further_than_the_context():
    engine = Engine(build("folded", n_head=4), length=10)
    assert len(engine.generate([[1] * 6], 100)[0]) == 5  # the last of them need not be read
    engine.prefill([[1] * 10])
    with pytest.raises(TaperlitError, match="context of 10 tokens is full"):
        engine.step(torch.tensor([1]))


def test_cache_bytes_are_what_is_taken():
    model = build("folded", n_head=4, n_kv_head=2)
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(model, batch_size=3, length=20, dtype=dtype)
        assert engine.cache.storage.nbytes == Engine.cache_bytes(model.config, 3, 20, engine.device, dtype)


def _begun(model):
    engine = Engine(model)
    engine.prefill([[1]])
    return engine


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda model: Engine(model, length=25), "length of 25 tokens is outside .* give 1 to 24"),
        (lambda model: Engine(model, batch_size=0), "batch_size must be at least 1"),
        (lambda model: Engine(model).step(torch.tensor([1])), "read no prompt; call prefill"),
        (lambda model: _begun(model).step(torch.tensor([-1])), "A step has a token outside of 0 to 97"),
        (lambda model: _begun(model).step(torch.tensor([98])), "A step has a token outside of 0 to 97"),
        (lambda model: _begun(model).step(torch.tensor([1, 2])), r"takes 1 tokens, one per row, not \[2\]"),
        (lambda model: Engine(model).prefill(torch.tensor([[2.9]])), r"token ids, not float32 of shape \[1, 1\]"),
        (lambda model: Engine(model).prefill(torch.tensor([2])), r"token ids, not int64 of shape \[1\]"),
        (lambda model: Engine(model).prefill([2, 3]), "lists of token ids, one list for each"),
        (lambda model: Engine(model).prefill([[2.9]]), "lists of token ids"),
        (lambda model: Engine(model).prefill([[]]), "no tokens"),
        (lambda model: Engine(model).prefill([[1] * 25]), "25 tokens is longer than the 24"),
        (lambda model: Engine(model).prefill([[98]]), "outside of 0 to 97"),
        (lambda model: Engine(model).prefill([[1], [2]]), "built for 1 prompts"),
        (lambda model: Engine(model).generate([[1], [2]], 3), "1 to 1 prompts at a time, not 2"),
        (lambda model: Engine(model).generate([[1]], 0), "max_new_tokens"),
        (lambda model: Engine(nn.Linear(3, 3)), "not a Linear"),
    ],
)
def test_refusals(work, words):
    model = build("folded", n_head=4)
    with pytest.raises(TaperlitError, match=words):
        work(model)


def test_a_half_open_gate():
    model = build("explicit", n_head=4)
    shared_gate(model).set(0.25)
    assert Engine(model).generate([[3, 5, 8]], 12) == [greedy(model, [3, 5, 8], 12)]


def test_what_was_put_on_the_model_is_not_passed_over():
    model = build("folded", n_head=4)
    mlp = model.blocks[1].mlp
    for register in (mlp.register_forward_hook, mlp.register_forward_pre_hook):
        handle = register(lambda *args: None)
        with pytest.raises(TaperlitError, match=r"blocks\.1\.mlp has forward hooks, which decoding does not call"):
            Engine(model)
        handle.remove()
    Engine(model)
    mlp.forward = lambda x: 2 * x
    with pytest.raises(TaperlitError, match=r"blocks\.1\.mlp has a forward of its own"):
        Engine(model)
    del mlp.forward
    model.blocks[0].attn.q_proj = nn.Sequential(model.blocks[0].attn.q_proj)
    with pytest.raises(TaperlitError, match=r"blocks\.0\.attn\.q_proj is a Sequential"):
        Engine(model)
    model.blocks[0].attn = nn.Identity()
    with pytest.raises(TaperlitError, match=r"blocks\.0\.attn is a Identity"):
        Engine(model)


def test_what_only_the_logits_show_is_not_passed_over():
    model = build("folded", n_head=4)
    of_all = torch.nn.modules.module.register_module_forward_hook
    handle = of_all(lambda module, args, out: 1.5 * out if module is model.blocks[1].mlp else None)
    try:
        with pytest.raises(TaperlitError, match="differ from the model's own"):
            Engine(model)
    finally:
        handle.remove()


def test_two_streams_of_one_engine_are_refused():
    model = build("folded", n_head=4)
    engine = Engine(model)
    first, second = engine.stream([[3, 5, 8]], 8), engine.stream([[9, 1, 2]], 8)
    next(first)
    assert torch.cat(list(second)).flatten().tolist() == greedy(model, [9, 1, 2], 8)
    with pytest.raises(TaperlitError, match="another prompt since; use one engine per stream"):
        next(first)
    third = engine.stream([[3, 5, 8]], 8)
    next(third)
    engine.step(torch.tensor([4]))
    with pytest.raises(TaperlitError, match="use one engine per stream"):
        next(third)


def test_weights_that_have_changed_need_another_engine():
    model = build("folded", n_head=4)
    engine = Engine(model)
    engine.prefill([[3, 5, 8]])
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.weight.mul_(0.5)
    with pytest.raises(TaperlitError, match="weights were changed since the engine was built; build another"):
        engine.generate([[3, 5, 8]], 4)
    assert Engine(model).generate([[3, 5, 8]], 4) == [greedy(model, [3, 5, 8], 4)]


def test_what_overflows_in_float16_says_so_and_spoils_no_other_row():
    model = build("folded", n_head=4)
    with torch.no_grad():
        model.tok_embed.weight[0] = 3e4  # of which rows that have no token 0 know nothing
    wanted = Engine(model, dtype=torch.float16).generate([[5]], 4)
    assert Engine(model, 2, dtype=torch.float16).generate([[5], [6, 7, 8]], 4)[:1] == wanted
    with torch.no_grad():
        model.tok_embed.weight.fill_(3e4)
    with pytest.raises(TaperlitError, match="overflows in float16; decode with dtype float32 or bfloat16"):
        Engine(model, dtype=torch.float16)


def test_weights_that_are_not_finite_give_no_token():
    model = build("folded", n_head=4)
    engine = Engine(model)
    engine.decoder.head.weight[:] = torch.nan
    with pytest.raises(TaperlitError, match="not finite"):
        engine.generate([[1, 2]], 3)
