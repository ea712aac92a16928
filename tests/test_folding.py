import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from taperlit.compare import largest_difference
from taperlit.errors import TaperlitError
from taperlit.folding import fold, rehearse
from taperlit.norm import TaperNorm, shared_gate, tapered_norms
from taperlit.structure import apply_structure
from taperlit.surgery import taper
from taperlit.transformer import Transformer, TransformerConfig


def tapered_to_zero(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in tapered_norms(model).values():
            norm.alignment.copy_(torch.rand((), generator=generator) * 3 + 0.1)
            for name, parameter in norm.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(noise * 0.3 + ("bias" not in name))
    shared_gate(model).set(0.0)
    return model.eval()


@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(["rmsnorm", "layernorm"]),
    names=st.sampled_from([["blocks.*"], ["*"]]),
    tied=st.booleans(),
    how=st.sampled_from(["untie", "scale"]),
    bias=st.booleans(),
    mlp=st.sampled_from(["swiglu", "glu", "gelu", "relu"]),
    kv=st.sampled_from([1, 2]),
    embed_norm=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_folded_computes_the_same_without_norms(norm, names, tied, how, bias, mlp, kv, embed_norm, dtype):
    torch.manual_seed(0)
    config = TransformerConfig(
        60, 16, 2, 2, kv, 32, 48, norm=norm, tied=tied, bias=bias, mlp=mlp, embed_norm=embed_norm
    )
    model = Transformer(config)
    taper(model, names)
    tapered_to_zero(model).to(dtype)
    tokens = torch.randint(60, (2, 16))
    folded = copy.deepcopy(model)
    structure = fold(folded, lambda: folded(tokens), tied=how)
    with torch.no_grad():
        difference = largest_difference(model(tokens), folded(tokens))
    assert difference < (1e-5 if dtype == torch.float32 else 0.1)
    assert structure["difference"] < 1e-13
    assert not any(isinstance(module, TaperNorm) for module in folded.modules())
    left = [m for m in folded.modules() if isinstance(m, nn.RMSNorm | nn.LayerNorm)]
    assert len(left) == (names == ["blocks.*"])
    assert not any("taper" in key for key in folded.state_dict())
    assert len(structure["identities"]) + len(structure["scales"]) == (5 if names == ["*"] else 4)
    assert bool(structure["scales"]) == (names == ["*"] and tied and how == "scale")
    assert folded.config.embed_norm == (embed_norm and how == "scale")
    assert structure["untied"] == ["head.weight"] * (tied and how == "untie" and (embed_norm or names == ["*"]))
    # and what its record describes is the same model
    rebuilt = apply_structure(Transformer(replace(config, embed_norm=folded.config.embed_norm)), structure)
    rebuilt = rebuilt.to(dtype).eval()
    rebuilt.load_state_dict(folded.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(tokens), folded(tokens))


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_table_takes_the_norm_after_it(tied):
    torch.manual_seed(0)
    config = TransformerConfig(60, 16, 2, 2, 2, 32, 48, tied=tied, embed_norm=True)
    model = Transformer(config)
    model.tok_embed.weight.mul_(torch.logspace(-3, 3, 60)[:, None])  # rows of many sizes
    before = model.tok_embed.weight.clone()
    head = model.head.weight.clone()
    taper(model, ["blocks.*"])
    tapered_to_zero(model)
    tokens = torch.arange(60).view(4, 15)
    logits = copy.deepcopy(model).double()(tokens)
    fold(model, lambda: model(tokens))
    rows = before.double() / before.double().square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(model.tok_embed.weight.double(), rows, rtol=1e-6, atol=0)
    assert torch.equal(model.head.weight, head)
    assert largest_difference(logits, model.double()(tokens)) < 1e-5
    # A model that is built anew divides its rows once more, which changes nothing.
    again = Transformer(config)
    again.head.weight = nn.Parameter(head.clone())
    again.tok_embed.weight.copy_(rows)
    assert largest_difference(again.double().token_table(), rows) < 1e-6


def test_every_module_that_shared_the_table_has_a_matrix_of_its_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Transformer(TransformerConfig(60, 16, 1, 2, 2, 32, 48, tied=True, embed_norm=True))
            self.other = nn.Linear(32, 60, bias=False)
            self.other.weight = self.model.head.weight

        def forward(self, tokens):
            return self.model(tokens), self.other(self.model.tok_embed(tokens))

    model, tokens = Two(), torch.arange(60).view(4, 15)
    taper(model, ["model.blocks.*"])
    tapered_to_zero(model)
    with torch.no_grad():
        model.model.tok_embed.weight.mul_(torch.logspace(-1, 1, 60)[:, None])
    # The other reads the rows undivided, which the table no more has: told, and nothing changed.
    weight = model.other.weight
    with pytest.raises(TaperlitError):
        fold(model, lambda: model(tokens))
    assert model.model.tok_embed.weight is model.model.head.weight is model.other.weight is weight
    structure = fold(model, lambda: model.model(tokens), untouched=["other.*"])
    assert sorted(structure["untied"]) == ["model.head.weight", "other.weight"]
    rebuilt = Two()
    rebuilt.model.config = model.model.config
    apply_structure(rebuilt, structure).load_state_dict(model.state_dict())
    assert torch.equal(rebuilt.eval().model(tokens), model.model(tokens))


def test_a_fold_that_fails_leaves_the_embedding_as_it_was():
    model = Transformer(TransformerConfig(60, 16, 2, 2, 2, 32, 48, tied=True, embed_norm=True))
    taper(model, ["*"])
    tapered_to_zero(model)
    model.blocks[0].attn_norm.register_forward_hook(lambda module, args, output: output.sin())
    weight, config = model.tok_embed.weight, model.config
    with pytest.raises(TaperlitError):
        fold(model, lambda: model(torch.arange(16)[None]))
    assert model.tok_embed.weight is weight is model.head.weight
    assert model.config is config


def test_the_algebra_in_float64():
    torch.manual_seed(0)
    for kind in (nn.RMSNorm, nn.LayerNorm):
        model = nn.Sequential(kind(8), nn.Linear(8, 5, bias=False)).double()
        taper(model)
        tapered_to_zero(model)
        norm, linear = model[0], model[1]
        x = torch.randn(10, 8, dtype=torch.float64)
        centring = torch.eye(8).double() - (1 / 8 if norm.centred else 0)
        matrix = norm.alignment.double() * centring @ torch.diag(norm.taper_weight.detach()) @ linear.weight.detach().T
        bias = norm.taper_bias.detach() @ linear.weight.detach().T if norm.centred else None
        fold(model, lambda model=model, x=x: model(x))
        torch.testing.assert_close(model[1].weight.detach().T, matrix, rtol=1e-12, atol=1e-12)
        if bias is None:
            assert model[1].bias is None
        else:
            torch.testing.assert_close(model[1].bias.detach(), bias, rtol=1e-12, atol=1e-12)


def test_torchs_encoder_folds_into_its_packed_projection():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False)
    taper(model, ["layers.*"])
    tapered_to_zero(model)
    x = torch.randn(2, 5, 32)
    before = model(x)
    structure = fold(model, lambda: model(x))
    assert structure["identities"]["layers.0.norm1"] == ["layers.0.self_attn.in_proj_weight"]
    assert largest_difference(before, model(x)) < 1e-5
    with torch.no_grad():
        assert largest_difference(before, model(x)) < 1e-5


