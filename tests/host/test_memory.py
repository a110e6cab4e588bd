"""What runs leave behind in a server: nothing. The small form of `dev.py bench memory`."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.trust._memory_runs import KINDS, PERIOD, CycleOfRuns, common, extraction, plain
from benchmarks.trust.memory import run_cycles
from medsteer_core.run.workflow import WorkflowFailed, WorkflowInterrupted

LIVING = ("patchers", "medsteer", "modules", "tensors")


@pytest.fixture(scope="module")
def readings(probed):
    return run_cycles(probed, 2 * PERIOD)


def test_no_hook_is_left_after_any_kind_of_run(readings):
    assert [row["kind"] for row in readings] == 4 * list(KINDS)
    assert {row["hooks"] for row in readings} == {0}


@pytest.mark.parametrize("what", LIVING)
def test_the_same_run_leaves_as_many_objects_the_second_time(readings, what):
    before, after = readings[:PERIOD], readings[PERIOD:]
    assert [row[what] for row in after] == [row[what] for row in before]
    assert all(row[what] > 0 for row in readings)  # the probe sees them


def test_the_probe_sees_a_model_that_is_kept(probed):
    """One run in which the model has one more clone: a count that could not grow would show nothing."""
    probed.client.run({**common(), **plain(seed=1)})
    without = probed.counts()
    kept = {
        "50": {"class_type": "MedSteerProbe_Model", "inputs": {"model": ["1", 0]}},
        "10": {**plain(seed=2)["10"], "inputs": {**plain(seed=2)["10"]["inputs"], "model": ["50", 0]}},
    }
    probed.client.run({**common(), **plain(seed=2), **kept})
    assert probed.counts()["patchers"] == without["patchers"] + 1


def cancelled_in(probed, workflow, call: int) -> int:
    """Cancel while model call number ``call`` runs; how many calls there were."""
    probed.watch_calls(hold_at=call)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(probed.client.run, workflow)
        while probed.calls()["count"] < call:
            assert not running.done(), running.result()
            time.sleep(0.01)
        probed.client.interrupt()
        with pytest.raises(WorkflowInterrupted):
            running.result()
    assert probed.calls()["cancelled"], "the call was over before the cancel came"
    return probed.calls()["count"]


@pytest.mark.parametrize("call", [1, 4, 9])
@pytest.mark.parametrize("noise", ["same state", "paired"])
def test_a_cancel_ends_an_extraction_within_one_model_call(probed, noise, call):
    workflow = {**common(), **extraction(seed=7000 + call, samples=4, steps=6, noise=noise, probed=True)}
    assert cancelled_in(probed, workflow, call) <= call + 1


@pytest.mark.parametrize("call", [1, 4, 9])  # in the run for the lock's mask, and in the pair's own
def test_a_cancel_ends_the_counterfactual_sampler_within_one_model_call(probed, call):
    workflow = {**common(), **CycleOfRuns(probed).pair(seed=7100 + call, steps=6, probed=True)}
    assert cancelled_in(probed, workflow, call) <= call + 1


def test_a_server_goes_on_after_an_error_in_the_middle_of_a_steered_call(probed):
    probed.watch_calls(raise_at=3)
    pair = {**common(), **CycleOfRuns(probed).pair(seed=7200, probed=True)}
    with pytest.raises(WorkflowFailed, match="the probe fails in model call 3"):
        probed.client.run(pair)
    assert probed.counts()["hooks"] == 0
    probed.watch_calls()
    assert len(probed.client.run(pair).images("Image")) == 1
