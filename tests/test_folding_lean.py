"""``fold(keep=False)`` folds as ``fold`` does, in a fraction of the memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taperlit.bench.profiling import profiled
from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.norm import TaperLayerNorm, shared_gate, tapered_norms

GPT2 = dict(norm="layernorm", position="learned", mlp="gelu", bias=True)


def linear_phase(model):
    for norm in tapered_norms(model).values():
        norm.alignment.fill_(0.7)
        for parameter in (norm.taper_weight, norm.taper_bias):
            if parameter is not None:
                parameter.data.uniform_(0.5, 1.5)
    shared_gate(model).set(0.0)
    return model.eval()


@pytest.mark.parametrize("tied", ["untie", "scale"])
@pytest.mark.parametrize(
    "shape", [{}, {"tied": True}, {"n_kv_head": 1}, GPT2, {**GPT2, "tied": True}, {"norm": "layernorm"}]
)
def test_the_weights_are_the_same_to_the_last_bit(tiny, shape, tied):
    model = linear_phase(tiny(["*"], **shape))
    lean, tokens = copy.deepcopy(model), torch.randint(300, (2, 16))
    structure = fold(model, lambda: model(tokens), tied=tied)
    other = fold(lean, lambda: lean(tokens), tied=tied, keep=False)
    assert structure == other
    assert 0 < structure["difference"] < 1e-12
    expected = model.state_dict()
    assert lean.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in lean.state_dict().items())
    with torch.no_grad():
        assert torch.equal(lean(tokens), model(tokens))


def test_half_precision_is_folded_alike(tiny):
    model = linear_phase(tiny(["*"])).bfloat16()
    lean, tokens = copy.deepcopy(model), torch.randint(300, (2, 16))
    structure = fold(model, lambda: model(tokens))
    assert fold(lean, lambda: lean(tokens), keep=False) == structure
    assert all(torch.equal(a, b) for a, b in zip(lean.parameters(), model.parameters(), strict=True))


def most_held(work):
    held = peak = 0
    events = profiled(work, memory=True).profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_it_takes_less_memory_than_the_weights(tiny):
    shape = dict(vocab_size=500, n_layer=12, d_model=128, d_ff=512)
    model = linear_phase(tiny(["*"], **shape))
    weights, tokens = sum(p.nbytes for p in model.parameters()), torch.randint(500, (1, 8))
    lean = copy.deepcopy(model)
    assert most_held(lambda: fold(lean, lambda: lean(tokens), keep=False)) < 0.5 * weights
    assert most_held(lambda: fold(model, lambda: model(tokens))) > 2 * weights


class ReadsAnothersWeight(nn.Module):
    """Multiplies with the weight of a linear map that it does not call."""

    def __init__(self, once):
        super().__init__()
        self.norm = TaperLayerNorm(8)
        self.map, self.once = nn.Linear(8, 8), once

    def forward(self, x):
        y = F.linear(self.norm(x), self.map.weight, self.map.bias)
        return y if self.once else y + self.map(x)


def test_a_weight_that_is_read_past_its_module_is_refused():
    torch.manual_seed(0)
    model, x = linear_phase(ReadsAnothersWeight(once=True)), torch.randn(3, 8)
    with pytest.raises(TaperlitError, match="norm changes the output"):
        fold(model, lambda: model(x), keep=False)
    fold(model, lambda: model(x))  # nothing was changed, and with copies it folds
    model = linear_phase(ReadsAnothersWeight(once=False))
    with pytest.raises(TaperlitError, match=r"norm feeds something that is not a linear map of its own \(map.weight"):
        fold(model, lambda: model(x), keep=False)


def test_what_does_not_stay_the_same_is_refused(tiny):
    model = linear_phase(tiny(["*"]))
    tokens, calls = torch.randint(300, (2, 16)), []

    def run():
        calls.append(1)
        return model(tokens) * len(calls)

    with pytest.raises(TaperlitError, match="changes the output"):
        fold(model, run, keep=False)


class Counts(nn.Module):
    """Counts its runs in a buffer, and embeds with a norm that is kept small by writing into the matrix."""

    def __init__(self, what):
        super().__init__()
        self.embed = nn.Embedding(9, 8, max_norm=0.1 if what == "embed.weight" else None)
        self.norm, self.map, self.what = TaperLayerNorm(8), nn.Linear(8, 8), what
        self.register_buffer("count", torch.zeros(()))

    def forward(self, tokens):
        if self.what == "count":
            self.count += 1
        return self.map(self.norm(self.embed(tokens)))


@pytest.mark.parametrize("what", ["count", "embed.weight"])
def test_a_run_that_writes_into_the_model_is_refused(what):
    model = linear_phase(Counts(what))
    with pytest.raises(TaperlitError, match=f"The run writes into {what}, so it needs a copy of its own"):
        fold(model, lambda: model(torch.arange(9)), keep=False)
    model = linear_phase(Counts(what))
    fold(model, lambda: model(torch.arange(9)))  # as it is advised
