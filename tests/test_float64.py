import copy

import pytest
import torch
from torch import nn

from taperlit.float64 import Copies, Float64, WideInputs, storage_of


class Mixed(nn.Module):
    """What looks at dtypes, asks for them, keeps numbers and draws them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.rnn = nn.Conv1d(4, 6, 3), nn.GRU(6, 5, batch_first=True)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        h, _ = self.rnn(self.conv(x).transpose(1, 2))
        h = self.attention(h, h, h, need_weights=False)[0]
        h = h.to(torch.bfloat16).float() + torch.ones(5)
        cache = torch.empty(h.shape)
        cache[:, :2] = h[:, :2]
        cache[:, 2:] = h[:, 2:]
        self.seen += 1
        return torch.einsum("bte,bse->bts", cache, cache).softmax(-1, dtype=torch.float32) * x.dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_model_computes_as_a_wide_one_and_stays_as_it_is(dtype):
    model = Mixed().to(dtype)
    x = torch.randn(2, 4, 9, dtype=dtype)
    wide = copy.deepcopy(model).double()
    h, _ = wide.rnn(wide.conv(x.double()).transpose(1, 2))
    h = wide.attention(h, h, h, need_weights=False)[0] + 1
    expected = (h @ h.mT).softmax(-1) * 8  # no dtype that the model asks for is heeded
    state, objects = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    watch = Float64()
    with Copies(model, wide=True), WideInputs(watch.met), watch, torch.no_grad():
        y = model(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    assert watch.coarsest == torch.finfo(torch.bfloat16).eps
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())  # seen too
    assert all(objects[name] is parameter for name, parameter in model.named_parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_copies_share_what_the_model_shares_and_take_other_contents():
    model = nn.Module()
    base = torch.arange(12.0)
    model.whole, model.part = nn.Parameter(base), nn.Parameter(base[4:10].view(2, 3).T)
    key = storage_of(base)
    with Copies(model, True, {key: lambda: torch.arange(12.0).double() * 10}) as copies:
        assert copies.original == {storage_of(model.whole): key}
        assert storage_of(model.part) == storage_of(model.whole) != key
        assert model.part.tolist() == [[40.0, 70.0], [50.0, 80.0], [60.0, 90.0]]
        with torch.no_grad():
            model.whole.zero_()
    assert torch.equal(base, torch.arange(12.0))
    assert model.part.dtype == torch.float32
    assert storage_of(model.part) == storage_of(model.whole) == key


def test_a_copy_that_fails_half_way_leaves_the_model_whole():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    parameters = {storage_of(p) for p in model.parameters()}

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError), Copies(model, True, {storage_of(model[1].bias): fail}):
        pass
    assert {storage_of(p) for p in model.parameters()} == parameters
    assert {p.dtype for p in model.parameters()} == {torch.float32}
