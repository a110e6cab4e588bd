"""A server in this process that speaks ComfyUI's protocol, and can be as unreliable as a test wants it."""

import asyncio
import io
import json
import threading

import pytest

GREEN = (10, 200, 30)
WORKFLOW = {"7": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}, "_meta": {"title": "Saved"}}}


def png(colour=GREEN) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(data, "PNG")
    return data.getvalue()


class Fake:
    """Plays one prompt after the other.

    `script` holds the websocket's messages after the queueing ("close" closes it), `entry` what the history then has
    (None: it runs on), `answer` and `status` the answer to the queueing. `failing` maps a path's beginning to what
    becomes of its next requests: a status, "drop" (unread) or "drop after" (done, but the answer is lost).
    """

    def __init__(self):
        done = {"nodes": {"7": {"node_id": "7", "state": "finished", "value": 1, "max": 1}}}
        self.script = [("progress_state", done), ("executing", {"node": None})]
        self.entry = {
            "status": {"status_str": "success", "completed": True, "messages": []},
            "outputs": {"7": {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]}},
        }
        self.answer, self.status, self.valid = {"node_errors": {}}, 200, ["7"]
        self.files = {"a.png": png()}
        self.failing: dict[str, list] = {}
        self.dead = False
        self.calls, self.headers, self.sockets, self.queued = [], [], {}, []
        self.loop, self.address = asyncio.new_event_loop(), ""

    def known(self, prompt_id):
        return any(item[1] == prompt_id for item in self.queued)

    async def trouble(self, request, handler):
        self.headers.append(dict(request.headers))
        waiting = next((w for path, w in self.failing.items() if w and request.path.startswith(path)), [])
        what = "drop" if self.dead else waiting.pop(0) if waiting else None
        answer = await handler(request) if what in (None, "drop after") else None
        if what in ("drop", "drop after"):
            request.transport.close()
        return answer or self.web.Response(status=what if isinstance(what, int) else 500)

    async def socket(self, request):
        socket = self.web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets[request.query["clientId"]] = socket
        await socket.send_bytes(b"a preview")  # binary messages are previews and must do no harm
        await socket.send_str("no JSON")
        await socket.receive()
        return socket

    async def prompt(self, request):
        body = await request.json()
        self.calls.append(("prompt", body["prompt"]))
        if self.status != 200:
            return self.web.json_response(self.answer, status=self.status)
        self.queued.append([0, body["prompt_id"], body["prompt"], {}, self.valid])
        if body.get("client_id") in self.sockets:
            socket = self.sockets[body["client_id"]]
            for kind, data in self.script:
                await socket.close() if kind == "close" else await socket.send_json(
                    {"type": kind, "data": {"prompt_id": body["prompt_id"], **data}}
                )
        return self.web.json_response({"prompt_id": body["prompt_id"], **self.answer})

    async def job(self, request):
        if not self.known(request.match_info["id"]):
            return self.web.json_response({"error": "Job not found"}, status=404)
        return self.web.json_response({"status": "completed" if self.entry else "in_progress"})

    async def history(self, request):
        prompt_id = request.match_info["id"]
        items = [item for item in self.queued if item[1] == prompt_id]
        return self.web.json_response({prompt_id: {"prompt": items[0], **self.entry}} if items and self.entry else {})

    async def queue(self, request):
        return self.web.json_response({"queue_running": [], "queue_pending": [] if self.entry else self.queued})

    async def view(self, request):
        return self.web.Response(body=self.files[request.query["filename"]])

    async def node(self, request):
        kinds = {"required": {"steps": ["INT", {}], "cfg": ["FLOAT", {}]}}
        name = request.match_info["name"]
        return self.web.json_response({name: {"output_node": name == "SaveImage", "input": kinds}})

    async def post(self, request):
        if request.path == "/upload/image":
            form = await request.post()
            self.calls.append(("upload", form["image"].filename, form["image"].file.read(), form["type"]))
            return self.web.json_response({"name": form["image"].filename, "subfolder": "", "type": "input"})
        self.calls.append((request.path.strip("/"), json.loads(await request.text())))
        if request.path.endswith("/cancel"):
            return self.web.json_response({"cancelled": self.known(request.match_info["id"])})
        return self.web.Response()

    def cancelled(self):
        """The prompts that were asked to be cancelled."""
        return [call[0].split("/")[2] for call in self.calls if call[0].endswith("/cancel")]

    async def start(self):
        from aiohttp import web

        self.web = web

        @web.middleware
        async def trouble(request, handler):
            return await self.trouble(request, handler)

        app = web.Application(middlewares=[trouble])
        gets = {
            "/ws": self.socket,
            "/history/{id}": self.history,
            "/api/jobs/{id}": self.job,
            "/queue": self.queue,
            "/view": self.view,
            "/object_info/{name}": self.node,
        }
        app.add_routes([web.get(path, handler) for path, handler in gets.items()])
        posts = ("/interrupt", "/queue", "/upload/image", "/api/jobs/{id}/cancel")
        app.add_routes([web.post("/prompt", self.prompt), *(web.post(path, self.post) for path in posts)])
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.address = f"http://127.0.0.1:{self.runner.addresses[0][1]}"


@pytest.fixture
def quick(monkeypatch):
    """Pauses of a client as short as tests want them."""
    from medsteer_core.run import client, listener, retrying_http

    monkeypatch.setattr(retrying_http, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(listener, "RECONNECT_FIRST", 0.01)
    monkeypatch.setattr(client, "SILENCE", 0.1)


@pytest.fixture
def fake(quick):
    server = Fake()
    thread = threading.Thread(target=server.loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start(), server.loop).result(10)
    yield server
    asyncio.run_coroutine_threadsafe(server.runner.cleanup(), server.loop).result(10)
    server.loop.call_soon_threadsafe(server.loop.stop)
    thread.join(10)
    server.loop.close()
