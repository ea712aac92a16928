import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from taperlit.errors import TaperlitError
from taperlit.folding import fold, largest_difference
from taperlit.norm import TaperNorm, shared_gate, tapered_norms
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
    taper=st.sampled_from(["internal", "all"]),
    tied=st.booleans(),
    how=st.sampled_from(["untie", "scale"]),
    bias=st.booleans(),
    mlp=st.sampled_from(["swiglu", "gelu"]),
    kv=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_folded_computes_the_same_without_norms(norm, taper, tied, how, bias, mlp, kv, dtype):
    torch.manual_seed(0)
    config = TransformerConfig(60, 16, 2, 2, kv, 32, 48, norm=norm, taper=taper, tied=tied, bias=bias, mlp=mlp)
    model = tapered_to_zero(Transformer(config)).to(dtype)
    tokens = torch.randint(60, (2, 16))
    folded = copy.deepcopy(model)
    report = fold(folded, lambda: folded(tokens), tied=how)
    with torch.no_grad():
        difference = largest_difference(model(tokens), folded(tokens))
    assert difference < (1e-5 if dtype == torch.float32 else 0.1)
    assert not any(isinstance(module, TaperNorm) for module in folded.modules())
    left = [m for m in folded.modules() if isinstance(m, nn.RMSNorm | nn.LayerNorm)]
    assert len(left) == (taper == "internal")
    assert not any("taper" in key for key in folded.state_dict())
    assert len(report) == (5 if taper == "all" else 4)
    # and what its own config describes is the same model
    rebuilt = Transformer(TransformerConfig(**folded.config_dict())).to(dtype).eval()
    rebuilt.load_state_dict(folded.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(tokens), folded(tokens))


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
    report = fold(model, lambda: model(x))
    assert report[0].consumers == ("layers.0.self_attn.in_proj_weight",)
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
    model = tiny(taper="internal")
    shared_gate(model).set(g)
    with pytest.raises(TaperlitError, match=f"The gate is {g:g}, not 0"):
        fold(model, lambda: model(torch.zeros(1, 4, dtype=torch.int64)))


def test_a_norm_that_did_not_run_is_refused(tiny):
    model = tapered_to_zero(tiny(taper="internal"))
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
