"""The one interface over transformers' language models, against their own classes and torch's cross-entropy."""

import copy
import fnmatch
from collections import OrderedDict

import pytest
import torch
import transformers as tf
from families import FAMILIES
from small_models import CONFIGS, build
from torch import nn
from torch.nn.functional import cross_entropy

from taperlit.errors import TaperlitError
from taperlit.foldable import foldable_norms
from taperlit.folding import fold
from taperlit.hub.causal_lm import CausalLM, find_names, sizes_of
from taperlit.hub.origin import Origin
from taperlit.norm import shared_gate, tapered_norms
from taperlit.surgery import taper
from taperlit.training.policy import apply_policy

TOKENS = torch.arange(40).view(2, 20) * 7 % 300


def wrapped(name: str, **changes) -> CausalLM:
    return CausalLM(build(name, **changes), Origin(name, {}))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own_and_losses_torchs(name):
    model = wrapped(name)
    logits = model.lm(input_ids=TOKENS).logits
    assert torch.equal(model(TOKENS), logits)
    assert (model.vocab_size, model.block_size) == (300, 128)
    targets = TOKENS.roll(-1, 1).clone()
    targets[1, -3:] = -100
    losses = cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    mean = losses.sum() / (targets != -100).sum()
    for chunk in (7, 4096):
        torch.testing.assert_close(model(TOKENS, targets, chunk_tokens=chunk).double(), mean, rtol=1e-5, atol=0)
        torch.testing.assert_close(model.token_losses(TOKENS, targets, chunk).double(), losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_the_loss_has_the_gradients_of_torchs(name):
    model = wrapped(name)
    targets = TOKENS.roll(-1, 1)
    model(TOKENS, targets, chunk_tokens=5).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cross_entropy(model.lm(input_ids=TOKENS).logits.flatten(0, 1), targets.flatten()).backward()
    for parameter, p in model.named_parameters():
        torch.testing.assert_close(
            found[parameter], p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=parameter: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_final_norm_and_the_head_run_last(name):
    model, ran = wrapped(name), []
    for module in (model.final_norm, model.head, model.blocks[-1]):
        module.register_forward_hook(lambda module, args, output: ran.append(module))
    model(TOKENS)
    assert ran == [model.blocks[-1], model.final_norm, model.head]


def test_parts_are_found_by_our_names_and_counted_once():
    model = wrapped("llama_tied")
    assert model.get_submodule("final_norm") is model.lm.model.norm
    assert {name.partition(".")[0] for name in model.state_dict()} == {"lm"}
    assert model.num_parameters() == sum(p.numel() for p in model.lm.parameters())


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for on in (False, True):
        model = wrapped("llama").train()
        model.activation_checkpointing = on
        calls = []
        model.blocks[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(TOKENS, TOKENS).backward()
        gradients.append([p.grad for p in model.parameters()])
        assert len(calls) == (2 if on else 1)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


def test_a_context_that_is_too_long_is_refused():
    with pytest.raises(TaperlitError, match="129 tokens are more than the model's context of 128"):
        wrapped("gpt2")(torch.zeros(1, 129, dtype=torch.int64))


def test_models_that_are_built_in_another_way_are_refused_by_name():
    lm = build("llama")
    lm.model.norm, lm.model.last = None, nn.Identity()
    with pytest.raises(TaperlitError, match=r"LlamaForCausalLM has no norm after its blocks model\.layers"):
        find_names(lm)
    with pytest.raises(TaperlitError, match="no vocab_size"):
        sizes_of({})


CAUSAL = [name for name, family in FAMILIES.items() if name in (
    "GPT-2", "GPT-NeoX", "OPT", "BLOOM", "Falcon (new decoder)", "MPT", "Llama", "Mixtral", "Qwen3", "Gemma2", "OLMo2",
    "StableLM", "Cohere", "GLM-4",
)]  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
def test_the_norms_that_fold_are_those_of_the_published_formulas(name):
    """Against the patterns that tests/families.py has by hand."""
    family = FAMILIES[name]
    model = CausalLM(family.make(), Origin(name, {}))
    names, left = foldable_norms(model)
    blocks = f"lm.{model.names.blocks}."
    inside = [n for n, _ in model.named_modules() if n.startswith(blocks)]
    norms, expected = (
        {n for n in inside if any(fnmatch.fnmatchcase(n, f"lm.{p}") for p in patterns)}
        for patterns in (family.patterns, family.foldable)
    )
    assert set(names) == expected
    assert set(left) == {n.removeprefix(blocks).partition(".")[2] for n in norms - expected}
    tokens = TOKENS % model.vocab_size
    before = model(tokens)
    apply_policy(model, "all")
    assert tapered_norms(model).keys() == expected | {f"lm.{model.names.final_norm}"}
    assert torch.equal(model(tokens), before)


def test_a_kind_of_norm_that_only_a_late_block_has_is_found():
    model = wrapped("llama")
    blocks = model.blocks
    for i in range(len(blocks), 7):
        blocks.append(copy.deepcopy(blocks[0]))
        blocks[i].self_attn.layer_idx = i
    model.lm.config.num_hidden_layers = len(blocks)
    late = blocks[6].mlp.up_proj
    blocks[6].mlp.up_proj = nn.Sequential(OrderedDict(norm=nn.RMSNorm(late.in_features), linear=late))
    names, left = foldable_norms(model)
    assert "lm.model.layers.6.mlp.up_proj.norm" in names
    assert [*left] == ["post_attention_layernorm"]  # which that norm reads


@torch.no_grad()
def test_a_norm_whose_bias_no_map_can_take_is_left():
    family = FAMILIES["Mixtral"]  # whose experts' matrices are one parameter, without biases
    model = CausalLM(family.make(), Origin("Mixtral", {}))
    names, left = foldable_norms(model, bias=True)
    assert {name.rpartition(".")[2] for name in names} == {"input_layernorm"}
    assert any("has no bias to take the norm's" in reader for reader in left["post_attention_layernorm"])
    plain, _ = foldable_norms(model)
    assert {name.rpartition(".")[2] for name in plain} == {"input_layernorm", "post_attention_layernorm"}
    apply_policy(model, "internal", bias=True)
    for norm in tapered_norms(model).values():
        norm.taper_bias.normal_()
    shared_gate(model).set(0.0)
    tokens = TOKENS % model.vocab_size
    before = model(tokens)
    fold(model, lambda: model(tokens))
    torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)


def test_a_model_that_does_not_run_in_float64_is_refused_in_a_line():
    model = wrapped("llama")
    model.blocks[0].mlp.forward = lambda x: x * {torch.float32: 1}[x.dtype]
    with pytest.raises(TaperlitError, match="CausalLM does not run in float64, where folding is checked"):
        foldable_norms(model)


@torch.no_grad()
def test_the_smallest_number_of_the_dtype_may_fill_a_tensor():
    sizes = dict(vocab_size=96, d_model=32, ffn_dim=64, num_layers=1, attention_heads=4, max_position_embeddings=64)
    model, tokens = tf.XGLMForCausalLM(tf.XGLMConfig(**sizes)).eval(), TOKENS % 96  # whose mask is made so
    taper(model, ["*_layer_norm"])
    shared_gate(model).set(0.0)
    before = model(input_ids=tokens).logits
    assert fold(model, lambda: model(input_ids=tokens).logits)["difference"] < 1e-12
    torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=1e-4, atol=1e-5)


def test_a_model_whose_norms_cannot_be_folded_is_refused_with_the_readers():
    model = wrapped("olmo2")  # post-norms and QK-norms alone
    with pytest.raises(TaperlitError, match=r"No norm in the blocks of Olmo2ForCausalLM can be folded.*add"):
        apply_policy(model, "internal")


@pytest.mark.parametrize(
    ("name", "norm"), [("gpt2", "ln_1"), ("llama", "input_layernorm"), ("gemma2", "input_layernorm")]
)
def test_the_norms_before_attention_can_be_taken_alone(name, norm):
    model = wrapped(name)
    apply_policy(model, "attention")
    assert tapered_norms(model).keys() == {f"lm.{model.names.blocks}.{i}.{norm}" for i in range(2)}