def test_a_post_norm_is_refused_by_name_and_nothing_changes():
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=False)
    taper(model)
    tapered_to_zero(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TaperlitError, match=r"norm1 feeds something that is not a linear map of its own \(add\)"):
        fold(model, lambda: model(torch.randn(2, 5, 32)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(tapered_norms(model)) == 2


class QKNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.q_norm = nn.Linear(8, 8), nn.RMSNorm(8)

    def forward(self, x):
        q = self.q_norm(self.q(x))
        return q @ q.transpose(-1, -2)


def test_a_qk_norm_is_refused_by_name():
    model = QKNorm()
    taper(model)
    shared_gate(model).set(0.0)
    with pytest.raises(TaperlitError, match="q_norm feeds something that is not a linear map"):
        fold(model, lambda: model(torch.randn(2, 3, 8)))


@pytest.mark.parametrize("g", [1.0, 0.25])
def test_an_open_gate_is_refused_by_value(tiny, g):
    model = tiny(["blocks.*"])
    shared_gate(model).set(g)
    with pytest.raises(TaperlitError, match=f"The gate is {g:g}, not 0"):
        fold(model, lambda: model(torch.zeros(1, 4, dtype=torch.int64)))


def test_a_norm_that_did_not_run_is_refused(tiny):
    model = tapered_to_zero(tiny(["blocks.*"]))
    with pytest.raises(TaperlitError, match=r"blocks\.0\.attn_norm did not run"):
        fold(model, lambda: None)


def test_a_model_without_tapernorm_is_refused(tiny):
    with pytest.raises(TaperlitError, match="found no TaperNorm in Transformer"):
        fold(tiny(), lambda: None)


@pytest.mark.parametrize("second", ["another norm", "no norm"])
def test_a_matrix_that_other_inputs_use_is_refused(second):
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.linear = nn.RMSNorm(8), nn.RMSNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.linear(self.a(x))
            return self.linear(self.b(y) if second == "another norm" else y)

    model = Reused()
    taper(model, ["a", "b"] if second == "another norm" else ["a"])
    tapered_to_zero(model)
    with pytest.raises(TaperlitError, match=r"a feeds .* \(linear\.weight, which other inputs use too\)"):
        fold(model, lambda: model(torch.randn(2, 8)))


class Experts(nn.Module):
    """A norm that feeds one of two linear maps, by the length of the input."""

    def __init__(self):
        super().__init__()
        self.norm, self.short, self.long, self.aside = (
            nn.LayerNorm(8),
            nn.Linear(8, 4),
            nn.Linear(8, 4),
            nn.Linear(4, 4),
        )

    def forward(self, x):
        return (self.short if x.shape[0] < 4 else self.long)(self.norm(x))


def test_a_run_that_leaves_parameters_untouched_is_refused_and_more_runs_mend_it():
    torch.manual_seed(0)
    model = Experts()
    taper(model)
    tapered_to_zero(model)
    x = torch.randn(5, 8)
    before = [model(x[:2]), model(x)]
    with pytest.raises(TaperlitError, match=r"used long\.weight, long\.bias, aside\.weight, aside\.bias nowhere"):
        fold(model, lambda: model(x[:2]))
    with pytest.raises(TaperlitError, match=r"used aside\.weight, aside\.bias nowhere"):
        fold(model, lambda: model(x[:2]), lambda: model(x))
    structure = fold(model, lambda: model(x[:2]), lambda: model(x), untouched=["aside.*"])
    assert structure["identities"] == {"norm": ["short.weight", "long.weight"]}
    for old, new in zip(before, [model(x[:2]), model(x)], strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("fault", ["raises", "draws", "returns nothing", "is read by the forward pass"])
def test_whatever_goes_wrong_the_model_is_whole(fault):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)).double()
    taper(model)
    tapered_to_zero(model).train()
    x, calls = torch.randn(3, 8).double(), []

    def run():
        calls.append(1)
        if fault == "raises" and len(calls) > 2:
            raise KeyError("mine")
        if fault == "is read by the forward pass":
            return model(x) * model[0].taper_weight.sum()
        y = model(x * (len(calls) if fault == "draws" else 1))
        return None if fault == "returns nothing" else y

    before, modules, state = model(x), [*model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(TaperlitError) as error:
        fold(model, run)
    words = {
        "raises": "KeyError: 'mine'", "draws": "gives the same each time", "returns nothing": "no finite numbers",
        "is read by the forward pass": "a model that does not run (AttributeError",
    }  # fmt: skip
    assert words[fault] in str(error.value)
    assert [*model.modules()] == modules
    assert all(module.training for module in modules)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model[1].bias is None
    assert torch.equal(model(x), before)


def test_an_error_of_the_users_own_run_is_the_users():
    model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8))
    taper(model)
    tapered_to_zero(model)
    with pytest.raises(RuntimeError, match="size of tensor"):
        fold(model, lambda: model(torch.randn(3, 7)))


