"""Run a workflow on a ComfyUI server through its HTTP interface and websocket, as any remote program would.

Plain requests use the standard library; the websocket uses aiohttp, which ComfyUI brings along. Everything here is
synchronous for the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .workflow import (
    Progress,
    RunState,
    Workflow,
    WorkflowError,
    WorkflowRefused,
    node_title,
    raise_for_status,
    refusal_text,
)

_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Result:
    """What a run left behind. `outputs` is the history's: node id -> output kind -> list.

    `node_seconds` has the wall-clock seconds of each node by its title, where the websocket told (empty after `wait`).
    """

    prompt_id: str
    workflow: Workflow
    outputs: Mapping[str, Mapping[str, list]]
    seconds: float
    node_seconds: Mapping[str, float]
    client: ComfyClient = field(repr=False, compare=False)

    def output(self, title: str) -> Mapping[str, list]:
        """The output of the node with this title (or class); KeyError when no such node left one."""
        for node_id, output in self.outputs.items():
            # Nodes that another node expanded into stand in the history too, under ids of their own.
            node = self.workflow.get(node_id, {})
            if node and title in (node_title(self.workflow, node_id), node.get("class_type")):
                return output
        known = ", ".join(node_title(self.workflow, i) for i in self.outputs) or "none"
        raise KeyError(f"no node titled {title!r} left an output; those that did: {known}")

    def images(self, title: str) -> list[bytes]:
        """The encoded image files that the node with this title saved or previewed, in order."""
        return [self.client.view(**item) for item in self.output(title).get("images", [])]

    def pixels(self, title: str):
        """Those images as a uint8 numpy array `(images, height, width, 3)`."""
        import numpy
        from PIL import Image

        decoded = [Image.open(io.BytesIO(data)).convert("RGB") for data in self.images(title)]
        return numpy.stack([numpy.asarray(image) for image in decoded])

    def text(self, title: str) -> str:
        """The text that the node with this title showed."""
        return "\n".join(str(part) for part in self.output(title)["text"])


class ComfyClient:
    """A client of the server at `address` (such as `http://127.0.0.1:8188`); `timeout` in seconds for one request."""

    def __init__(self, address: str, timeout: float = 60.0):
        self.address, self.timeout = address.rstrip("/"), timeout

    def object_info(self) -> dict[str, Any]:
        """Every node the server knows: class -> its inputs, outputs and texts."""
        return self._json("/object_info")

    def system_stats(self) -> dict[str, Any]:
        """Versions and devices of the server."""
        return self._json("/system_stats")

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The history's entry of a finished prompt, None while it waits or runs."""
        return self._json(f"/history/{prompt_id}").get(prompt_id)

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """The content of a file in the server's output, temp or input folder."""
        query = {"filename": filename, "subfolder": subfolder, "type": type}
        return self._request("/view?" + urllib.parse.urlencode(query))

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Interrupt the running prompt, or only the given one."""
        self._request("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def upload(self, content: bytes | Path, name: str | None = None) -> str:
        """Put a file of any kind into the server's input folder, replacing one of that name; returns its name there."""
        if isinstance(content, Path):
            content, name = content.read_bytes(), name or content.name
        if not name:
            raise ValueError("upload needs a file name when it is given bytes")
        kind, body = _form({"overwrite": "true", "type": "input"}, "image", name, content)
        return json.loads(self._request("/upload/image", body, kind))["name"]

    def queue(self, workflow: Workflow, client_id: str | None = None) -> str:
        """Queue a workflow and return its prompt id; WorkflowRefused when any part of it is not valid."""
        # With metadata, be it empty: nodes add to it what saved images are to say besides the workflow.
        payload = {"prompt": workflow, "extra_data": {"extra_pnginfo": {}}}
        if client_id is not None:
            payload["client_id"] = client_id
        try:
            answer = json.loads(self._request("/prompt", payload))
        except urllib.error.HTTPError as error:
            raise WorkflowRefused(refusal_text(_decoded(error.read()), workflow)) from None
        if answer.get("node_errors"):
            # ComfyUI queues the valid outputs of a partly valid workflow; half a result must not look like a whole one.
            self._request("/queue", {"delete": [answer["prompt_id"]]})
            self.interrupt(answer["prompt_id"])
            raise WorkflowRefused(refusal_text(answer, workflow))
        return answer["prompt_id"]

    def wait(self, prompt_id: str, workflow: Workflow, time_limit: float = 600.0) -> Result:
        """Wait for a queued prompt by asking the history; for several prompts that stand in one queue."""
        begun = time.monotonic()
        while (entry := self.history(prompt_id)) is None:
            if time.monotonic() - begun > time_limit:
                raise WorkflowError(f"the workflow was not finished after {time_limit:.0f} s")
            time.sleep(0.05)
        return self._result(prompt_id, workflow, entry, time.monotonic() - begun, {})

    def run(
        self, workflow: Workflow, on_progress: Callable[[Progress], None] | None = None, time_limit: float = 600.0
    ) -> Result:
        """Run a workflow to its end and return what it made; `on_progress` hears of every step on the way.

        Raises WorkflowRefused, WorkflowFailed, WorkflowInterrupted, or WorkflowError after `time_limit` seconds. When
        the caller is interrupted or the time is up, the prompt is interrupted on the server too.
        """
        return asyncio.run(self._run(workflow, on_progress, time_limit))

    async def _run(self, workflow, on_progress, time_limit) -> Result:
        import aiohttp

        begun, client_id, prompt_id = time.monotonic(), uuid.uuid4().hex, None
        url = self.address.replace("http", "ws", 1) + f"/ws?clientId={client_id}"
        try:
            async with aiohttp.ClientSession() as web, web.ws_connect(url, max_msg_size=0) as socket:
                prompt_id = self.queue(workflow, client_id)
                run = RunState(prompt_id, workflow)
                while not run.finished:
                    message = await asyncio.wait_for(socket.receive(), time_limit - (time.monotonic() - begun))
                    if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                        raise WorkflowError("the server closed the connection while the workflow ran")
                    if message.type == aiohttp.WSMsgType.TEXT and run.hear(json.loads(message.data)) and on_progress:
                        on_progress(run.progress())
        except (asyncio.TimeoutError, asyncio.CancelledError, KeyboardInterrupt) as error:
            if prompt_id:
                with contextlib.suppress(OSError):  # the server may be gone already
                    self.interrupt(prompt_id)
            if isinstance(error, asyncio.TimeoutError):
                raise WorkflowError(f"the workflow was not finished after {time_limit:.0f} s; it was stopped") from None
            raise
        except aiohttp.ClientConnectionError as error:
            raise WorkflowError(f"no ComfyUI answers at {self.address}: {error}") from None
        # The history is written before the closing message, so it is there now.
        return self._result(prompt_id, workflow, self.history(prompt_id), time.monotonic() - begun, run.node_seconds())

    def _result(self, prompt_id, workflow, entry, seconds, node_seconds) -> Result:
        raise_for_status(entry["status"], workflow)
        return Result(prompt_id, workflow, entry["outputs"], seconds, node_seconds, self)

    def _json(self, path: str) -> dict[str, Any]:
        return json.loads(self._request(path))

    def _request(self, path: str, payload: Mapping | bytes | None = None, kind: str = "application/json") -> bytes:
        body = payload if payload is None or isinstance(payload, bytes) else json.dumps(payload).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": kind} if body is not None else {})
        with _NO_PROXY.open(request, timeout=self.timeout) as answer:
            return answer.read()


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        return json.loads(body)
    except ValueError:
        return {"error": body.decode(errors="replace")[:500]}


def _form(fields: Mapping[str, str], file_field: str, name: str, content: bytes) -> tuple[str, bytes]:
    """A multipart/form-data body with one file: its content type and its bytes (RFC 7578)."""
    mark = uuid.uuid4().hex
    text = "".join(
        f'--{mark}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n' for key, value in fields.items()
    )
    text += f'--{mark}\r\nContent-Disposition: form-data; name="{file_field}"; filename="{name}"\r\n'
    text += "Content-Type: application/octet-stream\r\n\r\n"
    return f"multipart/form-data; boundary={mark}", text.encode() + content + f"\r\n--{mark}--\r\n".encode()
