"""Building a model without memory for its parameters, and giving it the values of a file."""

import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from taperlit.checkpoint.assign import assign, build_hollow
from taperlit.errors import TaperlitError

FILLS = ("normal_", "uniform_", "bernoulli_", "fill_", "zero_", "randn", "rand", "copy_")


class Ledger(TorchDispatchMode):
    """Counts the elements that are written into floating tensors that have memory, and the copies made of tensors."""

    def __init__(self):
        super().__init__()
        self.filled = self.copied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out.is_meta and out.is_floating_point():
            name = func.overloadpacket.__name__
            self.filled += out.numel() if name in FILLS else 0
            self.copied += out.numel() if name in ("clone", "_to_copy") else 0
        return out


def values_of(build):
    """What a file would hold of a model, each tensor once."""
    torch.manual_seed(1)
    seen = {}
    return {name: seen.setdefault(value.data_ptr(), value.clone()) for name, value in build().state_dict().items()}


def test_no_parameter_is_filled_and_no_value_copied(tiny):
    values = values_of(lambda: tiny(tied=True))
    with Ledger() as ledger:
        model = build_hollow(lambda: tiny(tied=True))
        assert ledger.filled == sum(buffer.numel() for buffer in model.buffers())
        assert all(parameter.is_meta for parameter in model.parameters())
        assign(model, values, "file")
    assert ledger.copied == 0
    assert all(parameter.data_ptr() == values[name].data_ptr() for name, parameter in model.named_parameters())
    assert model.head.weight is model.tok_embed.weight
    tokens = torch.randint(300, (1, 7))
    assert torch.equal(model.eval()(tokens), tiny(tied=True).eval()(tokens))


class Assigned(nn.Module):
    """Parameters in all the ways that people make them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        shared = nn.Parameter(torch.randn(4))
        self.a, self.b = shared, shared
        self.many = nn.ParameterList(nn.Parameter(torch.randn(4)) for _ in range(2))
        self.by_name = nn.ParameterDict({"x": nn.Parameter(torch.randn(4), requires_grad=False)})
        self.register_parameter("none", None)
        self.attention = nn.MultiheadAttention(4, 2)
        self.in_a_list = [self.a, self.head.weight]
        scale = self.many[0]
        self.function = lambda x: x * scale
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("count", torch.tensor(3), persistent=True)
        with torch.no_grad():
            self.head.weight[0].zero_()
            self.a.mul_(2).clamp_(min=0.1)
        self.a.tag = "mine"

    def forward(self, x):
        x = self.function(self.embed(x) * self.in_a_list[0] + self.b + self.table) * self.count
        x = x + self.attention(x, x, x)[0] * self.by_name["x"] * self.many[1]
        return self.head(x) + x @ self.in_a_list[1].T


@pytest.mark.parametrize("later", [False, True])
def test_all_ways_of_making_parameters_load_right(later):
    def build():
        model = Assigned()
        if later:  # after the constructor
            model.head.bias = nn.Parameter(torch.randn(7))
            model._parameters["quiet"] = nn.Parameter(torch.randn(2))
            model.attention.out_proj = nn.Linear(4, 4, bias=False)
        return model

    torch.manual_seed(1)
    expected = build().eval()
    model = build_hollow(build)
    assign(model, {name: value.clone() for name, value in values_of(build).items()}, "file")
    assert model.a is not model.b  # the values were apart
    model = build_hollow(build)
    assert model.a is model.b is model.in_a_list[0]
    assign(model, values_of(build), "file")
    assert model.a is model.b is model.in_a_list[0]
    assert model.head.weight is model.embed.weight is model.in_a_list[1]
    assert model.a.tag == "mine"
    assert [(n, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)] == [
        (n, p.requires_grad) for n, p in expected.named_parameters(remove_duplicate=False)
    ]
    x = torch.randint(7, (3, 5))
    assert torch.equal(model.eval()(x), expected(x))
    model(x).sum().backward()
    assert model.embed.weight.grad is not None
    assert model.by_name["x"].grad is None


def test_ties_are_those_of_the_values_and_not_of_the_constructor():
    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    apart = {name: torch.randn(shape) for name, shape in (("0.weight", (4, 4)), ("1.weight", (4, 4)))}
    apart |= {"0.bias": torch.randn(4), "1.bias": torch.randn(4)}
    model = build_hollow(tied)
    assign(model, apart, "file")
    assert model[0].weight is not model[1].weight
    assert all(torch.equal(model.state_dict()[name], value) for name, value in apart.items())
    model = build_hollow(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assign(model, apart | {"1.weight": apart["0.weight"]}, "file")
    assert model[0].weight is model[1].weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_build_that_casts_casts_its_buffers_too(dtype):
    model = build_hollow(lambda: Assigned().to(dtype))
    assert model.table.dtype == dtype
    assert not model.table.is_meta


@pytest.mark.parametrize(
    "parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_weights_load_right_or_are_refused(parametrize):
    def build():
        return nn.Sequential(parametrize(nn.Linear(4, 4)))

    values, x = values_of(build), torch.randn(2, 4)
    torch.manual_seed(1)
    expected = build().eval()
    if parametrize is parametrizations.orthogonal:
        with pytest.raises(TaperlitError, match=r"constructor may not read or replace .* build=lambda: model"):
            build_hollow(build)
        built = build()
        model = build_hollow(lambda: built)  # as the message says
    else:
        model = build_hollow(build)
    assign(model, values, "file")
    assert torch.equal(model.eval()(x), expected(x))


class Reads(nn.Module):
    """A constructor that does something with its parameter's values."""

    def __init__(self, how):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        weight = self.linear.weight
        if how == "number":
            self.scale = weight.abs().max().item()
        elif how == "branch":
            self.scale = 2.0 if (weight > 0).all() else 1.0
        elif how == "list":
            self.scale = weight.tolist()
        elif how == "numpy":
            self.scale = weight.detach().numpy().copy()
        elif how == "replace":
            weight.data = torch.randn(4, 4)
        elif how == "mix":
            self.scale = torch.ones(4) + weight
        elif how == "tensor":
            self.scale = weight.detach() * 2
        elif how == "in a dict":
            self.scale = {"w": [weight.detach() * 2]}
        elif how == "before":
            start = torch.randn(4)
            self.gain, self.scale = nn.Parameter(start), start
        elif how == "buffer before":
            start = torch.randn(4)
            self.register_buffer("scale", start)
            self.gain = nn.Parameter(start)
        elif how == "view before":
            self.gain = nn.Parameter(torch.randn(4, 4))
            gain = nn.Parameter(torch.randn(4, 4))
            self.scale = gain[0]
            self.gain = gain
        elif how == "buffer":
            self.register_buffer("scale", weight.detach().norm(dim=1), persistent=False)
        elif how == "lazy":
            self.lazy = nn.LazyLinear(4)


