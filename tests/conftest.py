"""Shared by all tests: the checkout's folder, and a small folder that stands in for ComfyUI."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A server that answers /object_info as ComfyUI does, from the same command line. `--fail` makes it end at once.
STAND_IN = """
import argparse, http.server, json, os, pathlib, sys
options = argparse.ArgumentParser()
options.add_argument("--port", type=int)
options.add_argument("--listen")
options.add_argument("--base-directory", type=pathlib.Path)
options.add_argument("--fail", action="store_true")
known, _ = options.parse_known_args()
print("this is the stand-in", flush=True)
if known.fail:
    sys.exit("the stand-in was told to fail")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        packs = [path.name for path in (known.base_directory / "custom_nodes").iterdir()]
        body = json.dumps({"packs": packs, "arguments": sys.argv[1:], "pid": os.getpid(), "path": sys.path}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer((known.listen, known.port), Handler).serve_forever()
"""


@pytest.fixture(scope="session")
def api_file() -> Callable[[Path], Path]:
    """From a template (`2 Counterfactual pair.json`) to its API form (`api/counterfactual_pair.json`)."""

    def of(template: Path) -> Path:
        words = re.findall(r"[a-z0-9]+", re.sub(r"^\d+ ", "", template.stem).lower())
        return template.parent / "api" / f"{'_'.join(words)}.json"

    return of


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A folder that looks like ComfyUI to the server code and starts in a tenth of a second."""
    folder = tmp_path / "ComfyUI"
    folder.mkdir()
    (folder / "main.py").write_text(STAND_IN)
    (folder / "nodes.py").write_text("")
    return folder
