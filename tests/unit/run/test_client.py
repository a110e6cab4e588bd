"""The client against a small server in this process that speaks ComfyUI's protocol."""

import asyncio
import threading
import time
import uuid

import pytest

from medsteer_core.errors import MedSteerError
from medsteer_core.run.client import ComfyClient
from medsteer_core.run.workflow import (
    PromptLost,
    ServerRefused,
    ServerUnreachable,
    WorkflowError,
    WorkflowFailed,
    WorkflowRefused,
)

WORKFLOW = {"7": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}, "_meta": {"title": "Saved"}}}
GREEN = (10, 200, 30)


def test_a_run_returns_the_pixels_of_the_titled_node(fake):
    heard = []
    result = ComfyClient(fake.address).run(WORKFLOW, heard.append)
    assert (result.pixels("Saved") == GREEN).all() and result.pixels("Saved").shape == (1, 3, 4, 3)
    assert result.images("SaveImage") == result.images("Saved")
    assert heard[-1].fraction == 1.0 and fake.calls == [("prompt", WORKFLOW)]


def test_every_file_of_the_outputs_is_listed_once(fake):
    image, clip = {"filename": "a.png", "subfolder": "s", "type": "output"}, {"filename": "b.mp4", "type": "temp"}
    fake.entry["outputs"] = {
        "7": {"images": [image, image], "text": ["words"], "animated": [True]},
        "8": {"gifs": [{**clip, "format": "video/mp4"}], "number": 3, "more": [{"filename": 5}]},
    }
    files = ComfyClient(fake.address).run(WORKFLOW).files()
    assert files == [image, {"filename": "b.mp4", "subfolder": "", "type": "temp"}]


def test_a_title_without_output_is_answered_with_those_that_have_one(fake):
    with pytest.raises(KeyError, match="no node titled 'Nothing'.*Saved"):
        ComfyClient(fake.address).run(WORKFLOW).output("Nothing")


def test_a_refused_workflow_raises_with_the_servers_reason(fake):
    fake.status, fake.answer = 400, {"error": {"message": "Prompt has no outputs"}, "node_errors": {}}
    with pytest.raises(WorkflowRefused, match="Prompt has no outputs"):
        ComfyClient(fake.address).run(WORKFLOW)
    assert len(fake.calls) == 1  # what is wrong stays wrong: not asked again


def test_a_partly_refused_workflow_is_taken_back_from_the_queue(fake):
    wrong = {"message": "bad", "extra_info": {"input_name": "images"}}
    fake.answer = {"node_errors": {"7": {"errors": [wrong]}}}
    with pytest.raises(WorkflowRefused, match="node Saved .*input images: bad"):
        ComfyClient(fake.address).queue(WORKFLOW)
    assert fake.cancelled() == [fake.queued[0][1]]


def test_a_node_error_in_the_history_is_raised(fake):
    error = {"node_id": "7", "exception_type": "ValueError", "exception_message": "no", "traceback": []}
    fake.entry = {"status": {"status_str": "error", "messages": [["execution_error", error]]}, "outputs": {}}
    with pytest.raises(WorkflowFailed, match="node Saved: ValueError: no"):
        ComfyClient(fake.address).run(WORKFLOW)


def test_a_run_past_its_time_is_cancelled_on_the_server_and_no_other(fake):
    fake.script, fake.entry, begun = [], None, time.monotonic()
    with pytest.raises(WorkflowError, match="not finished after 0 s"):
        ComfyClient(fake.address).run(WORKFLOW, time_limit=0.3)
    assert fake.cancelled() == [fake.queued[0][1]] and time.monotonic() - begun < 5
    assert not [call for call in fake.calls if call[0] == "interrupt"]


def test_an_interrupted_caller_cancels_its_prompt(fake):
    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ComfyClient(fake.address).run(WORKFLOW, stop)
    assert fake.cancelled() == [fake.queued[0][1]]


def test_a_websocket_that_closes_in_the_middle_costs_only_progress(fake):
    fake.script = [("close", {})]
    assert (ComfyClient(fake.address).run(WORKFLOW, time_limit=10).pixels("Saved") == GREEN).all()


def test_without_a_websocket_the_end_is_heard_from_the_queue(fake):
    fake.failing["/ws"] = [503] * 1000
    assert ComfyClient(fake.address).run(WORKFLOW, time_limit=10).output("Saved")


def test_a_websocket_is_connected_again_under_its_name_and_heard(fake):
    fake.script, entry, heard = [("close", {})], fake.entry, []
    fake.entry = None

    def go_on():
        end = time.monotonic() + 5
        while not (fake.queued and any(not socket.closed for socket in fake.sockets.values())):
            assert time.monotonic() < end
            time.sleep(0.01)
        (socket,) = fake.sockets.values()
        state = {"nodes": {"7": {"node_id": "7", "state": "running", "value": 2, "max": 4}}}
        message = {"type": "progress_state", "data": {"prompt_id": fake.queued[0][1], **state}}
        asyncio.run_coroutine_threadsafe(socket.send_json(message), fake.loop).result(5)
        fake.entry = entry

    # Later than the queueing has closed the first connection.
    timer = threading.Timer(0.3, go_on)
    timer.start()
    ComfyClient(fake.address).run(WORKFLOW, heard.append, time_limit=10)
    timer.join(10)
    assert [(p.title, p.value) for p in heard] == [("Saved", 2)]


