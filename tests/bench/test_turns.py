import time

import pytest
import torch

from taperlit.bench.turns import ratios, seconds, take_turns


def test_alternatives_take_turns_and_the_first_ones_are_not_kept():
    turns = []

    def work(name):
        def run():
            turns.append(name)
            return len(turns)

        return run

    taken = take_turns({"a": work("a"), "b": work("b")}, rounds=12, warmup=1)
    rounds = [turns[i : i + 2] for i in range(0, 26, 2)]
    assert all(sorted(both) == ["a", "b"] for both in rounds)
    assert 1 < sum(both == ["a", "b"] for both in rounds) < 12  # neither always follows the other
    assert [*taken] == ["a", "b"]
    assert sorted(taken["a"] + taken["b"]) == [*range(3, 27)]
    assert all(turns[i - 1] == name for name, places in taken.items() for i in places)


def test_seconds_are_those_of_the_work():
    assert seconds(lambda: time.sleep(0.03), torch.device("cpu")) >= 0.03


def test_a_machine_that_slows_down_does_not_change_the_ratio():
    speed = iter([1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.1, 0.1])
    taken = take_turns({"first": lambda: 3 * next(speed), "second": lambda: 6 * next(speed)}, rounds=3)
    assert taken == {"first": [3.0, 1.5, pytest.approx(0.3)], "second": [6.0, 3.0, pytest.approx(0.6)]}
    spread = ratios(taken["second"], taken["first"])
    assert (spread.median, spread.low, spread.high) == (2, 2, 2)
