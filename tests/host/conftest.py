"""Host tests run against a real ComfyUI: one server for all of them, this checkout its only custom node.

On the CPU everywhere, so that the numbers are the same on every machine.
"""

from collections.abc import Iterator

import pytest

from benchmarks.shared.probe import Probed, probed_server
from medsteer_core.run.client import ComfyClient
from medsteer_core.run.server import ComfyServer, comfyui_from_environment, signals_as_interrupt


@pytest.fixture(scope="session", autouse=True)
def _clean_end() -> Iterator[None]:
    """SIGTERM ends the tests as Ctrl-C does: fixtures are torn down, so no server outlives them."""
    with signals_as_interrupt():
        yield


@pytest.fixture(scope="session")
def comfy_server(checkout) -> Iterator[ComfyServer]:
    """The running server."""
    with ComfyServer(comfyui_from_environment(), checkout, cpu=True) as server:
        yield server


@pytest.fixture(scope="session")
def comfy(comfy_server) -> ComfyClient:
    """A client of the running server: `comfy.run(workflow)` gives a Result, `comfy.object_info()` the nodes."""
    return ComfyClient(comfy_server.address)


@pytest.fixture(scope="session")
def probed() -> Iterator[Probed]:
    """Another server with a second pack in it, which counts what lives there and can hold or break a model call."""
    with probed_server(cpu=True, extra=("--cache-classic",)) as server:
        yield server