@pytest.mark.parametrize("failures", [[500, 500], ["drop", "drop"], [503, "drop"]])
def test_a_queueing_that_fails_twice_is_tried_again_and_queued_once(fake, failures):
    said, fake.failing["/prompt"] = [], list(failures)
    client = ComfyClient(fake.address, on_retry=said.append)
    assert client.run(WORKFLOW).output("Saved")
    assert len(fake.queued) == 1 and len(said) == 2 and "trying again in" in said[0]


def test_a_queueing_whose_answer_is_lost_is_not_repeated(fake):
    fake.failing["/prompt"] = ["drop after"]
    prompt_id = ComfyClient(fake.address).queue(WORKFLOW)
    assert [item[1] for item in fake.queued] == [prompt_id]


def test_a_half_valid_workflow_is_refused_even_when_the_answer_is_lost(fake):
    fake.failing["/prompt"], fake.valid = ["drop after"], []
    with pytest.raises(WorkflowRefused, match="what leads to Saved is not valid"):
        ComfyClient(fake.address).queue(WORKFLOW)
    assert fake.cancelled() == [fake.queued[0][1]]


def test_a_prompt_that_came_twice_all_the_same_is_reduced_to_one(fake):
    fake.failing["/prompt"], fake.entry = ["drop after"], None
    fake.known = lambda prompt_id: False  # as while the first request is still being read when the client asks
    prompt_id = ComfyClient(fake.address).queue(WORKFLOW)
    assert [item[1] for item in fake.queued] == [prompt_id] * 2
    assert ("queue", {"delete": [prompt_id]}) in fake.calls


def test_a_prompt_that_the_caller_named_is_queued_only_once(fake):
    client, name = ComfyClient(fake.address), str(uuid.uuid4())
    assert client.queue(WORKFLOW, prompt_id=name) == client.queue(WORKFLOW, prompt_id=name) == name
    assert len(fake.queued) == 1 and client.run(WORKFLOW, prompt_id=name).output("Saved")


def test_a_server_that_dies_while_the_workflow_runs_is_told(fake):
    fake.script, fake.entry = [("close", {})], None
    threading.Timer(0.3, lambda: setattr(fake, "dead", True)).start()
    with pytest.raises(ServerUnreachable, match=r"went away before the workflow was over.*\(3 tries in"):
        ComfyClient(fake.address, retries=2).run(WORKFLOW)


def test_a_server_that_was_restarted_and_forgot_the_prompt_is_told(fake):
    fake.script, fake.entry = [], None
    threading.Timer(0.3, fake.queued.clear).start()
    with pytest.raises(PromptLost, match="no longer knows prompt .* restarted"):
        ComfyClient(fake.address).run(WORKFLOW)


def test_no_server_at_the_address_is_an_error_that_names_it(quick):
    with pytest.raises(ServerUnreachable, match="no ComfyUI answers at http://127.0.0.1:9: .*2 tries"):
        ComfyClient("http://127.0.0.1:9", retries=1).run(WORKFLOW)


def test_a_server_that_wants_a_token_is_not_asked_again(fake):
    fake.failing["/view"] = [401, 401]
    with pytest.raises(ServerRefused, match="status 401. It wants a token"):
        ComfyClient(fake.address).view("a.png")
    assert fake.failing["/view"] == [401]


def test_a_token_goes_with_every_request(fake):
    ComfyClient(fake.address, headers={"Authorization": "Bearer t"}).run(WORKFLOW).images("Saved")
    assert len(fake.headers) >= 4 and all(headers["Authorization"] == "Bearer t" for headers in fake.headers)


def test_a_redirect_is_not_followed(fake):
    fake.failing["/view"] = [302]
    with pytest.raises(ServerRefused, match="redirects"):
        ComfyClient(fake.address).view("a.png")


@pytest.mark.parametrize("address", ["127.0.0.1:8188", "file:///etc/passwd", "http://", "http://a b", "http://h:x", ""])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(MedSteerError, match="http://HOST:PORT"):
        ComfyClient(address)


def test_waiting_ends_with_the_history_or_with_the_time(fake):
    client = ComfyClient(fake.address)
    prompt_id = client.queue(WORKFLOW)
    assert client.wait(prompt_id, WORKFLOW).output("Saved")["images"][0]["filename"] == "a.png"
    fake.entry = None
    with pytest.raises(WorkflowError, match="not finished"):
        client.wait(prompt_id, WORKFLOW, time_limit=0.2)
    with pytest.raises(PromptLost):
        client.wait("another", WORKFLOW)


def test_an_upload_arrives_byte_for_byte(fake, tmp_path):
    content = bytes(range(256)) * 3 + b"\r\n--\r\n"
    (tmp_path / "v.safetensors").write_bytes(content)
    assert ComfyClient(fake.address).upload(tmp_path / "v.safetensors") == "v.safetensors"
    assert fake.calls == [("upload", "v.safetensors", content, "input")]
    with pytest.raises(ValueError, match="file name"):
        ComfyClient(fake.address).upload(b"x")
