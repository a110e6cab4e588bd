"""A ComfyUI with MedSteer and the probe in it, and what the probe answers."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from medsteer_core.run.client import ComfyClient
from medsteer_core.run.demo import ROOT
from medsteer_core.run.server import PACK_NAME, ComfyServer, comfyui_from_environment

PROBE = "medsteer_probe"
_PACK = Path(__file__).with_name("probe_pack.py")
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def probed_server(cpu: bool | None = None, extra: tuple[str, ...] = ()) -> Iterator[Probed]:
    """A running server with this checkout and the probe; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="medsteer-probe-", ignore_cleanup_errors=True) as folder:
        packs = Path(folder) / "packs"
        (packs / PROBE).mkdir(parents=True)
        shutil.copyfile(_PACK, packs / PROBE / "__init__.py")
        paths = Path(folder) / "paths.yaml"
        paths.write_text(f"probe:\n  custom_nodes: {json.dumps(str(packs))}\n", encoding="utf-8")
        # The last list of allowed packs counts.
        words = ("--extra-model-paths-config", str(paths), "--whitelist-custom-nodes", PACK_NAME, PROBE, *extra)
        with ComfyServer(comfyui_from_environment(), ROOT, cpu=cpu, extra=words) as server:
            yield Probed(server)


class Probed:
    """A server with the probe: `client` runs workflows, the rest looks inside between two runs."""

    def __init__(self, server: ComfyServer):
        self.server, self.client = server, ComfyClient(server.address, timeout=300.0)
        self._process = psutil.Process(server.process.pid)

    def resident(self) -> int:
        """Bytes of the server process in memory."""
        return self._process.memory_info().rss

    def counts(self) -> dict[str, int]:
        """What lives in the server, after a garbage collection."""
        self.wait_until_idle()
        return self._ask("/medsteer_probe/counts")

    def trim(self) -> None:
        """Give the server's unused memory back to the system."""
        self.wait_until_idle()
        self._ask("/medsteer_probe/trim", {})

    def watch_calls(self, raise_at: int = 0, hold_at: int = 0) -> None:
        """Count model calls of Probe Model anew; raise in one of them, or hold one until it is cancelled."""
        self._ask("/medsteer_probe/calls", {"raise_at": raise_at, "hold_at": hold_at})

    def calls(self) -> dict[str, Any]:
        """``count`` of model calls since then, and whether a held one was ``cancelled``."""
        return self._ask("/medsteer_probe/calls")

    def free(self) -> None:
        """Have ComfyUI forget every cached output and unload the models before the next run."""
        self._ask("/free", {"unload_models": True, "free_memory": True})
        self.wait_until_idle()

    def forget(self) -> None:
        """Empty ComfyUI's history, which holds 10000 runs' workflows and messages."""
        self._ask("/history", {"clear": True})

    def wait_until_idle(self, limit: float = 60.0) -> None:
        """Until no prompt runs or waits. The last message to a client comes before the prompt is put away."""
        begun = time.monotonic()
        while any(self._ask("/queue").values()):
            if time.monotonic() - begun > limit:
                raise TimeoutError(f"the server's queue was not empty after {limit:.0f} s")
            time.sleep(0.01)

    @contextmanager
    def peak(self, every: float = 0.001) -> Iterator[list[int]]:
        """The most resident bytes meanwhile, looked at every millisecond: a list that has it afterwards."""
        seen, result, over = [self.resident()], [], threading.Event()

        def look() -> None:
            while not over.wait(every):
                seen[0] = max(seen[0], self.resident())

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield result
        finally:
            over.set()
            watcher.join()
            result.append(seen[0])

    def _ask(self, path: str, payload: dict | None = None) -> dict[str, Any]:
        body = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.server.address + path, body, {"Content-Type": "application/json"})
        with _NO_PROXY.open(request, timeout=self.client.timeout) as answer:
            return json.loads(answer.read() or b"{}")
