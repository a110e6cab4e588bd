"""Run a workflow on a ComfyUI server through its HTTP interface and websocket, as any remote program would.

Plain requests use the standard library and are repeated when they fail; the websocket uses aiohttp, which ComfyUI
brings along, and only progress depends on it. Everything here is synchronous for the caller.
"""

from __future__ import annotations

import contextlib
import time
import urllib.error
import urllib.parse
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .listener import DISCONNECTED, Listener
from .result import Result
from .retrying_http import RetryingHttp, answered, checked_address, decoded, form
from .workflow import (
    Progress,
    PromptLost,
    RunState,
    ServerRefused,
    ServerUnreachable,
    Workflow,
    WorkflowError,
    WorkflowRefused,
    node_title,
    raise_for_status,
    refusal_text,
)

# Seconds without a word about our prompt after which the server is asked how it stands.
SILENCE = 2.0
WAITING = ("pending", "in_progress")


class _TimeIsUp(Exception):
    """The caller's time limit has passed."""


class ComfyClient:
    """A client of the server at `address` (such as `http://127.0.0.1:8188`).

    timeout: seconds for one request. retries: how often a request that got no answer is repeated, with growing pauses.
    headers: sent with every request, for a server that wants a token. on_retry: hears a sentence at each repetition.
    Every method raises ServerUnreachable after the last try, and ServerRefused where the server will not answer.
    """

    def __init__(
        self,
        address: str,
        timeout: float = 60.0,
        retries: int = 5,
        headers: Mapping[str, str] | None = None,
        on_retry: Callable[[str], None] | None = None,
    ):
        self.address, self.timeout = checked_address(address), timeout
        self._http = RetryingHttp(self.address, timeout, retries, dict(headers or {}), on_retry)

    def object_info(self, class_type: str = "") -> dict[str, Any]:
        """Every node the server knows, or one: class -> its inputs, outputs and texts."""
        return self._json("/object_info" + (f"/{urllib.parse.quote(class_type, safe='')}" if class_type else ""))

    def system_stats(self) -> dict[str, Any]:
        """Versions and devices of the server."""
        return self._json("/system_stats")

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The history's entry of a finished prompt, None while it waits or runs."""
        return self._json(f"/history/{prompt_id}").get(prompt_id)

    def status(self, prompt_id: str) -> str | None:
        """`pending`, `in_progress`, `completed`, `failed` or `cancelled`; None when the server knows no such prompt."""
        return self._http.retried(lambda: self._status(prompt_id))

    def view(self, filename: str, subfolder: str = "", type: str = "output", **_more: Any) -> bytes:
        """The content of a file in the server's output, temp or input folder."""
        query = {"filename": filename, "subfolder": subfolder, "type": type}
        return self._http.get("/view?" + urllib.parse.urlencode(query))

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Interrupt whatever runs, or the given prompt if it runs."""
        # Never repeated: a second one could meet the prompt after the one that was meant.
        replace(self._http, retries=0).post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def cancel(self, prompt_id: str) -> bool:
        """Take a prompt out of the queue, or interrupt it if it runs; no other is touched. False when it was over."""
        return answered(self._http.post(f"/api/jobs/{prompt_id}/cancel", {}), self.address)["cancelled"]

    def upload(self, content: bytes | Path, name: str | None = None) -> str:
        """Put a file of any kind into the server's input folder, replacing one of that name; returns its name there."""
        if isinstance(content, Path):
            content, name = content.read_bytes(), name or content.name
        if not name:
            raise ValueError("upload needs a file name when it is given bytes")
        kind, body = form({"overwrite": "true", "type": "input"}, "image", name, content)
        return answered(self._http.post("/upload/image", body, kind), self.address)["name"]

    def queue(self, workflow: Workflow, client_id: str | None = None, prompt_id: str | None = None) -> str:
        """Queue a workflow once and return its prompt id; WorkflowRefused when any part of it is not valid.

        prompt_id: a UUID of the caller's choice. A prompt that the server knows by it, in whatever state, is not
        queued again, so that a caller who was interrupted can repeat the call.
        """
        named, prompt_id, posts = prompt_id is not None, prompt_id or str(uuid.uuid4()), 0
        # With metadata, be it empty: nodes add to it what saved images are to say besides the workflow.
        payload = {"prompt": workflow, "prompt_id": prompt_id, "extra_data": {"extra_pnginfo": {}}}
        if client_id is not None:
            payload["client_id"] = client_id

        def attempt() -> dict[str, Any] | None:
            nonlocal posts
            # ComfyUI may have taken the prompt although its answer was lost; it would run an id that came twice twice.
            if (posts or named) and self._status(prompt_id) is not None:
                return None
            posts += 1
            return answered(self._http.once("/prompt", payload), self.address)

        try:
            answer = self._http.retried(attempt)
        except ServerRefused as error:
            if error.status != 400:
                raise
            raise WorkflowRefused(refusal_text(decoded(error.body), workflow)) from None
        if answer is not None and answer.get("node_errors"):
            # ComfyUI queues the valid outputs of a partly valid workflow; half a result must not look like a whole one.
            self.cancel(prompt_id)
            raise WorkflowRefused(refusal_text(answer, workflow))
        if answer is None or posts > 1:
            self._settle(prompt_id, workflow)
        return prompt_id

    def wait(self, prompt_id: str, workflow: Workflow, time_limit: float = 600.0) -> Result:
        """Wait for a queued prompt by asking how it stands; for several prompts that stand in one queue."""
        begun, pause = time.monotonic(), 0.05
        while self._waits(prompt_id):
            if time.monotonic() - begun > time_limit:
                raise WorkflowError(f"the workflow was not finished after {time_limit:.0f} s")
            time.sleep(pause)
            pause = min(1.0, 1.1 * pause)
        return self._result(prompt_id, workflow, time.monotonic() - begun, {})

    def run(
        self,
        workflow: Workflow,
        on_progress: Callable[[Progress], None] | None = None,
        time_limit: float | None = 600.0,
        prompt_id: str | None = None,
    ) -> Result:
        """Run a workflow to its end and return what it made; `on_progress` hears of every step on the way.

        Raises WorkflowRefused, WorkflowFailed, WorkflowInterrupted, ServerUnreachable, PromptLost, or WorkflowError
        after `time_limit` seconds (None: no limit). When the caller is interrupted or the time is up, the prompt is
        cancelled on the server, and no other. prompt_id: see `queue`.
        """
        begun, client_id, known = time.monotonic(), uuid.uuid4().hex, prompt_id or str(uuid.uuid4())
        run = RunState(known, workflow)
        try:
            with Listener(self.address, client_id, self._http.headers) as listener:
                self.queue(workflow, client_id, prompt_id=known)
                self._follow(run, listener, on_progress, None if time_limit is None else begun + time_limit)
        except WorkflowError:
            raise
        except BaseException as error:
            self._give_up(known)
            if isinstance(error, _TimeIsUp):
                what = f"the workflow was not finished after {time_limit:.0f} s; it was stopped"
                raise WorkflowError(what) from None
            raise
        return self._result(known, workflow, time.monotonic() - begun, run.node_seconds())

    def _follow(self, run: RunState, listener: Listener, on_progress, end: float | None) -> None:
        """Return when the prompt is over, whichever of websocket and queue tells first; _TimeIsUp at `end`."""
        ask_at = time.monotonic() + SILENCE
        while not run.finished:
            now = time.monotonic()
            if end is not None and now >= end:
                raise _TimeIsUp
            if now >= ask_at:
                if not self._waits(run.prompt_id):
                    return
                ask_at = time.monotonic() + SILENCE
            message = listener.next(min(ask_at, end or ask_at) - time.monotonic())
            if message is DISCONNECTED:
                ask_at = min(ask_at, time.monotonic() + 0.1)
            elif message is not None and run.hear(message):
                ask_at = time.monotonic() + SILENCE
                if on_progress:
                    on_progress(run.progress())

    def _waits(self, prompt_id: str) -> bool:
        """Whether a prompt waits or runs; PromptLost when the server does not know it."""
        try:
            status = self.status(prompt_id)
        except ServerUnreachable as error:
            raise ServerUnreachable(f"the server went away before the workflow was over: {error}") from None
        if status is None:
            raise PromptLost(
                f"{self.address} no longer knows prompt {prompt_id}: it was restarted, or somebody removed the prompt "
                "from its queue. Queue the workflow again."
            )
        return status in WAITING

    def _status(self, prompt_id: str) -> str | None:
        try:
            # One request tells queue and history of the same moment, and never sends the other prompts along.
            return answered(self._http.once(f"/api/jobs/{prompt_id}"), self.address).get("status")
        except urllib.error.HTTPError as error:
            if error.code == 404 and decoded(error.read()).get("error") == "Job not found":
                return None
            raise

    def _settle(self, prompt_id: str, workflow: Workflow) -> None:
        """After an answer that was lost: one copy of the prompt stays, and it must be whole."""
        queue = self._json("/queue")
        entries = [item for part in queue.values() for item in part if item[1] == prompt_id]
        if done := self.history(prompt_id):
            entries.append(done["prompt"])
        if len(entries) > 1:
            self._http.post("/queue", {"delete": [prompt_id] * (len(entries) - 1)})
        left_out = [i for i in workflow if entries and i not in entries[0][4] and self._is_output(workflow, i)]
        if left_out:
            self.cancel(prompt_id)
            titles = ", ".join(node_title(workflow, i) for i in left_out)
            raise WorkflowRefused(f"ComfyUI refused a part of the workflow: what leads to {titles} is not valid.")

    def _is_output(self, workflow: Workflow, node_id: str) -> bool:
        name = workflow[node_id]["class_type"]
        return bool(self.object_info(name).get(name, {}).get("output_node"))

    def _give_up(self, prompt_id: str) -> None:
        with contextlib.suppress(WorkflowError, OSError):  # the server may be gone already
            ComfyClient(self.address, min(self.timeout, 10.0), 1, self._http.headers).cancel(prompt_id)

    def _result(self, prompt_id: str, workflow: Workflow, seconds: float, node_seconds) -> Result:
        entry = self.history(prompt_id)
        if entry is None:
            raise PromptLost(f"{self.address} no longer has prompt {prompt_id} in its history. Queue it again.")
        raise_for_status(entry["status"], workflow)
        return Result(prompt_id, workflow, entry["outputs"], seconds, node_seconds, self)

    def _json(self, path: str) -> dict[str, Any]:
        return answered(self._http.get(path), self.address)
