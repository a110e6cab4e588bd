"""What a server says on its websocket while a prompt runs. Only progress depends on it: the history has the result."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
import urllib.parse
from collections.abc import Mapping
from typing import Any

from ..errors import MedSteerError

RECONNECT_FIRST, RECONNECT_LONGEST = 0.25, 4.0
FIRST_CONNECTION = 10.0
# Said by the listener itself when a connection is gone, in the form of ComfyUI's messages.
DISCONNECTED = {"type": "medsteer_disconnected", "data": {}}


class Listener:
    """A websocket connection as a context manager, kept up by a thread of its own: it connects again when it is lost.

    address: the server's. client_id: the name under which prompts are queued whose messages are wanted. headers: sent
    with the request for the connection.
    """

    def __init__(self, address: str, client_id: str, headers: Mapping[str, str] | None = None):
        self.url = address.replace("http", "ws", 1) + "/ws?clientId=" + urllib.parse.quote(client_id)
        self.headers = dict(headers or {})
        self.connections = 0
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._tried = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="medsteer-listener", daemon=True)

    def __enter__(self) -> Listener:
        """Connect, or give up waiting for the first connection; later ones are tried all the same."""
        try:
            import aiohttp  # noqa: F401
        except ModuleNotFoundError:
            self._loop.close()
            raise MedSteerError(
                "aiohttp is not installed; following a workflow on a server needs it: pip install aiohttp"
            ) from None
        self._thread.start()
        self._tried.wait(FIRST_CONNECTION)
        return self

    def __exit__(self, *_exception) -> None:
        self._loop.call_soon_threadsafe(self._end)
        self._thread.join(5)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next message, waited for at most `seconds`; None when none came."""
        with contextlib.suppress(queue.Empty):
            return self._messages.get(timeout=max(0.0, seconds))
        return None

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self._listen())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    def _end(self) -> None:
        self._task.cancel()

    async def _listen(self) -> None:
        import aiohttp

        pause = RECONNECT_FIRST
        async with aiohttp.ClientSession(headers=self.headers) as web:
            while True:
                with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError):
                    # The heartbeat notices a server or a network that is gone without a word.
                    async with web.ws_connect(self.url, max_msg_size=0, heartbeat=30.0) as socket:
                        pause = RECONNECT_FIRST
                        self.connections += 1
                        self._tried.set()
                        await self._hear(socket)
                self._tried.set()
                self._messages.put(DISCONNECTED)
                await asyncio.sleep(pause)
                pause = min(RECONNECT_LONGEST, 2 * pause)

    async def _hear(self, socket) -> None:
        async for message in socket:
            if isinstance(message.data, str):  # binary messages are previews
                with contextlib.suppress(ValueError):
                    heard = json.loads(message.data)
                    if isinstance(heard, dict):
                        self._messages.put(heard)
