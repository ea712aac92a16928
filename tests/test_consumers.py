import pytest
import torch
from torch import nn

from taperlit.conflicts import resolve
from taperlit.consumers import Watch, run_quietly
from taperlit.errors import TaperlitError
from taperlit.norm import shared_gate
from taperlit.surgery import taper


class Odd(nn.Module):
    """One norm a line, each used in another way."""

    def __init__(self):
        super().__init__()
        self.plain, self.post, self.part, self.both, self.product = (nn.RMSNorm(8) for _ in range(5))
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(4, 8)
        self.conv = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        y = self.a(self.plain(x).transpose(0, 1).contiguous().transpose(0, 1))
        y = y + self.post(x)
        y = y + self.c(self.part(x)[..., :4])
        both = self.both(y)
        y = self.b(both) + both
        return self.product(y) @ self.conv


def find_consumers(model, run):
    """What every norm feeds in one run."""
    watch = Watch(model)
    run_quietly(model, lambda: watch.returned(run), watch.watching())
    return resolve(watch)


@pytest.fixture
def odd():
    torch.manual_seed(0)
    model = Odd()
    taper(model)
    shared_gate(model).set(0.0)
    return model


def names(model, feed):
    """The weights a norm feeds, found by where their storage lies."""
    where = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}
    return [where[product.weight.storage] for product in feed.products]


def test_consumers_by_what_runs(odd):
    x = torch.randn(2, 3, 8)
    feeds = find_consumers(odd, lambda: odd(x))
    assert names(odd, feeds["plain"]) == ["a.weight"]
    assert not feeds["plain"].others
    assert feeds["post"].others == ["add"]
    assert names(odd, feeds["part"]) == ["c.weight"]
    assert feeds["part"].products[0].parts[0].features.tolist() == [[0, 1, 2, 3]]
    assert names(odd, feeds["both"]) == ["b.weight"]
    assert feeds["both"].others == ["add"]
    assert names(odd, feeds["product"]) == ["conv"]
    assert feeds["product"].products[0].weight.size == (1, 8, 6)
    assert odd.training


def test_a_norm_that_did_not_run_is_named(odd):
    with pytest.raises(TaperlitError, match="plain did not run"):
        find_consumers(odd, lambda: odd.product(torch.randn(2, 8)))


def test_consumers_are_seen_through_autocast_and_inference_mode(odd):
    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return odd(torch.randn(2, 3, 8))

    def inference():
        with torch.inference_mode():
            return odd(torch.randn(2, 3, 8))

    for run in (autocast, inference):
        assert names(odd, find_consumers(odd, run)["plain"]) == ["a.weight"]


def test_a_matrix_that_an_embedding_shares_is_named_where_it_multiplies():
    model = nn.Module()
    model.embed, model.norm, model.head = nn.Embedding(20, 8), nn.RMSNorm(8), nn.Linear(8, 20, bias=False)
    model.head.weight = model.embed.weight
    taper(model)
    shared_gate(model).set(0.0)
    feeds = find_consumers(model, lambda: model.head(model.norm(model.embed(torch.tensor([1, 2])))))
    assert feeds["norm"].shared == {"head.weight": True}
    feeds = find_consumers(model, lambda: model.norm(model.embed(torch.tensor([1, 2]))) @ model.embed.weight.T)
    assert list(feeds["norm"].shared.values()) == [False]


def test_every_layout_of_a_matrix_is_read_right():
    """The elements that multiply feature k, by an independent truth: the gradient of that feature's product."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 6))
    ways = {
        "x @ W": lambda x, w: x @ w,
        "x @ W.T": lambda x, w: x @ w.T,
        "x @ W.T.contiguous()": lambda x, w: x @ w.T.contiguous(),
        "x @ W.contiguous().T": lambda x, w: x @ w.contiguous().T,
        "einsum bd,de": lambda x, w: torch.einsum("bd,de->be", x, w),
        "einsum bd,ed": lambda x, w: torch.einsum("bd,ed->be", x, w),
        "W @ x.T": lambda x, w: (w @ x.T).T,
        "bmm": lambda x, w: torch.bmm(x[None], w.T[None])[0],
        "one vector": lambda x, w: torch.stack([w @ row for row in x]),
    }
    for way, product in ways.items():
        model = nn.Module()
        model.norm, model.weight = nn.RMSNorm(6), weight
        taper(model)
        shared_gate(model).set(0.0)
        x = torch.randn(3, 6)
        feeds = find_consumers(model, lambda model=model, product=product, x=x: product(model.norm(x), model.weight))
        for found in feeds["norm"].products:
            assert found.parts[0].features.tolist() == [list(range(6))]
            for k in range(6):
                w = weight.detach().clone().requires_grad_()
                product(torch.eye(6)[k : k + 1], w).sum().backward()  # only what multiplies feature k has a gradient
                assert sorted(found.weight.index()[0, k].tolist()) == w.grad.flatten().nonzero().flatten().tolist(), way
