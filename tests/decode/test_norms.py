import time

import pytest
import torch
from torch import nn

from taperlit.decode.clock import fastest
from taperlit.decode.norms import fastest_rms_form, read_norm, rms_norm
from taperlit.errors import TaperlitError
from taperlit.norm import Affine, TaperLayerNorm, TaperRMSNorm


@pytest.mark.parametrize("form", ["fused", "composed"])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_rms_norm_is_its_formula(form, scale, dtype):
    torch.manual_seed(0)
    x, weight = (scale * torch.randn(3, 48)).to(dtype), torch.randn(48).to(dtype)
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    got = rms_norm(weight, 1e-5, x, form)(x)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=4 * eps, atol=4 * eps * wanted.abs().max().item())
    torch.testing.assert_close(
        rms_norm(None, 1e-5, x, form)(x).double(), wanted / weight.double(), rtol=9 * eps, atol=0
    )


def norms():
    torch.manual_seed(0)
    plain = nn.LayerNorm(16), nn.LayerNorm(16, bias=False), nn.LayerNorm(16, elementwise_affine=False), nn.RMSNorm(16)
    tapered = TaperRMSNorm(16), TaperRMSNorm(16, elementwise_affine=False), TaperLayerNorm(16)
    explicit = Affine((16,), centred=False, bias=False), Affine((16,), centred=True, bias=True)
    for norm in (*plain, *tapered, *explicit):
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
    for norm in tapered:
        norm.alignment.fill_(0.37)
    return [*plain, *tapered, *explicit]


@pytest.mark.parametrize("g", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("i", range(len(norms())))
def test_what_is_read_of_a_norm_computes_the_same(i, g):
    norm = norms()[i].double().eval()
    if hasattr(norm, "gate"):
        norm.gate.set(g)
    x = 5 * torch.randn(4, 16, dtype=torch.float64)
    read = read_norm("it", norm, x.float(), "composed")
    torch.testing.assert_close(read(x.float()).double(), norm(x), rtol=1e-5, atol=1e-5)


def test_an_identity_is_nothing_and_a_stranger_is_refused():
    assert read_norm("it", nn.Identity(), torch.ones(1, 4), "fused") is None
    with pytest.raises(TaperlitError, match=r"blocks\.3\.norm is a BatchNorm1d"):
        read_norm("blocks.3.norm", nn.BatchNorm1d(4), torch.ones(1, 4), "fused")


def test_the_fastest_is_the_fastest():
    naps = {"long": 0.02, "short": 0.001, "middle": 0.01}
    alternatives = {name: lambda nap=nap: time.sleep(nap) for name, nap in naps.items()}
    assert fastest(alternatives, torch.device("cpu")) == "short"


def test_measuring_leaves_the_random_state():
    state = torch.get_rng_state()
    assert fastest_rms_form(torch.ones(1, 64)) in ("fused", "composed")
    assert torch.equal(torch.get_rng_state(), state)
