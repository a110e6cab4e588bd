"""Where pictures are made: a server with the pack, and a tab of its front end as soon as a picture wants one."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cached_property

import frontend
from PIL import Image

from medsteer_core.run.client import ComfyClient
from medsteer_core.run.server import ComfyServer

from .graphs import SMALL, Phantom
from .screenshots import LISTED

WINDOW = {"width": 1920, "height": 1400}
# Without what the front end draws above nodes and on links.
SETTINGS = {**frontend.SETTINGS, "Comfy.NodeBadge.NodeSourceBadgeMode": "None", "Comfy.Graph.LinkMarkers": 0}


class Studio:
    """``browser``: a running Chromium."""

    def __init__(self, server: ComfyServer, browser):
        self.server, self._browser, self._client = server, browser, ComfyClient(server.address)

    def images(self, graph: Phantom, shown: Mapping[str, list]) -> dict[str, Image.Image]:
        """Run a graph: the first image of each of these links, by its name."""
        for title, link in shown.items():
            graph[title] = {"class_type": "PreviewImage", "inputs": {"images": link}, "_meta": {"title": title}}
        result = self._client.run(graph)
        return {title: Image.open(io.BytesIO(result.images(title)[0])).convert("RGB") for title in shown}

    @cached_property
    def front(self) -> frontend.FrontEnd:
        """The front end, which lists the files that screenshots name; of some there is no more than the name."""
        for name in LISTED:
            path = self.server.base / "models" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        graph = Phantom()
        vector = graph.vector(**SMALL)
        for kind in ("MedSteer_SavePathologyVector", "MedSteer_ExportPathologyVector"):
            graph.add(kind, vector=vector, filename_prefix="polyps")
        self._client.run(graph)
        frontend.set_settings(self.server.address, SETTINGS)
        page = self._browser.new_context(viewport=WINDOW).new_page()
        front = frontend.FrontEnd(page, self.server.address, self.server.base)
        front.start()
        return front

    def vector_name(self, ending: str) -> str:
        """The file of the saved vector (.safetensors) or of the exported one (.npz)."""
        assert self.front
        return next((self.server.base / "models" / "medsteer").glob(f"polyps_*.{ending}")).name
