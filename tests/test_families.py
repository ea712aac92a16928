"""taper and fold on transformers' own model families, against formulas written down by hand (tests/families.py)."""

import copy
import fnmatch
import warnings

import pytest
import torch
from families import FAMILIES, Family, close_with_random_maps, linear_formula, norm_formula, parameters
from torch import nn

from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.norm import TaperNorm, tapered_norms, update_alignment
from taperlit.surgery import taper

pytestmark = pytest.mark.filterwarnings("ignore:taper. not tapered")  # tested by itself
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
that_refuse = {name: family for name, family in FAMILIES.items() if family.refused}


def named(model: nn.Module, patterns) -> list[str]:
    """The names that match, in the order of the model."""
    return [name for name, _ in model.named_modules() if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_family
def test_taper_recognises_every_norm_and_only_those_asked_for(family: Family):
    model = family.make()
    assert parameters(model) < 50_000
    expected = named(model, family.patterns)
    unknown = named(model, family.unknown)
    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    norms = [name for name, module in leaves.items() if "norm" in type(module).__name__.lower()]
    assert expected == [name for name in norms if name not in unknown]
    asked = named(model, family.foldable)
    if asked:
        part = family.make()
        assert taper(part, family.foldable) == asked
        assert list(tapered_norms(part)) == asked
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert taper(model) == expected
    told = " ".join(str(warning.message) for warning in caught)
    assert all(name in told for name in unknown)
    assert bool(told) == bool(unknown)
    for name, norm in tapered_norms(model).items():
        kind = family.kind_of(name)
        assert (norm.centred, norm.gain_offset) == (kind.centred, kind.offset)
        assert (norm.taper_weight is not None, norm.taper_bias is not None) == (kind.gain, kind.bias)


@every_family
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_an_open_gate_changes_no_bit(family: Family, dtype: torch.dtype, training: bool):
    plain = family.make(dtype).train(training)
    model = copy.deepcopy(plain)
    objects, names = dict(model.named_parameters()), named(model, family.patterns)
    taper(model)
    outputs = []
    for m in (plain, model):
        torch.manual_seed(2)  # for the dropouts
        outputs.append(family.run(m, family.batch(dtype)))
    assert torch.equal(*outputs)
    assert all(module.training == training for module in model.modules())
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in objects.items())
    added = {name.rpartition(".")[0] for name in now.keys() - objects.keys()}
    assert added <= set(names)
    if training and dtype is torch.float32:
        for y in outputs:
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        expected, actual = gradients(plain), gradients(model)
        assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
        assert not any(actual[name].any() for name in actual.keys() - expected.keys())


@every_family
def test_the_plain_state_dict_loads(family: Family):
    model, other = family.make(seed=0), family.make(seed=1)
    taper(model)
    batch = family.batch()
    with torch.no_grad():
        assert not torch.equal(family.run(model, batch), family.run(other, batch))
        model.load_state_dict(other.state_dict())
        assert torch.equal(family.run(model, batch), family.run(other, batch))
    for norm in tapered_norms(model).values():
        if norm.taper_weight is not None:
            assert torch.equal(norm.taper_weight, norm.weight)
        if norm.taper_bias is not None:
            assert torch.equal(norm.taper_bias, norm.bias)


@every_family
def test_blend_and_linear_map_are_the_published_formulas(family: Family):
    model = family.make(torch.float64)
    taper(model)
    norms = tapered_norms(model)
    for name, norm in norms.items():
        kind = family.kind_of(name)
        own = [getattr(norm, n).detach() if has else None for n, has in (("weight", kind.gain), ("bias", kind.bias))]
        width = own[0].numel() if kind.gain else norm.normalized_shape[-1]
        # Of the size of the epsilon and around a mean, so that a wrong epsilon, gain or centring shows.
        h = (torch.randn(6, 5, width, dtype=torch.float64) + 0.5) * (2 * kind.eps) ** 0.5
        norm.gate.set(1.0)
        torch.testing.assert_close(norm(h), norm_formula(h, kind, *own), rtol=2e-6, atol=2e-6)
        close_with_random_maps({name: norm}, seed=len(name))
        c, gain, bias = norm.alignment, norm.taper_weight, norm.taper_bias
        linear = linear_formula(h, kind, c, gain, bias)
        torch.testing.assert_close(norm(h), linear, rtol=1e-13, atol=1e-13)
        norm.gate.set(0.3)
        g = norm.gate.value.double()
        blend = g * norm_formula(h, kind, *own) + (1 - g) * linear
        torch.testing.assert_close(norm(h), blend, rtol=2e-6, atol=2e-6)


@every_family
def test_the_alignment_scalar_is_the_least_squares_fit(family: Family):
    model = family.make().train()
    taper(model)
    seen = {}
    for name, norm in tapered_norms(model).items():
        norm.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach()))
    torch.manual_seed(2)
    family.run(model, family.batch())
    update_alignment(tapered_norms(model).values())
    for name, norm in tapered_norms(model).items():
        kind = family.kind_of(name)
        tokens = torch.cat([h.double().flatten(0, -2) for h in seen[name]])
        h = tokens - tokens.mean(-1, keepdim=True) if kind.centred else tokens
        r = (h.square().mean(-1) + kind.eps).sqrt()
        gain = kind.offset + norm.weight.double() if kind.gain else torch.ones(())
        energy = (h * gain).square().sum(-1)
        norm.freeze()
        assert norm.alignment.item() == pytest.approx((energy / r).mean().item() / energy.mean().item(), rel=1e-5)


