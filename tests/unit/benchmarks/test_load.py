"""The load benchmark: what it queues, what it counts, what it calls a problem."""

import re

import pytest

from benchmarks.speed import _load_clients, load
from benchmarks.speed._load_clients import FINISHED, LOST, REMOVED, STOPPED, Job
from medsteer_core.run.demo import WORKFLOW
from medsteer_core.run.overrides import read_workflow


def test_the_small_example_is_a_whole_workflow_with_few_steps():
    nodes = load.small(read_workflow(WORKFLOW), 4)
    kinds = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert kinds["MedSteer_CounterfactualSampler"]["steps"] == 4
    assert (
        kinds["MedSteer_ExtractPathologyVector"] | {"samples": 2, "steps": 4}
        == (kinds["MedSteer_ExtractPathologyVector"])
    )
    links = [v[0] for node in nodes.values() for v in node["inputs"].values() if isinstance(v, list)]
    assert set(links) <= set(nodes)
    assert sorted(n["_meta"]["title"] for n in nodes.values() if n["class_type"] == "SaveImage") == sorted(load.IMAGES)


def test_cancels_are_drawn_by_the_seed_for_half_while_they_run():
    def drawn(seed):
        return [job.cancel for job in _load_clients.with_cancels([{}] * 50, 0.24, 10.0, seed)]

    assert drawn(3) == drawn(3) != drawn(4)
    chosen = [cancel for cancel in drawn(3) if cancel is not None]
    assert len(chosen) == 12 and sum(isinstance(cancel, int) for cancel in chosen) == 6
    assert all(0 <= cancel <= (10 if isinstance(cancel, float) else _load_clients.MESSAGES) for cancel in chosen)


def test_quantiles_are_the_nearest_ranks():
    found = _load_clients.quantiles([i / 1000 for i in range(1, 201)])
    assert found == {"requests": 200, "median_ms": 100.0, "p99_ms": 198.0, "worst_ms": 200.0}
    assert _load_clients.quantiles([0.5])["p99_ms"] == 500.0 and _load_clients.quantiles([])["worst_ms"] is None


def jobs():
    fates = {FINISHED: False, STOPPED: True, REMOVED: True}
    return [Job(i, {}, fate=fate, cancelled=asked) for i, (fate, asked) in enumerate(fates.items())]


def counted(of):
    clean = {"foreign_messages": 0, "differing": [], "latency": {"failed": 0}}
    return load.fates(of) | clean


def test_prompts_that_finished_or_were_cancelled_are_no_problem():
    assert load.problems(counted(jobs()), ["", ""]) == []


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"lost": 1}, "1 prompts neither finished"),
        ({"failed": 2}, "2 prompts failed"),
        ({"differing": [3]}, r"prompts \[3\] gave other images"),
        ({"latency": {"failed": 4}}, "4 requests unanswered"),
        ({"foreign_messages": 5}, "5 messages reached"),
    ],
)
def test_everything_else_is_one(wrong, said):
    (problem,) = load.problems(counted(jobs()) | wrong, [])
    assert re.search(said, problem)


def test_a_prompt_that_vanished_unasked_is_lost_and_a_cancel_unasked_is_counted():
    assert load.fates([*jobs(), Job(9, {})])["lost"] == 1 and Job(9, {}).fate == LOST
    assert load.fates([Job(1, {}, fate=STOPPED)])["cancelled_unasked"] == 1


def test_a_client_that_gave_up_is_a_problem():
    assert load.problems(counted(jobs()), ["", "OSError: gone"]) == ["a client gave up: OSError: gone"]
