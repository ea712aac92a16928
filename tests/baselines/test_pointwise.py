"""DyT and Derf against their formulas in float64, and their surgery on models of several families."""

import copy
import pickle

import pytest
import torch
from torch import nn

from taperlit import Transformer, TransformerConfig, fold, taper
from taperlit.baselines import BASELINES, Derf, DyT, apply_derf, apply_dyt
from taperlit.baselines.pointwise import first_alpha
from taperlit.errors import TaperlitError
from taperlit.folding import rehearse
from taperlit.norm import tapered_norms
from taperlit.training.optimizer import Settings, build

SHAPE = dict(vocab_size=50, block_size=8, n_layer=2, n_head=2, d_model=16, d_ff=24)
SETTINGS = Settings(1e-3, (0.9, 0.95), 0.1, 1, 10, 0.1)


def model_of(norm="layernorm", **changes):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**{**SHAPE, "norm": norm, "tied": True, **changes}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [DyT, Derf])
def test_the_layer_is_its_formula_and_so_are_its_gradients(kind, bias):
    torch.manual_seed(1)
    layer = kind((6,), bias, alpha=0.7, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    assert {n: p.numel() for n, p in parameters.items()} == {
        "alpha": 1, "weight": 6, **({"bias": 6} if bias else {}), **({"shift": 1} if kind is Derf else {}),
    }  # fmt: skip
    assert layer.alpha.item() == 0.7
    assert bool((layer.weight == 1).all())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.rand_like(parameter))
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 5, 6, dtype=torch.float64)
    y = layer(x)
    y.backward(g)
    a, gamma, beta = layer.alpha.item(), layer.weight.detach(), layer.bias.detach() if bias else 0.0
    with torch.no_grad():
        if kind is DyT:
            inner = a * x
            squashed = (inner.exp() - (-inner).exp()) / (inner.exp() + (-inner).exp())
            slope = 1 - squashed.square()
        else:
            inner = a * x + layer.shift.item()
            squashed = torch.special.ndtr(inner * 2**0.5) * 2 - 1  # erf by the normal distribution
            slope = 2 / torch.pi**0.5 * (-inner.square()).exp()
        torch.testing.assert_close(y, gamma * squashed + beta, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x.grad, g * gamma * slope * a, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.alpha.grad, (g * gamma * slope * x).sum().view(1), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.weight.grad, (g * squashed).sum((0, 1)), rtol=1e-10, atol=1e-12)
        if kind is Derf:
            torch.testing.assert_close(layer.shift.grad, (g * gamma * slope).sum().view(1), rtol=1e-10, atol=1e-12)
    assert layer(x.detach().bfloat16()).dtype is torch.bfloat16


def test_the_first_alpha_goes_by_width_and_place():
    table = {64: (1, 1), 1024: (1, 1), 1600: (1, 1), 2048: (1, 0.5), 4096: (0.8, 0.2), 5120: (0.6, 0.15)}
    for width, alphas in {**table, 8192: (0.2, 0.05), 9999: (0.2, 0.05)}.items():
        assert tuple(first_alpha(width, role) for role in ("attention", "mlp")) == alphas
        assert first_alpha(width, "final") == first_alpha(width, "mlp")
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**{**SHAPE, "d_model": 4096, "n_head": 32}))
    apply_dyt(model)
    alphas = {n: m.alpha_init for n, m in model.named_modules() if isinstance(m, DyT)}
    assert alphas == {
        **{f"blocks.{i}.attn_norm": 0.8 for i in range(2)}, **{f"blocks.{i}.mlp_norm": 0.2 for i in range(2)},
        "final_norm": 0.2,
    }  # fmt: skip


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("apply", [apply_dyt, apply_derf])
def test_every_norm_is_replaced_and_the_embedding_scaled_but_not_the_tied_head(apply, norm):
    model = model_of(norm)
    embedding, hidden = model.tok_embed.weight, {}
    names = [f"blocks.{i}.{n}" for i in range(2) for n in ("attn_norm", "mlp_norm")] + ["final_norm"]
    assert apply(model) == names
    assert all((model.get_submodule(name).bias is not None) == (norm == "layernorm") for name in names)
    assert model.head.weight is embedding is model.tok_embed.weight
    assert model.tok_embed.scale.item() == 4.0  # sqrt(16)
    model.final_norm.register_forward_hook(lambda m, a, y: hidden.update(last=y))
    model.blocks[0].register_forward_pre_hook(lambda m, a: hidden.update(first=a[0]))
    tokens = torch.arange(8)[None]
    logits = model(tokens)
    assert torch.equal(hidden["first"], embedding[tokens] * 4.0)
    torch.testing.assert_close(logits, hidden["last"] @ embedding.T)
    logits.square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for name, p in model.named_parameters() if "bias" not in name)
    assert not tapered_norms(model)


