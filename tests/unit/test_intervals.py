"""Intervals against published values and by what they must be."""

import pytest

from medsteer_core.errors import MedSteerError
from medsteer_core.intervals import newcombe


def items(both, first, second, none):
    """Two lists of outcomes over the same items, by how many have both, the first alone, the second alone, none."""
    one = [True] * (both + first) + [False] * (second + none)
    return one, [True] * both + [False] * first + [True] * second + [False] * none


@pytest.mark.parametrize(
    ("counts", "expected"),
    # Newcombe 1998, his examples of paired data, method 10
    [((36, 12, 2, 0), (0.0569, 0.3404)), ((20, 12, 2, 16), (0.0562, 0.3292))],
)
def test_the_difference_of_paired_rates_has_the_published_interval(counts, expected):
    assert newcombe(*items(*counts)) == pytest.approx(expected, abs=5e-4)


def test_it_turns_with_its_arguments_and_has_a_width_where_nothing_differs():
    first, second = items(30, 7, 2, 11)
    low, high = newcombe(first, second)
    assert newcombe(second, first) == pytest.approx((-high, -low))
    low, high = newcombe([True] * 200, [True] * 200)
    assert low == -high and 0.01 < high < 0.03
    assert newcombe([], []) == (-1.0, 1.0)
    with pytest.raises(MedSteerError, match="1 and 2 items"):
        newcombe([True], [True, False])
