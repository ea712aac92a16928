import pytest
import torch
from torch import nn

from taperlit.consumers import find_consumers
from taperlit.errors import TaperlitError
from taperlit.norm import TaperLayerNorm, TaperRMSNorm, shared_gate, tapered_norms
from taperlit.surgery import taper


def encoder(**options):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **{"norm_first": True, **options})
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False)


def test_taper_keeps_function_parameters_and_mode():
    model = encoder().eval()
    x = torch.randn(2, 5, 32)
    with torch.enable_grad():
        before, parameters = model(x), dict(model.named_parameters())
    names = taper(model, ["layers.*"])
    assert names == ["layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.1.norm2"]
    assert list(tapered_norms(model)) == names
    assert type(model.norm) is nn.LayerNorm
    assert torch.equal(model(x), before)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert not any(module.training for module in model.modules())


def test_torchs_fused_encoder_path_does_not_bypass_the_norms():
    model = encoder().eval()
    taper(model)
    shared_gate(model).set(0.0)
    for norm in tapered_norms(model).values():
        norm.alignment.fill_(3.0)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        inferred = model(x)
    torch.testing.assert_close(inferred, model(x), rtol=1e-4, atol=1e-4)


def test_taper_both_kinds_with_their_options():
    model = nn.Sequential(
        nn.RMSNorm(8, eps=1e-3), nn.LayerNorm(8, bias=False), nn.LayerNorm(8, elementwise_affine=False)
    )
    taper(model, ema_rate=0.2)
    assert [type(m) for m in model[:3]] == [TaperRMSNorm, TaperLayerNorm, TaperLayerNorm]
    assert model[0].eps == 1e-3
    assert model[1].bias is None
    assert model[2].weight is None
    assert model[1].ema_rate == 0.2


def test_taper_says_when_nothing_matches():
    with pytest.raises(TaperlitError, match=r"\['heads\.\*'\].*layers\.0\.norm1"):
        taper(encoder(), ["heads.*"])


class Odd(nn.Module):
    """One norm a line, each used in another way."""

    def __init__(self):
        super().__init__()
        self.plain, self.post, self.unused, self.part, self.both, self.product = (nn.RMSNorm(8) for _ in range(6))
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(4, 8)
        self.conv = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        y = self.a(self.plain(x).transpose(0, 1).contiguous().transpose(0, 1))
        y = y + self.post(x)
        y = y + self.c(self.part(x)[..., :4])
        both = self.both(y)
        y = self.b(both) + both
        return self.product(y) @ self.conv


def test_find_consumers_by_what_runs():
    model = Odd()
    taper(model)
    x = torch.randn(2, 3, 8)
    feeds = find_consumers(model, lambda: model(x))
    plain = feeds["plain"]
    assert [c.weight for c in plain.consumers] == ["a.weight"]
    assert plain.consumers[0].bias == "a.bias"
    assert not plain.consumers[0].transposed
    assert not plain.others
    assert feeds["post"].others == ["add"]
    assert not feeds["unused"].consumers
    assert not feeds["unused"].others
    assert feeds["part"].others
    assert [c.weight for c in feeds["both"].consumers] == ["b.weight"]
    assert feeds["both"].others == ["add"]
    assert [(c.weight, c.transposed) for c in feeds["product"].consumers] == [("conv", True)]
    assert model.training


def test_find_consumers_sees_through_autocast():
    model = Odd()
    taper(model)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 3, 8))

    feeds = find_consumers(model, run)
    assert [c.weight for c in feeds["plain"].consumers] == ["a.weight"]


def test_find_consumers_of_a_shared_matrix():
    model = nn.Module()
    model.embed, model.norm, model.head = nn.Embedding(20, 8), nn.RMSNorm(8), nn.Linear(8, 20, bias=False)
    model.head.weight = model.embed.weight
    taper(model)
    feeds = find_consumers(model, lambda: model.head(model.norm(model.embed(torch.tensor([1, 2])))))
    assert feeds["norm"].shared == ["head.weight"]
