import pytest
import torch

from taperlit.errors import TaperlitError
from taperlit.norm import plain_name, tapered_norms
from taperlit.training.module import LanguageModel
from taperlit.training.policy import apply_policy
from taperlit.transformer import Transformer, TransformerConfig

SHAPE = dict(vocab_size=100, block_size=16, n_layer=2, n_head=2, d_model=16, d_ff=32)
BLOCKS = {f"blocks.{i}.{norm}" for i in range(2) for norm in ("attn_norm", "mlp_norm")}
TAPERED = {
    "none": set(),
    "attention": {name for name in BLOCKS if "attn" in name},
    "internal": BLOCKS,
    "all": BLOCKS | {"final_norm"},
}


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("policy", TAPERED)
def test_a_policy_tapers_the_norms_of_its_name(policy, norm):
    module = LanguageModel("small_1m", policy, {**SHAPE, "norm": norm})
    module.configure_model()
    assert {name.removeprefix("model.") for name in tapered_norms(module)} == TAPERED[policy]
    gates = {id(norm.gate) for norm in tapered_norms(module).values()}
    assert len(gates) == (0 if policy == "none" else 1)


@pytest.mark.parametrize("policy", TAPERED)
def test_a_model_computes_and_counts_what_the_plain_one_does(policy):
    torch.manual_seed(0)
    plain = Transformer(TransformerConfig(**SHAPE))
    torch.manual_seed(0)
    module = LanguageModel("small_1m", policy, {**SHAPE, "tied": False})
    module.configure_model()
    assert module.model.num_parameters() == plain.num_parameters() == sum(p.numel() for p in plain.parameters())
    tokens = torch.randint(100, (2, 8))
    assert torch.equal(module(tokens), plain(tokens))
    weights = {plain_name(name): value for name, value in module.model.named_parameters()}
    for name, value in plain.named_parameters():
        assert torch.equal(weights[name], value), name


def test_an_unknown_policy_is_refused():
    for make in (lambda: LanguageModel("small_1m", "some"), lambda: apply_policy(None, "some")):
        with pytest.raises(TaperlitError, match=r"model\.taper is 'some'; choose none, attention, internal, all"):
            make()