@pytest.mark.parametrize("how", ["number", "branch", "list", "numpy", "replace", "mix"])
def test_a_constructor_that_needs_values_is_refused_and_the_advice_works(how):
    with pytest.raises(TaperlitError, match="constructor may not read or replace") as error:
        build_hollow(lambda: Reads(how))
    assert "\n" not in str(error.value)
    built = Reads(how)
    values = values_of(lambda: Reads(how))
    assign(build_hollow(lambda: built), values, "file")
    assert torch.equal(built.linear.weight, values["linear.weight"])


@pytest.mark.parametrize(
    ("how", "name"),
    [("tensor", "scale"), ("in a dict", "scale"), ("before", "scale"), ("buffer before", "scale"), ("buffer", "scale"),
     ("view before", "scale"), ("lazy", "lazy.weight")],
)  # fmt: skip
def test_a_tensor_that_would_be_left_behind_is_refused_by_name(how, name):
    values = values_of(lambda: Reads(how)) if how != "lazy" else {}
    with pytest.raises(TaperlitError, match=rf"^{name} ") as error:
        assign(build_hollow(lambda: Reads(how)), values, "file")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.pop("0.bias"), r"file has no 0\.bias, which Sequential has"),
        (lambda v: v.update(extra=torch.zeros(2)), "file has extra, which Sequential has not"),
        (lambda v: v.update({"0.bias": torch.zeros(5)}), r"file does not fit Sequential: size mismatch for 0\.bias"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(change, words):
    values = {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(4)}
    change(values)
    with pytest.raises(TaperlitError, match=words) as error:
        assign(build_hollow(lambda: nn.Sequential(nn.Linear(3, 4))), values, "file")
    assert "\n" not in str(error.value)


def test_a_model_of_another_thread_is_left_alone():
    built = []

    def build():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(3, 4)))
        thread.start()
        thread.join()
        return nn.Linear(3, 4)

    assert build_hollow(build).weight.is_meta
    assert not built[0].weight.is_meta
    assert not nn.Linear(3, 4).weight.is_meta


def test_something_else_than_a_module_is_refused():
    with pytest.raises(TaperlitError, match=r"build\(\) must return a torch\.nn\.Module, not a dict"):
        build_hollow(dict)
