import pytest
import torch

from taperlit.bench.models import folded, random_model, tapered
from taperlit.bench.peers import Unavailable, converted
from taperlit.compare import largest_difference
from taperlit.errors import TaperlitError
from taperlit.norm import TaperNorm
from taperlit.transformer import TransformerConfig

SHAPES = {
    "llama": dict(n_kv_head=2, rope_theta=500.0),
    "tied": dict(tied=True),
    "gpt2": dict(norm="layernorm", position="learned", mlp="gelu", bias=True, tied=True),
}


def config(shape):
    sizes = dict(vocab_size=200, block_size=64, n_layer=4, n_head=4, d_model=64, d_ff=96)
    return TransformerConfig(**{**sizes, **SHAPES[shape]})


@pytest.fixture(params=SHAPES)
def plain(request):
    return random_model(config(request.param))


@torch.no_grad()
def test_weights_are_the_seeds_and_their_tokens_are_neither_alike_nor_certain(plain):
    again, other = random_model(plain.config), random_model(plain.config, seed=1)
    tokens = torch.arange(60).view(1, -1)
    logits = plain(tokens)
    assert torch.equal(logits, again(tokens))
    assert not torch.equal(logits, other(tokens))
    assert 1 < logits.std() < 6
    assert len(logits.argmax(-1).unique()) > 20
    assert (logits.argmax(-1) == tokens).float().mean() < 0.3


@torch.no_grad()
def test_the_variants_stay_in_their_bounds_and_folding_changes_nothing(plain):
    explicit = tapered(plain, "all")
    whole = folded(explicit)
    assert not any(isinstance(module, TaperNorm) for module in whole.modules())
    assert sum(isinstance(module, TaperNorm) for module in explicit.modules()) == 9
    tokens = torch.randint(200, (2, 64), generator=torch.Generator().manual_seed(3))
    logits = explicit(tokens)
    assert 1 < logits.std() < 6
    assert largest_difference(logits, whole(tokens)) < 1e-5
    assert largest_difference(plain(tokens), logits) > 1e-3  # it is another function


@torch.no_grad()
def test_transformers_computes_the_same(plain):
    tokens = torch.randint(200, (2, 64), generator=torch.Generator().manual_seed(3))
    theirs = converted(plain)
    assert largest_difference(plain(tokens), theirs(tokens).logits) < 1e-5
    own = {parameter.data_ptr() for parameter in plain.parameters()}
    assert not own & {parameter.data_ptr() for parameter in theirs.parameters()}  # both are trained


def test_what_transformers_does_not_have_is_said():
    odd = random_model(TransformerConfig(vocab_size=20, block_size=8, n_layer=1, n_head=1, d_model=8, norm="layernorm"))
    with pytest.raises(Unavailable, match="no model of this shape"):
        converted(odd)


def test_a_policy_that_tapers_nothing_is_refused():
    with pytest.raises(TaperlitError, match="tapers nothing"):
        tapered(random_model(config("llama")), "none")
