"""What a model may return."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import torch
from torch import nn

from zoo.case import EITHER, FOLDS, REFUSED, D, Normed, add


@dataclass
class Record:
    """A dataclass as output."""

    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class Opaque:
    """An object that says nothing about its tensors."""

    def __init__(self, logits):
        self.logits = logits


Pair = namedtuple("Pair", "logits hidden")


class Returns(Normed):
    """A linear map of the norm; ``wrap`` makes the output of (logits, input)."""

    def __init__(self, norm, wrap):
        super().__init__(norm)
        self.linear, self.wrap = nn.Linear(D, 6), wrap

    def forward(self, x):
        return self.wrap(self.linear(self.norm(x)), x)


def returns(name, about, wrap, verdict=FOLDS, read=lambda output: output, **words):
    add(name, about, lambda norm: Returns(norm, wrap), verdict, theme="outputs", read=read, **words)


def fields(output):
    return vars(output)


returns("InTuple", "a tuple", lambda y, x: (y, x))
returns("InList", "a list of lists", lambda y, x: [[y], [x, [y * 2]]])
returns("InDict", "a dict", lambda y, x: {"logits": y, "input": x})
returns("InOrderedDict", "an OrderedDict", lambda y, x: OrderedDict(logits=y))
returns("InNamedTuple", "a namedtuple", lambda y, x: Pair(y, x))
returns("InUserDict", "a mapping of another class", lambda y, x: UserDict(logits=y), EITHER, dict)
returns("InDataclass", "a dataclass", lambda y, x: Record(y), FOLDS, fields)
returns("InOpaqueObject", "an object of another class", lambda y, x: Opaque(y), EITHER, fields)
returns("InDistribution", "a torch distribution", lambda y, x: torch.distributions.Normal(y, y.exp()), EITHER, fields)
returns("InGenerator", "a generator", lambda y, x: (part for part in (y, x)), EITHER, list)
returns("InClosure", "a function", lambda y, x: lambda: y, EITHER, lambda output: output())
returns("WithNone", "None beside a tensor", lambda y, x: (None, y))
returns("WithText", "text and numbers beside a tensor", lambda y, x: {"y": y, "name": "zoo", "n": 3, "ok": True})
returns("WithBooleans", "booleans beside a tensor", lambda y, x: (y, y > 0))
returns("WithIntegers", "integers beside a tensor", lambda y, x: (y, y.argmax(-1)))
returns("OnlyBooleans", "booleans only", lambda y, x: y > 0, EITHER)
returns("OnlyIntegers", "integers only", lambda y, x: y.argmax(-1), EITHER)
returns("OnlyNumber", "a Python float only", lambda y, x: y.sum().item(), EITHER)
returns("OnlyNumpy", "a numpy array", lambda y, x: y.detach().numpy(), EITHER, torch.as_tensor)
returns("Complex", "complex numbers", lambda y, x: torch.complex(y, y.sin()))
returns("Spectrum", "a Fourier transform", lambda y, x: torch.fft.rfft(y, dim=1))
returns("SomeNaN", "NaN in some places", lambda y, x: y.masked_fill(x[..., :6] > 0.5, float("nan")))
returns("AllNaN", "NaN in all places", lambda y, x: y * float("nan"), EITHER)
returns("NaNFromValues", "NaN where the logits are negative", lambda y, x: y.log())
returns("MinusInfinity", "minus infinity over masked logits", lambda y, x: y.masked_fill(x[..., :6] > 0.5, -torch.inf))
returns("Masked", "-1e9 over masked logits", lambda y, x: y.masked_fill(x[..., :6] > 0.5, -1e9))
returns("MaskAdded", "-1e9 added to some logits", lambda y, x: y - 1e9 * (x[..., :6] > 0.5))
returns("AllZero", "zeros only", lambda y, x: y * 0)
returns("Tiny", "tiny numbers", lambda y, x: y * 1e-30)
returns("TinyBesideHuge", "tiny numbers beside huge ones", lambda y, x: (y * 1e-12, x * 1e12))
returns("TwoOfTheSame", "the same tensor twice", lambda y, x: (y, y))
returns("EmptyTensor", "an empty tensor beside the logits", lambda y, x: (y[:, :0], y))
returns("Scalar", "a scalar", lambda y, x: y.square().mean())
returns(
    "Sparse", "a sparse tensor", lambda y, x: y.relu().to_sparse(), EITHER, lambda output: output.to_dense(), why="."
)
returns("Random", "other numbers each time", lambda y, x: y + torch.randn_like(y))
returns("RandomShape", "another length each time", lambda y, x: y[:, : int(torch.randint(1, 5, ()))])
returns("Sampled", "sampled tokens", lambda y, x: torch.distributions.Categorical(logits=y).sample(), EITHER)
returns("IgnoresIt", "the logits are not returned", lambda y, x: x)
returns("Saturated", "saturated to a constant", lambda y, x: (y * 0 + 50).sigmoid())
returns("Clamped", "clamped logits", lambda y, x: y.clamp(-0.1, 0.1))
returns("Rounded8", "rounded to eighths", lambda y, x: (y * 8).round() / 8)
returns("InBfloat16", "cast to bfloat16 at the end", lambda y, x: y.bfloat16(), FOLDS, lambda output: output > 10)
returns("TheInput", "the input itself beside the logits", lambda y, x: {"input": x, "logits": y})
returns("TheParameter", "a copy of the weight is in the output", lambda y, x: (y, y.new_zeros(3)))


class ReturnsWeight(Returns):
    """Returns its weight too, as hypernetworks and tied decoders do."""

    def forward(self, x):
        return super().forward(x), self.linear.weight


add(
    "WeightReturned",
    "the weight is returned too",
    lambda norm: ReturnsWeight(norm, lambda y, x: y),
    REFUSED,
    theme="outputs",
    whole=True,
)


class ReturnsItself(Returns):
    """Returns the model itself beside the logits."""

    def forward(self, x):
        return {"model": self, "logits": super().forward(x)}


add(
    "ModelReturned",
    "the model itself is in the output",
    lambda norm: ReturnsItself(norm, lambda y, x: y),
    EITHER,
    theme="outputs",
    read=lambda output: output["logits"],
)