@pytest.mark.parametrize("name", BASELINES)
def test_copies_pickles_and_state_dicts_go_around(name):
    model, tokens = model_of(), torch.arange(8)[None]
    BASELINES[name](model)
    other = model_of(n_layer=2)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    BASELINES[name](other)
    other.load_state_dict(model.state_dict())
    expected = model(tokens)
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens), expected)
        assert twin.head.weight is twin.tok_embed.weight


@pytest.mark.parametrize("apply", [apply_dyt, apply_derf])
def test_all_parameters_of_the_layer_decay_as_weights_do(apply):
    model = model_of()
    apply(model)
    optimizer, _ = build(model, SETTINGS, fused=False)
    decay, keep = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert {n for n in names if names[n] in keep} == {"tok_embed.weight", "tok_embed.scale"}
    assert {n for n in names if "norm" in n} <= {n for n in names if names[n] in decay}


@pytest.mark.parametrize("name", ["dyt", "derf"])
@pytest.mark.parametrize("partly", [False, True])
def test_folding_refuses_it_by_name_also_beside_tapered_norms(name, partly):
    model, tokens = model_of(), torch.arange(8)[None]
    {"dyt": apply_dyt, "derf": apply_derf}[name](model, ["blocks.1.*"] if partly else ["*"])
    if partly:
        taper(model, ["blocks.0.*"])
        next(iter(tapered_norms(model).values())).gate.set(0.0)
    layer, function = {"dyt": ("DyT", "tanh"), "derf": ("Derf", "erf")}[name]
    for act in (fold, rehearse):
        with pytest.raises(TaperlitError, match=rf"attn_norm is a {layer}, whose {function} stays .* cannot be folded"):
            act(model, lambda: model(tokens))


def test_what_cannot_be_replaced_is_refused_and_left_as_it_was():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.odd_norm = nn.LayerNorm(4), nn.LayerNorm(4)

    model = nn.ModuleDict({"wte": nn.Embedding(3, 4), "h": nn.ModuleList([Block()]), "ln_f": nn.LayerNorm(4)})
    before = {name: type(module) for name, module in model.named_modules()}
    state = set(model.state_dict())
    with pytest.raises(TaperlitError, match=r"h\.0\.odd_norm is none of the .* names=\[\.\.\.\]"):
        apply_dyt(model)
    assert ({name: type(module) for name, module in model.named_modules()}, set(model.state_dict())) == (before, state)
    assert apply_dyt(model, ["*ln_?"]) == ["h.0.ln_1", "ln_f"]  # as it advises
    taper(model, ["*"])
    with pytest.raises(TaperlitError, match=r"h\.0\.odd_norm is tapered already"):
        apply_dyt(model)
    with pytest.raises(TaperlitError, match=r"no nn\.Embedding"):
        apply_dyt(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(TaperlitError, match=r"Which of 0, 1 embeds"):
        apply_derf(nn.Sequential(nn.Embedding(3, 4), nn.Embedding(3, 4), nn.LayerNorm(4)))


@pytest.mark.parametrize("apply", [apply_dyt, apply_derf])
def test_a_norm_that_would_undo_the_scalar_is_refused(apply):
    shape = dict(vocab_size=30, block_size=8, n_layer=1, n_head=1, d_model=8, d_ff=8)
    model = Transformer(TransformerConfig(**shape, embed_norm=True))
    before = str(model)
    with pytest.raises(
        TaperlitError, match=r"embed_norm would divide out again; set model\.overrides\.embed_norm to false"
    ):
        apply(model)
    assert str(model) == before
    apply(Transformer(TransformerConfig(**shape, embed_norm=False)))  # as it advises
