import json

import pytest
import torch
from torch import nn

from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.norm import shared_gate, tapered_norms
from taperlit.structure import apply_structure, describe
from taperlit.surgery import taper


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.linear = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 6, bias=False)
        self.again = self.norm  # a second name
        self.final, self.head = nn.LayerNorm(6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = self.embed(tokens)
        return self.head(self.final(h + self.linear(self.again(h))))


@pytest.mark.parametrize("tied", ["untie", "scale"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_record_as_json_makes_a_fresh_model_the_folded_one(tied, device):
    torch.manual_seed(0)
    model, tokens = Model(), torch.arange(9)[None]
    taper(model)
    with torch.no_grad():
        for norm in tapered_norms(model).values():
            norm.alignment.fill_(0.7)
            norm.taper_bias.normal_()
    shared_gate(model).set(0.0)
    before = model(tokens)
    hooked = []
    model.norm.register_forward_hook(lambda *_: hooked.append(1))
    structure = fold(model, lambda: model(tokens), tied=tied)
    assert model.norm is model.again
    assert type(model.norm) is nn.Identity
    assert structure["biases"].keys() == ({"linear.bias", "head.bias"} if tied == "untie" else {"linear.bias"})
    assert structure["untied"] == (["head.weight"] if tied == "untie" else [])
    assert describe(structure)[0] == "norm -> linear.weight"
    hooked.clear()
    torch.testing.assert_close(model(tokens), before, rtol=1e-5, atol=1e-5)
    assert hooked  # a hook on the norm is a hook on what stands in its place
    with torch.device(device):
        fresh = apply_structure(Model(), json.loads(json.dumps(structure)))
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(fresh.eval()(tokens), model.eval()(tokens))
    assert fresh.norm is fresh.again


def test_a_record_of_another_model_is_refused():
    structure = {"identities": {"blocks.0.norm": []}, "scales": {}, "biases": {}, "untied": [], "difference": 0.0}
    with pytest.raises(TaperlitError, match=r"does not fit Model: it has no module 'blocks\.0\.norm'"):
        apply_structure(Model(), structure)
    model = Model()
    model.head.bias = nn.Parameter(torch.zeros(9))
    with pytest.raises(TaperlitError, match=r"head\.bias exists already"):
        apply_structure(model, structure | {"identities": {}, "biases": {"head.bias": [9]}})
