import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from taperlit.decode.sampling import Sampling, probabilities, sample
from taperlit.errors import TaperlitError

GREEDY = Sampling(temperature=0)
EVERYTHING = Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3)


def transformers_probabilities(logits, tokens, sampling):
    """What transformers' own processors leave, in the order in which its ``generate`` applies them."""
    processors = [RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))]
    processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        processors.append(MinPLogitsWarper(sampling.min_p))
    scores = logits.float()
    for processor in processors:
        scores = processor(tokens, scores)
    return scores.softmax(-1)


def seen_of(tokens, vocab_size):
    return torch.zeros(len(tokens), vocab_size, dtype=torch.bool).scatter(1, tokens, True)


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0, 1),
    repetition_penalty=st.just(1.0) | st.floats(0.5, 2),
)


@settings(max_examples=150, deadline=None)
@given(
    sampling=samplings,
    rows=st.integers(1, 4),
    vocab_size=st.integers(1, 50),
    spread=st.sampled_from([0.1, 3, 30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),  # the last two give ties
    seed=st.integers(0, 2**32),
)
def test_filters_leave_what_those_of_transformers_leave(sampling, rows, vocab_size, spread, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, vocab_size, generator=generator)).to(dtype)
    tokens = torch.randint(vocab_size, (rows, 5), generator=generator)
    ours = probabilities(logits, sampling, seen_of(tokens, vocab_size))
    theirs = transformers_probabilities(logits, tokens, sampling)
    assert ours.dtype == torch.float32
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs)
    drawn = sample(logits, sampling, generator, seen_of(tokens, vocab_size))
    assert drawn.dtype == torch.int64
    assert drawn.shape == (rows,)
    assert (theirs.gather(1, drawn[:, None]) > 0).all()


@pytest.mark.parametrize("sampling", [Sampling(), EVERYTHING])
def test_draws_are_as_frequent_as_they_are_likely(sampling):
    n, vocab_size = 200_000, 40
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(1))
    seen = seen_of(torch.arange(0, vocab_size, 3)[None], vocab_size)
    expected = n * probabilities(logits.double(), sampling, seen)[0].double()
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(n, -1), sampling, generator, seen.expand(n, -1)).bincount(minlength=vocab_size)
    possible = expected > 0
    assert drawn[~possible].sum() == 0
    assert possible.sum() > 5
    statistic = ((drawn - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    chance = torch.special.gammaincc(freedom / 2, statistic / 2)  # of a larger one, were the draws right
    assert 0.001 < chance < 0.999


def test_temperature_zero_takes_the_likeliest_after_the_penalty():
    logits = torch.tensor([[1.0, 3.0, 2.0], [-1.0, -3.0, -2.0]])
    assert sample(logits, GREEDY).tolist() == [1, 0]
    seen = torch.tensor([[False, True, False], [True, False, False]])
    assert sample(logits, Sampling(temperature=0, repetition_penalty=4.0), seen=seen).tolist() == [2, 2]
    with pytest.raises(TaperlitError, match="needs `seen`"):
        sample(logits, Sampling(temperature=0, repetition_penalty=4.0))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=2), EVERYTHING])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_no_token(sampling, bad):
    logits = torch.randn(4, 30)
    logits[1, 7] = bad
    logits[2] = -math.inf
    logits[3, 1:] = -math.inf  # a token that is left out is no fault
    drawn = sample(logits, sampling, torch.Generator().manual_seed(0), torch.zeros(4, 30, dtype=torch.bool))
    assert drawn[1:].tolist() == [-1, -1, 0]
    assert drawn[0] >= 0


def test_the_noise_at_its_ends_still_draws_what_is_possible(monkeypatch):
    logits = torch.tensor([[-math.inf, 0.0, -60.0]])
    for uniform in (0.0, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda shape, uniform=uniform, **_: torch.full(shape, uniform))
        assert sample(logits, Sampling()).tolist() == [1]
        assert sample(logits, Sampling(top_k=1)).tolist() == [1]


def test_the_same_seed_draws_the_same():
    logits = torch.randn(3, 100)
    runs = [
        [sample(logits, Sampling(), generator).tolist() for _ in range(5)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (3, 3, 4))
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len(set(map(tuple, runs[0]))) > 1


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), EVERYTHING])
def test_no_operation_asks_for_a_value(sampling):
    with FakeTensorMode():  # tensors without values: asking for one raises
        logits, seen = torch.empty(3, 50, dtype=torch.bfloat16), torch.empty(3, 50, dtype=torch.bool)
        assert sample(logits, sampling, seen=seen).shape == (3,)


def test_it_can_be_traced_as_one_graph():
    traced = torch.compile(sample, fullgraph=True, backend="eager")
    logits, seen = torch.randn(3, 50), torch.zeros(3, 50, dtype=torch.bool)
    torch.manual_seed(5)
    drawn = traced(logits, EVERYTHING, None, seen)
    torch.manual_seed(5)
    assert torch.equal(drawn, sample(logits, EVERYTHING, None, seen))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-1, math.nan, math.inf, 1e-9]),
        ("top_k", [0, -3, 2.5]),
        ("top_p", [0.0, 1.5, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0, -1.0, math.nan, math.inf]),
    ],
)
def test_nonsense_is_refused_by_name(field, values):
    for value in values:
        with pytest.raises(TaperlitError, match=rf"^{field} is .*; give .*\.$"):
            Sampling(**{field: value})
