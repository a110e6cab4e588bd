"""A workflow in ComfyUI's API format (node id -> class_type, inputs, _meta) and what a server says about running it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Workflow = Mapping[str, Mapping[str, Any]]


class WorkflowError(RuntimeError):
    """A workflow gave no result: it was refused, failed in a node, was interrupted, or took too long."""


class WorkflowRefused(WorkflowError):
    """The server's validation refused the workflow; the message names each node and input."""


class WorkflowFailed(WorkflowError):
    """A node raised. `node_title`, `exception_type` and `exception_message` say which and what."""

    def __init__(self, node_title: str, exception_type: str, exception_message: str, traceback: str = ""):
        super().__init__(f"node {node_title}: {exception_type}: {exception_message.strip()}")
        self.node_title, self.exception_type = node_title, exception_type
        self.exception_message, self.traceback = exception_message.strip(), traceback


class WorkflowInterrupted(WorkflowError):
    """Somebody pressed Cancel (`/interrupt`) while the workflow ran."""


class ServerUnreachable(WorkflowError):
    """No server answers, after all retries. Whether the workflow ran is not known."""


class PromptLost(ServerUnreachable):
    """The server answers, but no longer knows the prompt: it was restarted, or somebody emptied its queue."""


class ServerRefused(WorkflowError):
    """The server answered a request with a status of 300 to 499: `status`, and `body` as it came."""

    def __init__(self, address: str, status: int, body: bytes = b""):
        hints = {401: "It wants a token.", 403: "It wants another token.", 404: "Is it a ComfyUI, 0.30.0 or newer?"}
        hint = hints.get(status, "It redirects; give the address it leads to." if 300 <= status < 400 else "")
        super().__init__(f"{address} refused the request with status {status}. {hint}".rstrip())
        self.status, self.body = status, body


@dataclass(frozen=True)
class Progress:
    """One moment of a run: the running node's title, its value of maximum, the workflow's fraction, seconds so far."""

    title: str
    value: float
    maximum: float
    fraction: float
    seconds: float


class RunState:
    """What the websocket has told about one prompt so far."""

    def __init__(self, prompt_id: str, workflow: Workflow):
        self.prompt_id, self.workflow = prompt_id, workflow
        self.finished = False
        self._done: set[str] = set()
        self._running: tuple[str, float, float] = ("", 0.0, 1.0)
        self._begun = time.monotonic()
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def hear(self, message: Mapping[str, Any]) -> bool:
        """Take one message in; True when it changed this prompt's progress."""
        kind, data = message.get("type"), message.get("data") or {}
        if data.get("prompt_id") != self.prompt_id:
            return False
        if kind == "executing" and data.get("node") is None:
            self.finished = True
        elif kind == "execution_cached":
            self._done.update(data["nodes"])
        elif kind == "progress_state":
            for state in data["nodes"].values():
                self._hear_node(state)
        else:
            return False
        return True

    def _hear_node(self, state: Mapping[str, Any]) -> None:
        node = state.get("display_node_id") or state["node_id"]
        now = time.monotonic()
        self._first.setdefault(node, now)
        if state["state"] == "running":
            self._running = (node, state["value"], state["max"] or 1)
        elif node not in self._done:
            self._done.add(node)
            self._last[node] = now

    def progress(self) -> Progress:
        """The present moment; nodes count alike, a running one by its own share."""
        node, value, maximum = self._running
        known = self._done & set(self.workflow)
        share = value / maximum if node in self.workflow and node not in known else 0.0
        fraction = 1.0 if self.finished else min(1.0, (len(known) + share) / max(1, len(self.workflow)))
        title = node_title(self.workflow, node) if node else ""
        return Progress(title, value, maximum, fraction, time.monotonic() - self._begun)

    def node_seconds(self) -> dict[str, float]:
        """Seconds from a node's first sign to its last, by title; cached nodes are left out."""
        seconds: dict[str, float] = {}
        for node, last in self._last.items():
            title = node_title(self.workflow, node)
            seconds[title] = seconds.get(title, 0.0) + last - self._first[node]
        return seconds


def node_title(workflow: Workflow, node_id: str) -> str:
    """A node's title as its author wrote it, else its class, else its id."""
    node = workflow.get(node_id, {})
    return node.get("_meta", {}).get("title") or node.get("class_type") or str(node_id)


def raise_for_status(status: Mapping[str, Any], workflow: Workflow) -> None:
    """Raise what the history's status tells of an error or an interruption; nothing after a success."""
    for kind, data in status.get("messages", []):
        if kind == "execution_error":
            title = node_title(workflow, data["node_id"])
            trace = "".join(data.get("traceback") or [])
            raise WorkflowFailed(title, data["exception_type"], data["exception_message"], trace)
        if kind == "execution_interrupted":
            raise WorkflowInterrupted(f"the workflow was interrupted in node {node_title(workflow, data['node_id'])}")
    if status.get("status_str") != "success":
        raise WorkflowError(f"the workflow ended with status {status.get('status_str')!r} and no reason")


def refusal_text(answer: Mapping[str, Any], workflow: Workflow) -> str:
    """The server's refusal of a workflow in readable lines: one for each wrong input, with node and input names.

    What a node itself says of its inputs ComfyUI repeats at each of them; here it stands once.
    """
    lines = []
    for node_id, found in (answer.get("node_errors") or {}).items():
        errors = [((error.get("extra_info") or {}).get("input_name"), error) for error in found.get("errors", [])]
        own = [_own_words(name, error) for name, error in errors]
        for (name, error), words in zip(errors, own, strict=True):
            where = f"node {node_title(workflow, node_id)} (id {node_id})"
            if words and own.count(words) > 1:
                lines.append(f"{where}: {words}")
            else:
                lines.append(f"{where}{f', input {name}' if name else ''}: {_joined(error)}")
    lines = list(dict.fromkeys(lines))
    error = answer.get("error")
    if not lines:
        lines.append(_joined(error) if isinstance(error, Mapping) else str(error or answer))
    return "ComfyUI refused the workflow:\n  " + "\n  ".join(lines)


def _own_words(name: str | None, error: Mapping[str, Any]) -> str:
    """What a node's own validation says, without the input's name that ComfyUI puts before it; "" for other errors."""
    before = f"{name} - "
    details = str(error.get("details", ""))
    own = error.get("type") == "custom_validation_failed" and details.startswith(before)
    return details.removeprefix(before) if own else ""


def _joined(error: Mapping[str, Any]) -> str:
    message, details = error.get("message", "no message"), error.get("details", "")
    return message if not details or details == message else f"{message} ({details})"
