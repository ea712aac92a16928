import math

import pytest

from taperlit.errors import TaperlitError
from taperlit.ranges import require_range, require_seed, require_steps


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        ({}, [-1e300, 0, 10**400], []),
        ({"least": 1}, [1, 2.5], [0, -1, 0.999]),
        ({"above": 0}, [1e-300, 3], [0, -1e-300]),
        ({"least": 0, "below": 1}, [0, 0.999], [1, -0.1]),
        ({"above": 0, "most": 1}, [1e-9, 1], [0, 1.001]),
    ],
)
def test_a_number_is_inside_or_the_option_and_its_range_are_named(bounds, inside, outside):
    for value in [*inside, None]:
        require_range("x.y", value, **bounds)
    for value in [*outside, math.nan, math.inf, -math.inf]:
        with pytest.raises(TaperlitError, match=rf"^x\.y is {value}; it must be [a-z0-9 ]+: do this\.$") as error:
            require_range("x.y", value, **bounds, mend="do this")
        words = {"least": "at least 0", "above": "above 0", "most": "at most 1", "below": "below 1"}
        for word in (words[name] for name, bound in bounds.items() if bound == int(words[name][-1])):
            assert word in str(error.value)


def test_steps_are_integers_and_fractions_of_a_run_floats():
    for value in (0, 1, 10**9, 0.0, 0.3, 1.0, None):
        require_steps("x.y", value)
    for value in (1, 10**9, 1e-9, 1.0, None):
        require_steps("x.y", value, least=1)
    for value in (-1, -0.1, 1.001, 2.0, math.nan, math.inf):
        with pytest.raises(TaperlitError, match=rf"^x\.y is {value}; it must be at least 0"):
            require_steps("x.y", value)
    for value, words in ((0, "at least 1"), (0.0, "above 0 and at most 1: a fraction of the run")):
        with pytest.raises(TaperlitError, match=rf"^x\.y is {value}; it must be {words}"):
            require_steps("x.y", value, least=1)


def test_a_seed_is_one_that_numpy_takes():
    for seed in (0, 7, 2**32 - 1, None):
        require_seed("seed", seed)
    for seed in (-1, 2**32):
        with pytest.raises(TaperlitError, match="it must be at least 0 and at most 4,294,967,295"):
            require_seed("seed", seed)