def test_a_rehearsal_finds_at_the_start_what_folding_would_find_at_the_end():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8, bias=False))  # with gains of one and biases of zero
    taper(model)
    rehearse(model, lambda: model(torch.randn(3, 8)))

    class OwnLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.weight = nn.LayerNorm(8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return self.norm(x) @ self.weight

    own = OwnLinear()
    taper(own)
    with pytest.raises(TaperlitError, match="norm adds a bias, and the product with weight reads none"):
        rehearse(own, lambda: own(torch.randn(3, 8)))


def test_what_float16_cannot_hold_is_refused_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 64))
    taper(model)
    tapered_to_zero(model)
    with torch.no_grad():
        model[0].alignment.fill_(1e-3)
        model[1].weight.mul_(0.02)
    model.half()
    x, before = 100 * torch.randn(5, 64), copy.deepcopy(model.state_dict())
    with pytest.raises(TaperlitError, match=r"1\.weight is too small for float16 .* fold the model in float32"):
        fold(model, lambda: model(x.half()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fold(model.float(), lambda: model(x))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float32])
def test_a_mask_that_is_added_hides_no_difference(half):
    torch.manual_seed(0)
    logits = torch.randn(4, 16, dtype=half).double()
    mask = -1e9 * (torch.arange(16) % 4 == 0).double()
    for scale in (1.3, 1 + 1e-6):
        expected = largest_difference(logits[:, mask == 0], scale * logits[:, mask == 0])
        assert largest_difference(logits + mask, scale * logits + mask) == pytest.approx(expected, rel=0.3)
    assert largest_difference(logits + mask, logits + 1.01 * mask) == pytest.approx(0.01)
    few = torch.randn(1000) * 1e6
    few[0] = 1e-3  # near 0 by chance: what it differs by is the rounding of the others
    assert largest_difference(few, few + 0.06 * torch.randn(1000)) < 1e-6


def test_a_bfloat16_model_is_proved_in_float64():
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 64), nn.RMSNorm(64), nn.Linear(64, 64)).bfloat16()
    taper(model)
    tapered_to_zero(model)
    x = torch.randn(5, 64).bfloat16()
    wide = copy.deepcopy(model).double()
    structure = fold(model, lambda: model(x))
    assert structure["difference"] < 1e-14  # though its weights are rounded to three digits
    exact = wide(x.double())
    assert largest_difference(exact, model(x)) < 0.05
    gain = wide[0].alignment.double() * wide[0].taper_weight
    assert torch.equal(model[1].weight, (wide[1].weight * gain).bfloat16())
