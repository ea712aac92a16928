"""``transformers``' models as ours and back: same logits, same tokens, or one line that says what ours has not."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONTEXT, VOCAB, build
from torch import nn

from taperlit.compare import largest_difference
from taperlit.decode import Engine
from taperlit.decode.onnx_export import onnx_engine
from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.hub.causal_lm import CausalLM
from taperlit.hub.families import as_causal_lm, as_transformer
from taperlit.hub.origin import Origin
from taperlit.norm import Affine, TaperRMSNorm, shared_gate, tapered_norms, update_alignment
from taperlit.structure import replace
from taperlit.surgery import separate_first, taper
from taperlit.transformer import Transformer, TransformerConfig

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
    "llama_tied": ("llama_tied", {}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "mistral_wide": ("mistral", {"head_dim": 10}),  # where d_model / n_head is 8
    "qwen2": ("qwen2", {}),
    "phi3": ("phi3", {}),
    "starcoder2": ("starcoder2", {}),
    "gpt2_relu": ("gpt2", {"activation_function": "relu"}),
    "llama_glu": ("llama", {"hidden_act": "sigmoid"}),
    "phi3_glu": ("phi3", {"hidden_act": "sigmoid"}),
    "qwen2_glu": ("qwen2", {"hidden_act": "sigmoid"}),
    "starcoder2_relu": ("starcoder2", {"hidden_act": "relu"}),
}
# Until folding puts the final gain into the head.
TIED = ("gpt2", "gpt2_relu", "llama_tied", "starcoder2", "starcoder2_relu")
BECOMES = dict.fromkeys(("mistral_wide", "phi3", "phi3_glu"), "LlamaForCausalLM")  # of the same function


def wrapped(lm: nn.Module) -> CausalLM:
    return CausalLM(lm, Origin("tiny", {"config.json": lm.config.to_json_string()}))


def model_of(name: str, kind: str = "plain") -> CausalLM:
    base, changes = MODELS[name]
    model = wrapped(build(base, **changes))
    if kind == "plain":
        return model
    taper(model)
    model.train()
    model(tokens())
    update_alignment(tapered_norms(model).values(), ema_rate=0.5)
    model.eval()
    for i, norm in enumerate(tapered_norms(model).values()):
        norm.freeze()
        norm.taper_weight.data.mul_(1 + 0.1 * i)
    shared_gate(model).set(0.4 if kind == "blended" else 0.0)
    if kind == "folded":
        fold(model, lambda: model(tokens()))
    return model


def tokens(rows: int = 2, length: int = 100) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("kind", ["plain", "blended", "linear", "folded"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_in_and_out_again_compute_the_same(name, kind):
    with torch.enable_grad():
        theirs = model_of(name, kind)
    wanted = theirs(tokens())
    ours = as_transformer(theirs)
    assert largest_difference(wanted, ours(tokens())) < 1e-5
    again = as_causal_lm(ours)
    assert type(again.lm).__name__ == BECOMES.get(name, type(theirs.lm).__name__)
    assert largest_difference(wanted, again(tokens())) < 1e-5
    assert (again.vocab_size, again.block_size) == (theirs.vocab_size, theirs.block_size)
    expected = 5 if kind in ("blended", "linear") else 0
    for model in (theirs, ours, again):
        assert len(tapered_norms(model)) == expected
        assert sum(isinstance(m, nn.Identity) for m in model.modules()) == (5 if kind == "folded" else 0)
        tied = model.head.weight is (ours.tok_embed if model is ours else model.lm.get_input_embeddings()).weight
        assert tied == (kind != "folded" and name in TIED)
    assert ours.config.tied == again.lm.config.tie_word_embeddings == (kind != "folded" and name in TIED)
    if expected:
        assert shared_gate(ours).value.item() == pytest.approx(0.4 if kind == "blended" else 0)
        state, own = theirs.lm.state_dict(), ours.state_dict()
        for leaf in ("alignment", "alignment_ema", "frozen"):
            values, copies = ([v for k, v in s.items() if k.endswith(f".{leaf}")] for s in (state, own))
            assert sorted(map(torch.Tensor.tolist, values)) == sorted(map(torch.Tensor.tolist, copies))
            assert min(map(torch.Tensor.max, values)) > 0


def test_memory_is_shared_but_for_transposed_matrices():
    llama, phi3, gpt2 = (model_of(name) for name in ("llama", "phi3", "gpt2"))
    for model in (llama, phi3):
        ours = as_transformer(model)
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert {p.untyped_storage().data_ptr() for p in ours.parameters()} <= storages
        assert all(p.is_contiguous() for p in ours.parameters())
    assert as_transformer(gpt2).tok_embed.weight.data_ptr() == gpt2.lm.transformer.wte.weight.data_ptr()
    assert as_transformer(ours) is ours
    assert not as_transformer(llama.lm).training
    assert as_transformer(llama.train()).training
    assert all(module.training for module in llama.modules())  # comparing left it so


def greedy(lm: nn.Module, prompt: list[int], count: int) -> list[int]:
    made = lm.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["plain", "folded"])
@pytest.mark.parametrize("name", MODELS)
def test_the_engine_gives_the_tokens_of_generate(name, kind):
    model = model_of(name, kind)
    engine = Engine(as_transformer(model), 2, layout="rows", rms_form="fused")
    prompts = [[5, 9, 250, 17, 3], [44]]
    assert engine.generate(prompts, 30) == [greedy(model.lm, prompt, 30) for prompt in prompts]
    got = [engine.prefill(tokens()[:, :60]), *(engine.step(tokens()[:, i]) for i in range(60, 64))]
    with torch.no_grad():
        assert largest_difference(model(tokens())[:, 59:64], torch.stack(got, 1)) < 1e-5


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "folded"), ("qwen2", "plain"), ("mistral_wide", "folded")])
def test_a_converted_model_runs_in_onnxruntime(name, kind):
    model = as_transformer(model_of(name, kind))
    prompts = [[5, 9, 250, 17, 3], [44]]
    wanted = Engine(model, 2, layout="rows", rms_form="fused").generate(prompts, 20)
    assert onnx_engine(model, 2).generate(prompts, 20) == wanted


@torch.no_grad()
def test_norms_may_be_of_every_kind():
    model = model_of("gpt2")
    taper(model, ["*.0.ln_1", "*.1.ln_2"])
    for i, norm in enumerate(tapered_norms(model).values()):
        norm.alignment.fill_(0.2 + i)
    shared_gate(model).set(0.5)
    scale = Affine((32,), True, True)
    scale.bias.normal_()
    replace(model, "lm.transformer.h.0.ln_2", scale)
    replace(model, "lm.transformer.ln_f", nn.Identity())
    wanted = model(tokens())
    ours = as_transformer(model)
    assert largest_difference(wanted, ours(tokens())) < 1e-5
    assert largest_difference(wanted, as_causal_lm(ours)(tokens())) < 1e-5
    assert [type(norm).__name__ for block in ours.blocks for norm in (block.attn_norm, block.mlp_norm)] == [
        *("TaperLayerNorm", "Affine", "LayerNorm", "TaperLayerNorm")
    ]


@torch.no_grad()
def test_the_first_positions_scalar_goes_along():
    model = model_of("llama")
    taper(model)
    separate_first(model)
    for i, norm in enumerate(tapered_norms(model).values()):
        norm.alignment.fill_(0.2 + i)
        norm.first_alignment.fill_(0.9 - 0.1 * i)
    shared_gate(model).set(0.0)
    shared_gate(model).set_first(0.3)
    wanted = model(tokens())
    for other in (ours := as_transformer(model), as_causal_lm(ours)):
        assert shared_gate(other).first.item() == pytest.approx(0.3)
        assert largest_difference(wanted, other(tokens())) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    for name in ("gpt2", "llama3"):
        model = model_of(name).to(dtype)
        ours = as_transformer(model)
        assert {p.dtype for p in ours.parameters()} == {dtype}
        with torch.no_grad():
            difference = largest_difference(model(tokens(length=16)), ours(tokens(length=16)))
        assert difference < (12 * torch.finfo(dtype).eps if dtype == torch.bfloat16 or name == "gpt2" else 1e-6)
        assert ours.rope is None or ours.rope.cos.dtype == torch.float32


@torch.no_grad()
def test_a_sliding_window_is_the_context():
    some = {"use_sliding_window": True, "sliding_window": 40}
    for name, changes in (
        ("mistral", {"sliding_window": 40}),
        ("phi3", {"sliding_window": 40}),
        ("starcoder2", {"sliding_window": 40}),
        ("qwen2", {**some, "layer_types": ["full_attention", "sliding_attention"]}),
    ):
        lm = build(name, **changes)
        ours = as_transformer(lm)
        assert ours.config.block_size == 40
        assert largest_difference(lm(tokens(length=40)).logits, ours(tokens(length=40))) < 1e-5
        with pytest.raises(TaperlitError, match="more than the model's context of 40"):
            ours(tokens(length=41))
    assert as_transformer(build("mistral", sliding_window=500)).config.block_size == CONTEXT


REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
    ("llama", {"attention_bias": True}, "mlp_bias False and attention_bias True differ"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'linear'"),
    ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu', not 'silu' or 'swish' or 'sigmoid'"),
    ("gpt2", {"activation_function": "silu"}, "activation_function is 'silu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, not False"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor is 0.5"),
    ("starcoder2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'gelu_pytorch_tanh'"),
    ("qwen3", {}, "Qwen3ForCausalLM cannot become taperlit's Transformer"),
    ("gemma", {}, "GemmaForCausalLM cannot become"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_ours_has_not_is_refused_by_name(name, changes, message):
    lm = build(name, **changes)
    with pytest.raises(TaperlitError, match=message):
        as_transformer(wrapped(lm))
    prompt = [5, 9, 250]
    assert len(greedy(lm, prompt, 5)) == 5  # what the message advises


def test_other_classes_are_refused():
    with pytest.raises(TaperlitError, match=r"^Linear cannot become taperlit's Transformer"):
        as_transformer(nn.Linear(2, 2))


def test_what_was_put_on_a_model_is_found():
    def changed(name, change, message):
        model = model_of(name)
        change(model.lm)
        with pytest.raises(TaperlitError, match=message):
            as_transformer(model)

    class Stranger(nn.Linear):
        pass

    class Odd(TaperRMSNorm):
        pass

    def module(path, new):
        return lambda lm: replace(lm, path, new)

    def frequencies(lm):
        lm.model.rotary_emb.inv_freq[-1] *= 1.001  # which the logits of a few tokens do not show

    def epsilon(lm):
        lm.model.norm.variance_epsilon = 1e-3

    def nan(lm):
        lm.lm_head.weight.data[3, 3] = torch.nan

    changed(
        "llama", module("model.layers.1.mlp.up_proj", Stranger(32, 64)), r"model.layers.1.mlp.up_proj is a Stranger"
    )
    changed("llama", module("model.norm", nn.Tanh()), r"model.norm is a Tanh")
    changed("llama", module("model.norm", Odd(32, 1e-6)), r"model.norm is a Odd, .* fold the model first")
    changed(
        "gpt2", lambda lm: lm.transformer.h[0].register_parameter("more", nn.Parameter(torch.ones(1))), "h.0.more was"
    )
    changed(
        "llama", lambda lm: lm.model.layers[0].mlp.register_forward_hook(lambda m, a, y: y * 1.1), "a forward hook say"
    )
    changed("gpt2", lambda lm: setattr(lm.transformer.h[1].attn, "scaling", 0.3), "has other logits, by 0.")
    changed("llama", frequencies, "LlamaRotaryEmbedding makes other rotary positions")
    changed("llama", epsilon, r"model.norm has an epsilon of 0.001, and the model's config says 1e-06")
    changed("llama", nan, "logits are not finite")


def test_adapters_are_to_be_merged_first():
    from taperlit.hub.lora import Lora, add_lora, merge_lora

    pytest.importorskip("peft")
    model = model_of("llama")
    add_lora(model, Lora(rank=2))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    model.eval()
    with torch.no_grad():
        wanted = model(tokens())
    with pytest.raises(
        TaperlitError, match=r"q_proj is an adapter of peft's, .* call taperlit.hub.lora.merge_lora\(model\)"
    ):
        as_transformer(model)
    merge_lora(model)
    with torch.no_grad():
        assert largest_difference(wanted, as_transformer(model)(tokens())) < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(["rmsnorm", "layernorm"]),
    position=st.sampled_from(["rope", "learned"]),
    mlp=st.sampled_from(["swiglu", "glu", "gelu", "relu"]),
    bias=st.booleans(),
    qkv_bias=st.booleans(),
    tied=st.booleans(),
    kv=st.sampled_from([1, 3]),
    d_head=st.sampled_from([None, 10]),
    d_model=st.sampled_from([24, 32]),
    scaled=st.booleans(),
    embed_norm=st.booleans(),
    init=st.sampled_from(["gpt2", "fan_in"]),
)
@torch.no_grad()
def test_any_shape_of_ours_is_one_of_theirs_or_refused(
    norm, position, mlp, bias, qkv_bias, tied, kv, d_head, d_model, scaled, embed_norm, init
):
    scaling = {key: value for key, value in LLAMA3.items() if not key.startswith("rope_")}
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(
            **dict(vocab_size=50, block_size=24, n_layer=1, n_head=3, d_ff=20, n_kv_head=kv, norm_eps=1e-4),
            **dict(norm=norm, position=position, mlp=mlp, bias=bias, tied=tied, qkv_bias=qkv_bias),
            d_model=d_model,
            d_head=d_head if d_model % 3 == 0 else 10,
            rope_scaling=scaling if scaled and position == "rope" else None,
            **dict(embed_norm=embed_norm, init=init),
        )
    ).eval()
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    shape, odd = (norm, position, mlp in ("swiglu", "glu")), bool(d_model % 3)
    known = (
        (shape == ("rmsnorm", "rope", True) and (not bias or (qkv_bias and not odd)))
        or (shape == ("layernorm", "rope", False) and bias == qkv_bias)
        or (
            shape == ("layernorm", "learned", False)
            and bias
            and qkv_bias
            and kv == 3
            and (d_head, odd) == (None, False)
        )
    )
    if not known:
        with pytest.raises(TaperlitError, match="transformers has no model of this shape"):
            as_causal_lm(model)
        return
    theirs = as_causal_lm(model)
    ids = torch.arange(24)[None] * 7 % 50
    assert largest_difference(model(ids), theirs(ids)) < 1e-5
    assert as_transformer(theirs).config == dataclasses.replace(
        model.config, embed_norm=False, tied=tied and not embed_norm
    )
    assert model.config.embed_norm == embed_norm
    assert (model.head.weight is model.tok_embed.weight) == tied


def test_what_comes_out_is_saved_and_loaded_by_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    for name in ("gpt2", "llama_tied", "llama3", "qwen2", "llama_glu", "starcoder2_relu"):
        out = as_causal_lm(as_transformer(model_of(name)))
        out.lm.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            assert largest_difference(out(tokens()), again(tokens()).logits) < 1e-6
