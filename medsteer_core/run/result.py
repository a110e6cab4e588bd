"""What a workflow that ran on a server left behind."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from .workflow import Workflow, node_title


class Files(Protocol):
    """Where a run's files are fetched: a client of its server."""

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes: ...


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
    client: Files = field(repr=False, compare=False)

    def output(self, title: str) -> Mapping[str, list]:
        """The output of the node with this title (or class); KeyError when no such node left one."""
        for node_id, output in self.outputs.items():
            # Nodes that another node expanded into stand in the history too, under ids of their own.
            node = self.workflow.get(node_id, {})
            if node and title in (node_title(self.workflow, node_id), node.get("class_type")):
                return output
        known = ", ".join(node_title(self.workflow, i) for i in self.outputs) or "none"
        raise KeyError(f"no node titled {title!r} left an output; those that did: {known}")

    def files(self) -> list[dict[str, str]]:
        """Every file of the outputs, once: filename, subfolder and type, as `ComfyClient.view` takes them."""
        found = {}
        for kinds in self.outputs.values():
            for item in (item for items in kinds.values() if isinstance(items, list) for item in items):
                if isinstance(item, Mapping) and isinstance(item.get("filename"), str):
                    place = {name: str(item.get(name) or "") for name in ("filename", "subfolder", "type")}
                    found.setdefault(tuple(place.values()), place)
        return list(found.values())

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
