"""The search for the least strength that does it: what is tried, in which order, and when it ends."""

import pytest

from medsteer_core.steering.least_strength import Found, next_multiple


def search(does, most=2.0, passes=50):
    tried = []
    while len(tried) < passes and (multiple := next_multiple(tried, most)) is not None:
        tried.append((multiple, does(multiple)))
    return Found(tuple(tried))


def test_it_begins_at_the_users_own_strength_and_halves():
    assert [multiple for multiple, _ in search(lambda m: m >= 0.3, passes=5).tried] == [1.0, 0.5, 0.25, 0.375, 0.3125]


def test_while_too_weak_it_grows_up_to_the_most():
    assert [multiple for multiple, _ in search(lambda m: m >= 1.7, passes=4).tried] == [1.0, 1.5, 2.0, 1.75]
    assert [multiple for multiple, _ in search(lambda m: False).tried] == [1.0, 1.5, 2.0, 0.5, 0.25, 0.125]
    assert [multiple for multiple, _ in search(lambda m: False, most=0.5).tried] == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("needed", [0.01, 0.2, 0.77, 1.0, 1.26, 1.99])
def test_it_comes_within_five_hundredths_of_the_least(needed):
    found = search(lambda m: m >= needed)
    assert needed <= found.least <= needed / 0.95 + 0.001
    assert found.strongest_too_weak < needed


def test_too_much_is_not_taken_for_too_little():
    found = search(lambda m: 0.4 <= m <= 0.9)  # at 1 it overshoots
    assert [multiple for multiple, _ in found.tried[:4]] == [1.0, 1.5, 2.0, 0.5]
    assert 0.4 <= found.least <= 0.42
    assert Found(((1.0, False), (0.5, True), (0.25, False))).strongest_too_weak == 0.25


def test_none_that_does_it_is_told():
    assert search(lambda m: False).least is None and Found(()).least is None
