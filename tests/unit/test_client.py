"""The client against a small server in this process that speaks ComfyUI's protocol."""

import asyncio
import io
import json
import threading
import time

import pytest
from aiohttp import web
from PIL import Image

from medsteer_core.client import ComfyClient
from medsteer_core.workflow import WorkflowError, WorkflowFailed, WorkflowRefused

WORKFLOW = {"7": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}, "_meta": {"title": "Saved"}}}
SUCCESS = {"status_str": "success", "completed": True, "messages": []}
GREEN = (10, 200, 30)


def png(colour) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(data, "PNG")
    return data.getvalue()


class Fake:
    """A server that plays one prompt. `script` holds the websocket messages after the queueing, `entry` the history."""

    def __init__(self):
        self.script = [
            ("progress_state", {"nodes": {"7": {"node_id": "7", "state": "finished", "value": 1, "max": 1}}})
        ]
        self.script += [("executing", {"node": None})]
        self.entry = {
            "status": SUCCESS,
            "outputs": {"7": {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]}},
        }
        self.answer = {"prompt_id": "p", "node_errors": {}}
        self.status, self.calls, self.sockets = 200, [], {}
        self.loop, self.address = asyncio.new_event_loop(), ""

    async def socket(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets[request.query["clientId"]] = socket
        await socket.send_bytes(b"a preview")  # binary messages are previews and must do no harm
        await socket.receive()
        return socket

    async def prompt(self, request):
        body = await request.json()
        self.calls.append(("prompt", body["prompt"]))
        if self.status == 200 and body.get("client_id") in self.sockets:
            socket = self.sockets[body["client_id"]]
            for kind, data in self.script:
                await socket.close() if kind == "close" else await socket.send_json(
                    {"type": kind, "data": {"prompt_id": "p", **data}}
                )
        return web.json_response(self.answer, status=self.status)

    async def history(self, request):
        return web.json_response({"p": self.entry} if self.entry else {})

    async def view(self, request):
        assert request.query["filename"] == "a.png"
        return web.Response(body=png(GREEN))

    async def post(self, request):
        if request.path == "/upload/image":
            form = await request.post()
            self.calls.append(("upload", form["image"].filename, form["image"].file.read(), form["type"]))
            return web.json_response({"name": form["image"].filename, "subfolder": "", "type": "input"})
        self.calls.append((request.path.strip("/"), json.loads(await request.text())))
        return web.Response()

    async def start(self):
        app = web.Application()
        app.add_routes([web.get("/ws", self.socket), web.post("/prompt", self.prompt), web.get("/view", self.view)])
        app.add_routes([web.get("/history/{id}", self.history), web.post("/{any:.*}", self.post)])
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"http://127.0.0.1:{self.runner.addresses[0][1]}"


@pytest.fixture
def fake():
    server = Fake()
    thread = threading.Thread(target=server.loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start(), server.loop).result(10)
    yield server
    asyncio.run_coroutine_threadsafe(server.runner.cleanup(), server.loop).result(10)
    server.loop.call_soon_threadsafe(server.loop.stop)
    thread.join(10)
    server.loop.close()


def test_a_run_returns_the_pixels_of_the_titled_node(fake):
    heard = []
    result = ComfyClient(fake.address).run(WORKFLOW, heard.append)
    assert (result.pixels("Saved") == GREEN).all() and result.pixels("Saved").shape == (1, 3, 4, 3)
    assert result.images("SaveImage") == result.images("Saved")
    assert heard[-1].fraction == 1.0 and fake.calls == [("prompt", WORKFLOW)]


def test_a_title_without_output_is_answered_with_those_that_have_one(fake):
    with pytest.raises(KeyError, match="no node titled 'Nothing'.*Saved"):
        ComfyClient(fake.address).run(WORKFLOW).output("Nothing")


def test_a_refused_workflow_raises_with_the_servers_reason(fake):
    fake.status, fake.answer = 400, {"error": {"message": "Prompt has no outputs"}, "node_errors": {}}
    with pytest.raises(WorkflowRefused, match="Prompt has no outputs"):
        ComfyClient(fake.address).run(WORKFLOW)


def test_a_partly_refused_workflow_is_taken_back_from_the_queue(fake):
    wrong = {"message": "bad", "extra_info": {"input_name": "images"}}
    fake.answer = {"prompt_id": "p", "node_errors": {"7": {"errors": [wrong]}}}
    with pytest.raises(WorkflowRefused, match="node Saved .*input images: bad"):
        ComfyClient(fake.address).queue(WORKFLOW)
    assert ("queue", {"delete": ["p"]}) in fake.calls and ("interrupt", {"prompt_id": "p"}) in fake.calls


def test_a_node_error_in_the_history_is_raised(fake):
    error = {"node_id": "7", "exception_type": "ValueError", "exception_message": "no", "traceback": []}
    fake.entry = {"status": {"status_str": "error", "messages": [["execution_error", error]]}, "outputs": {}}
    with pytest.raises(WorkflowFailed, match="node Saved: ValueError: no"):
        ComfyClient(fake.address).run(WORKFLOW)


def test_a_run_past_its_time_is_interrupted_on_the_server(fake):
    fake.script, begun = [], time.monotonic()
    with pytest.raises(WorkflowError, match="not finished after 0 s"):
        ComfyClient(fake.address).run(WORKFLOW, time_limit=0.3)
    assert ("interrupt", {"prompt_id": "p"}) in fake.calls and time.monotonic() - begun < 5


def test_a_connection_closed_in_the_middle_is_an_error(fake):
    fake.script = [("close", {})]
    with pytest.raises(WorkflowError, match="closed the connection"):
        ComfyClient(fake.address).run(WORKFLOW, time_limit=10)


def test_no_server_at_the_address_is_an_error_that_names_it():
    with pytest.raises(WorkflowError, match="no ComfyUI answers at http://127.0.0.1:9"):
        ComfyClient("http://127.0.0.1:9").run(WORKFLOW)


def test_waiting_ends_with_the_history_or_with_the_time(fake):
    client = ComfyClient(fake.address)
    assert client.wait("p", WORKFLOW).output("Saved")["images"][0]["filename"] == "a.png"
    fake.entry = None
    with pytest.raises(WorkflowError, match="not finished"):
        client.wait("p", WORKFLOW, time_limit=0.2)


def test_an_upload_arrives_byte_for_byte(fake, tmp_path):
    content = bytes(range(256)) * 3 + b"\r\n--\r\n"
    (tmp_path / "v.safetensors").write_bytes(content)
    assert ComfyClient(fake.address).upload(tmp_path / "v.safetensors") == "v.safetensors"
    assert fake.calls == [("upload", "v.safetensors", content, "input")]
    with pytest.raises(ValueError, match="file name"):
        ComfyClient(fake.address).upload(b"x")
