"""How the benchmarks of memory, imports and determinism count; the servers are in tests/host."""

import numpy as np
import pytest

from benchmarks.speed import imports
from benchmarks.trust import determinism, memory
from benchmarks.trust._memory_runs import KINDS, PERIOD
from benchmarks.trust._slope import slope_of

NOISE = np.random.default_rng(1).normal(size=200)
LEVELS = np.tile(np.arange(PERIOD) * 1000.0, 20)  # every kind of run has a level of its own


def test_a_slope_is_found_under_levels_that_take_turns():
    assert slope_of(LEVELS + 7.0 * np.arange(200), PERIOD).value == pytest.approx(7.0)
    flat = slope_of(LEVELS, PERIOD)
    assert (flat.value, flat.low, flat.high) == pytest.approx((0, 0, 0))


def test_the_interval_holds_the_slope_and_grows_with_the_noise():
    found = {scale: slope_of(LEVELS + 3.0 * np.arange(200) + scale * NOISE, PERIOD) for scale in (1, 10)}
    assert all(slope.low < 3.0 < slope.high for slope in found.values())
    assert found[10].high - found[10].low > 5 * (found[1].high - found[1].low)


def test_the_interval_allows_for_neighbours_that_are_alike():
    """A random walk without a slope: ordinary intervals would call its drift certain."""
    within = 0
    for seed in range(40):
        walk = np.cumsum(np.random.default_rng(seed).normal(size=200))
        slope = slope_of(walk, PERIOD, block=4)
        residuals = walk - np.polyval(np.polyfit(np.arange(200), walk, 1), np.arange(200))
        ordinary = 1.96 * residuals.std() / (np.arange(200).std() * np.sqrt(200))
        assert slope.high - slope.low > 2 * ordinary
        within += slope.low < 0 < slope.high
    assert within >= 15


def test_too_few_runs_for_an_interval_are_refused():
    with pytest.raises(ValueError, match="30 runs are 3 cycles of 10; at least 4 are wanted"):
        slope_of([0.0] * 30, PERIOD)


def readings(**growing):
    row = {**dict.fromkeys(memory.RESIDENT, 10**9), **dict.fromkeys(memory.COUNTED, 10), "hooks": 0}
    return [{**row, **{name: row[name] + step * i for name, step in growing.items()}} for i in range(60)]


def test_what_stays_is_flat_and_what_grows_is_not():
    still = {name: row["flat"] for name, row in memory.growths(readings()).items()}
    assert still.pop("resident_before_trim") is None and all(still.values()) and len(still) == 7
    for name, step, flat in [("resident", 49_000, True), ("resident", 51_000, False), ("patchers", 1, False)]:
        assert memory.growths(readings(**{name: step}))[name]["flat"] is flat, (name, step)


def test_a_single_hook_that_is_left_once_is_not_flat():
    rows = readings()
    rows[30]["hooks"] = 1
    assert not memory.growths(rows)["hooks"]["flat"]


def test_the_memory_benchmark_refuses_fewer_runs_than_its_interval_needs(capsys):
    with pytest.raises(SystemExit):
        memory.main(["--runs", str(4 * PERIOD - 1)])
    assert f"--runs wants {4 * PERIOD} or more" in capsys.readouterr().err
    assert PERIOD == 2 * len(KINDS)


@pytest.mark.parametrize("n, left", [(10, 1), (12, 2), (15, 3), (20, 5)])
def test_the_median_of_differences_has_the_sign_tests_interval(n, left):
    assert imports.outside(n) == left
    row = imports.difference([float(i) for i in range(n)], [0.0] * n)
    assert row["interval"] == [left, n - 1 - left] and row["difference"] == (n - 1) / 2


def test_the_same_files_are_the_same_and_others_are_named():
    run = {"Factual, image 0": "aa", "vector v": "bb"}
    assert determinism.compared([[run, run], [run]])["identical"]
    for other in ({**run, "vector v": "cc"}, {"Factual, image 0": "aa"}):
        found = determinism.compared([[run, run], [other]])
        assert not found["identical"] and found["differing"] == ["vector v"] and found["runs_by_server"] == [2, 1]


def test_runs_are_spread_over_all_servers():
    assert [determinism.share(20, 3, place) for place in range(3)] == [7, 7, 6]


def test_only_nodes_that_were_served_count_as_cached():
    messages = [["execution_start", {}], ["execution_cached", {"nodes": ["6"]}], ["execution_success", {}]]
    assert determinism.cached_nodes({"status": {"messages": messages}}) == ["6"]