def closed(family: Family, patterns, dtype: torch.dtype) -> nn.Module:
    """A model whose norms that match have random linear maps and a closed gate."""
    model = family.make(dtype)
    taper(model, patterns)
    close_with_random_maps(tapered_norms(model))
    return model


def folds_without_a_difference(family: Family, patterns, tied: str, dtype: torch.dtype, limit: float) -> nn.Module:
    model, batch = closed(family, patterns, dtype), family.batch(dtype)
    names = list(tapered_norms(model))
    shorter = {"input_ids": slice(0, 4), "decoder_input_ids": slice(0, 1)}
    fresh = {k: v[:1, shorter.get(k, slice(None))] for k, v in family.batch(dtype, seed=5).items()}
    with torch.no_grad():
        before = [family.run(model, inputs) for inputs in (batch, fresh)]
        record = fold(model, lambda: family.run(model, batch), tied=tied, untouched=family.untouched)
        after = [family.run(model, inputs) for inputs in (batch, fresh)]
    for old, new in zip(before, after, strict=True):
        assert (old.double() - new.double()).abs().max() <= limit * old.abs().max()
    assert not any(isinstance(module, TaperNorm) for module in model.modules())
    assert {*record["identities"], *record["scales"]} == set(names)
    return model


@every_family
def test_the_norms_before_linear_maps_fold(family: Family):
    if family.foldable:
        folds_without_a_difference(family, family.foldable, "untie", torch.float64, family.limit)
        folds_without_a_difference(family, family.foldable, "untie", torch.float32, 1e-4)


@every_family
@pytest.mark.parametrize("tied", ["untie", "scale"])
def test_the_final_norm_folds_too(family: Family, tied: str):
    if family.final is None:
        return
    model = folds_without_a_difference(family, (*family.foldable, family.final), tied, torch.float64, family.limit)
    kept = type(model.get_submodule(family.final)) is not nn.Identity
    assert kept == (family.tied and tied == "scale")
    if family.tied and tied == "untie":
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("family", "pattern"),
    [(family, pattern) for family in that_refuse.values() for pattern in family.refused],
    ids=[f"{name}-{pattern}" for name, family in that_refuse.items() for pattern in family.refused],
)
def test_what_cannot_fold_is_refused_by_name_and_left_whole(family: Family, pattern: str):
    model, batch = closed(family, [pattern], torch.float64), family.batch(torch.float64)
    names, state = list(tapered_norms(model)), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = family.run(model, batch)
    with pytest.raises(TaperlitError, match=family.refused[pattern]) as refusal:
        fold(model, lambda: family.run(model, batch), untouched=family.untouched)
    assert any(name in str(refusal.value) for name in names)
    assert "\n" not in str(refusal.value)
    assert list(tapered_norms(model)) == names
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(family.run(model, batch), before)


@pytest.mark.parametrize(
    ("name", "norm"),
    [("T5", "encoder.final_layer_norm"), ("Whisper", "model.encoder.layer_norm"), ("CLIP text", "final_layer_norm")],
)
def test_a_norm_that_the_run_returns_is_refused_by_name(name: str, norm: str):
    """Such as the encoder's last hidden state, beside the logits."""
    family = FAMILIES[name]
    model = closed(family, (*family.foldable, *((family.final,) if family.final else ())), torch.float64)
    batch = family.batch(torch.float64)
    with pytest.raises(TaperlitError, match=rf"{norm} feeds .*the model's output"):
        fold(model, lambda: model(**batch))
    assert family.run(model, batch).isfinite().all()
    assert tapered_norms(model)


def test_experts_fold_by_batched_products_and_not_by_a_kernel_without_float64():
    family = FAMILIES["Mixtral"]
    model, batch = closed(family, family.foldable, torch.float32), family.batch()
    model.set_experts_implementation("grouped_mm")  # transformers' default
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = family.run(model, batch)
        with pytest.raises(TaperlitError, match="float64"):
            fold(model, lambda: family.run(model, batch))
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        model.set_experts_implementation("batched_mm")
        fold(model, lambda: family.run(model, batch))
        model.set_experts_implementation("grouped_mm")
        torch.testing.assert_close(family.run(model, batch), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma", "Cohere", "DeepSeek-V3", "Whisper", "T5 v1.1"])
def test_a_folded_model_generates_the_same_from_its_cache(name: str):
    family = FAMILIES[name]
    model = closed(family, (*family.foldable, family.final), torch.float64)
    batch = family.batch(torch.float64)
    prompt = {k: v[:2] for k, v in batch.items() if not k.startswith("decoder")}
    options = dict(max_new_tokens=6, do_sample=False, use_cache=True, output_scores=True, return_dict_in_generate=True)
    before = model.generate(**prompt, **options)
    fold(model, lambda: family.run(model, batch))
    after = model.generate(**prompt, **options)
    assert torch.equal(before.sequences, after.sequences)
    for old, new in zip(before.scores, after.scores, strict=True):
        finite = old.isfinite()
        assert torch.equal(finite, new.isfinite())
        assert (old[finite] - new[finite]).abs().max() <= 10 * family.limit * old[finite].abs().max()
