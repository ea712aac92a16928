import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taperlit.errors import TaperlitError
from taperlit.schedule import gate_at, resolve_steps, warmup_cosine


@given(warmup=st.integers(0, 500), length=st.integers(1, 500), shape=st.sampled_from(["cosine", "linear"]))
def test_gate_falls_from_one_to_zero(warmup, length, shape):
    end = warmup + length
    gates = [gate_at(step, warmup, end, shape) for step in range(1, end + 10)]
    assert all(g == 1.0 for g in gates[:warmup])
    assert all(g == 0.0 for g in gates[end - 1 :])
    assert all(a >= b for a, b in itertools.pairwise(gates))
    assert all(0 < g < 1 for g in gates[warmup : end - 1])
    middle = [g + h for g, h in zip(gates[warmup : end - 1], gates[warmup : end - 1][::-1], strict=True)]
    assert all(total == pytest.approx(1.0) for total in middle)  # both shapes are odd about their middle


def test_gate_is_the_papers_cosine():
    assert gate_at(125, 100, 200) == pytest.approx((1 + math.cos(math.pi * 25 / 100)) / 2)
    assert gate_at(125, 100, 200, "linear") == 0.75


@pytest.mark.parametrize(
    ("value", "total", "steps"), [(0.05, 1000, 50), (7, 1000, 7), (7, -1, 7), (1.0, 10, 10), (0, 5, 0)]
)
def test_resolve_steps(value, total, steps):
    assert resolve_steps(value, total, "x") == steps


@pytest.mark.parametrize(
    ("value", "total", "message"),
    [(1.5, 10, "at most 1"), (0.5, -1, "set trainer.max_steps"), (-1, 10, "at least 0"), (11, 10, "longer than")],
)
def test_resolve_steps_refuses(value, total, message):
    with pytest.raises(TaperlitError, match=f"gate.end.*{message}"):
        resolve_steps(value, total, "gate.end")


def test_learning_rate_warms_up_linearly_and_ends_at_its_floor():
    factors = [warmup_cosine(step, 10, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert factors[10] == 1.0
    assert factors[100] == pytest.approx(0.1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([parameter], lr=1.0), T_max=90, eta_min=0.1)
    for step in range(10, 100):
        assert factors[step] == pytest.approx(cosine.get_last_lr()[0])
        cosine.optimizer.step()
        cosine.step()
    assert warmup_cosine(0, 0, 10, 0.1) == 1.0


def test_learning_rate_stays_at_its_peak_until_the_decay_starts():
    factors = [warmup_cosine(step, 10, 100, 0.1, 60) for step in range(101)]
    assert factors[:10] == [warmup_cosine(step, 10, 100, 0.1) for step in range(10)]
    assert factors[10:61] == [1.0] * 51
    assert factors[60:] == [warmup_cosine(step, 0, 40, 0.1) for step in range(41)]
    within_the_warmup = [warmup_cosine(step, 10, 100, 0.1, 5) for step in range(101)]
    assert within_the_warmup == [warmup_cosine(step, 10, 100, 0.1) for step in range(101)]
    assert warmup_cosine(100, 10, 100, 0.1, 100) == 1.0
