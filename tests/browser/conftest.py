"""Browser tests: the pack in ComfyUI's real front end, in a Chromium with a fresh profile for every test.

`python dev.py test` finds the Chromium and names it in CHROMIUM; without one these tests are skipped, unless
MEDSTEER_BROWSER=required makes that a failure. Screenshots go to output/browser. `python dev.py export` writes the
files of example_workflows/api with the same front end (`--write-api`); they are never written by hand.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from medsteer_core.run.server import ComfyServer, comfyui_from_environment, signals_as_interrupt

# For `import frontend`; at the end, so that it hides nothing.
sys.path.append(str(Path(__file__).parent))

import frontend  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--write-api", action="store_true", help="write example_workflows/api anew")


@pytest.fixture(scope="session", autouse=True)
def _clean_end() -> Iterator[None]:
    """SIGTERM ends the tests as Ctrl-C does, so no server and no browser outlives them."""
    with signals_as_interrupt():
        yield


@pytest.fixture(scope="session")
def browser():
    """The Chromium that CHROMIUM names."""
    path = os.environ.get("CHROMIUM")
    if not path:
        reason = "CHROMIUM names no browser; `python dev.py test` looks for one"
        (pytest.fail if os.environ.get("MEDSTEER_BROWSER") == "required" else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=frontend.FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def comfy_server(checkout, browser) -> Iterator[ComfyServer]:
    """A running server with this checkout as its only custom node, on the CPU."""
    with ComfyServer(comfyui_from_environment(), checkout, cpu=True) as server:
        yield server


@contextmanager
def opened(browser, server: ComfyServer, checkout: Path) -> Iterator[frontend.FrontEnd]:
    """The front end with an empty graph, in a fresh profile."""
    pictures = checkout / "output" / "browser"
    pictures.mkdir(parents=True, exist_ok=True)
    frontend.set_settings(server.address)
    context = browser.new_context(viewport=frontend.WINDOW)
    try:
        front = frontend.FrontEnd(context.new_page(), server.address, pictures)
        front.start()
        yield front
    finally:
        context.close()


@pytest.fixture
def front(browser, comfy_server, checkout) -> Iterator[frontend.FrontEnd]:
    """The front end with an empty graph, in a fresh profile."""
    with opened(browser, comfy_server, checkout) as front:
        yield front


@pytest.fixture(scope="module")
def shared_front(browser, comfy_server, checkout) -> Iterator[frontend.FrontEnd]:
    """One front end for all tests of a file that only look at what they open: each opens in a tab of its own."""
    with opened(browser, comfy_server, checkout) as front:
        yield front
