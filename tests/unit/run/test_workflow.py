"""What a server says about a workflow, turned into progress and errors."""

import pytest

from medsteer_core.run.workflow import (
    RunState,
    WorkflowError,
    WorkflowFailed,
    WorkflowInterrupted,
    node_title,
    raise_for_status,
    refusal_text,
)

WORKFLOW = {
    "1": {"class_type": "Load", "inputs": {}, "_meta": {"title": "Load it"}},
    "2": {"class_type": "Sample", "inputs": {}},
    "3": {"class_type": "Save", "inputs": {}},
    "4": {"class_type": "Show", "inputs": {}},
}


def node(node_id, state, value=0, maximum=1, **more):
    return {node_id: {"node_id": node_id, "state": state, "value": value, "max": maximum, **more}}


def state(**nodes_or_data):
    return {"type": "progress_state", "data": {"prompt_id": "p", **nodes_or_data}}


def test_a_title_is_the_authors_else_the_class_else_the_id():
    assert [node_title(WORKFLOW, i) for i in ("1", "2", "99")] == ["Load it", "Sample", "99"]


def test_a_running_node_counts_by_its_share_and_finished_ones_whole():
    run = RunState("p", WORKFLOW)
    assert run.hear(state(nodes=node("1", "finished", 1, 1) | node("2", "running", 5, 20)))
    progress = run.progress()
    assert progress.fraction == pytest.approx((1 + 5 / 20) / 4)
    assert (progress.title, progress.value, progress.maximum) == ("Sample", 5, 20)


def test_cached_nodes_count_as_done():
    run = RunState("p", WORKFLOW)
    run.hear({"type": "execution_cached", "data": {"prompt_id": "p", "nodes": ["1", "2"]}})
    assert run.progress().fraction == 0.5


def test_a_run_is_finished_when_no_node_executes_any_more():
    run = RunState("p", WORKFLOW)
    run.hear({"type": "executing", "data": {"prompt_id": "p", "node": "1"}})
    run.hear({"type": "execution_success", "data": {"prompt_id": "p"}})
    assert not run.finished  # the history is not written yet
    run.hear({"type": "executing", "data": {"prompt_id": "p", "node": None}})
    assert run.finished and run.progress().fraction == 1.0


def test_another_prompts_messages_are_not_ours():
    run = RunState("p", WORKFLOW)
    assert not run.hear({"type": "executing", "data": {"prompt_id": "other", "node": None}})
    assert not run.hear({"type": "status", "data": {"status": {}}})
    assert not run.finished and run.progress().fraction == 0.0


def test_nodes_that_another_expanded_into_count_for_the_one_that_is_shown():
    run = RunState("p", WORKFLOW)
    run.hear(state(nodes=node("2.0.1", "running", 3, 4, display_node_id="2")))
    assert run.progress().title == "Sample"


def test_seconds_are_told_by_title_and_only_for_nodes_that_ran():
    run = RunState("p", WORKFLOW)
    run.hear({"type": "execution_cached", "data": {"prompt_id": "p", "nodes": ["3"]}})
    run.hear(state(nodes=node("1", "running")))
    run.hear(state(nodes=node("1", "finished", 1) | node("2", "running")))
    seconds = run.node_seconds()
    assert list(seconds) == ["Load it"] and 0 <= seconds["Load it"] < 5


def test_a_refusal_names_every_node_and_input():
    wrong = {"message": "Value -5 smaller than min", "details": "width", "extra_info": {"input_name": "width"}}
    answer = {
        "error": {"message": "Prompt outputs failed"},
        "node_errors": {"1": {"errors": [wrong]}, "2": {"errors": [wrong]}},
    }
    assert refusal_text(answer, WORKFLOW).splitlines() == [
        "ComfyUI refused the workflow:",
        "  node Load it (id 1), input width: Value -5 smaller than min (width)",
        "  node Sample (id 2), input width: Value -5 smaller than min (width)",
    ]


def test_a_refusal_without_nodes_gives_the_servers_own_words():
    assert refusal_text({"error": {"message": "Prompt has no outputs", "details": ""}}, {}).endswith(
        "Prompt has no outputs"
    )
    assert refusal_text({"error": "<html>"}, {}).endswith("<html>")


def test_a_success_raises_nothing():
    raise_for_status({"status_str": "success", "messages": [["execution_start", {}]]}, WORKFLOW)


def test_an_error_names_the_node_and_keeps_the_traceback_apart():
    data = {"node_id": "2", "exception_type": "ValueError", "exception_message": "width 3\n", "traceback": ["a\n", "b"]}
    with pytest.raises(WorkflowFailed) as caught:
        raise_for_status({"status_str": "error", "messages": [["execution_error", data]]}, WORKFLOW)
    assert str(caught.value) == "node Sample: ValueError: width 3"
    assert caught.value.traceback == "a\nb"


def test_an_interruption_is_its_own_kind_of_error():
    with pytest.raises(WorkflowInterrupted, match="Load it"):
        raise_for_status({"status_str": "error", "messages": [["execution_interrupted", {"node_id": "1"}]]}, WORKFLOW)


def test_a_failure_without_a_reason_is_still_an_error():
    with pytest.raises(WorkflowError, match="'error'"):
        raise_for_status({"status_str": "error", "messages": []}, WORKFLOW)


def test_what_a_node_says_of_all_its_inputs_stands_once():
    def said(name, text="wrong class"):
        return {"type": "custom_validation_failed", "message": "Custom validation failed for node",
                "details": f"{name} - {text}", "extra_info": {"input_name": name}}  # fmt: skip

    errors = [said("judge"), said("folder"), said("split", "another")]
    answer = {"node_errors": {"3": {"errors": errors}}, "error": {}}
    workflow = {"3": {"class_type": "Save", "inputs": {}}}
    assert refusal_text(answer, workflow).splitlines()[1:] == [
        "  node Save (id 3): wrong class",
        "  node Save (id 3), input split: Custom validation failed for node (split - another)",
    ]
