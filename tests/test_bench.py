import time

import pytest

from taperlit.bench import compare, compare_decoding


def test_ratios_are_of_the_same_round():
    turns = []

    def work(name, seconds):
        def run():
            turns.append(name)
            time.sleep(seconds)
            return 10

        return run

    slow, fast = compare({"slow": work("a", 0.04), "fast": work("b", 0.01)}, rounds=3)
    assert turns == ["a", "b"] * 4
    assert (slow.ratio, slow.low, slow.high) == (1, 1, 1)
    assert fast.low <= fast.ratio <= fast.high
    assert fast.ratio > 1
    assert slow.rate == pytest.approx(10 / 0.04, rel=0.5)


def test_decoding_counts_every_token(tiny):
    model = tiny().eval()
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    (result,) = compare_decoding({"tiny": model}, prompt_tokens=8, new_tokens=5, batch_size=2, rounds=2)
    assert len(calls) == 3 * 5
    assert result.rate > 0
