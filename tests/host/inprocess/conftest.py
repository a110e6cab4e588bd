"""Tests inside ComfyUI's own Python: `comfy`, `nodes` and `folder_paths` are ComfyUI's, the pack is `medsteer_pack`.

The pack is loaded as ComfyUI loads a custom node: from its folder, under a name that is not its folder's, with the
checkout behind ComfyUI on the module path. So its core is `medsteer_pack.medsteer_core`, and a test imports what it
needs at its top, after this file ran: `import comfy.sample`, `from medsteer_pack.medsteer_core.host import patch`.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

import pytest

from medsteer_core.run.server import comfyui_from_environment

PACK = Path(__file__).resolve().parents[3]


def _enter_comfyui() -> None:
    """Put ComfyUI first on the module path, on the CPU and with a base directory of its own."""
    sys.path.insert(0, str(comfyui_from_environment()))
    from comfy.cli_args import args  # reads no command line unless ComfyUI's main.py asks for it

    args.cpu = True
    # folder_paths reads it when it is first imported: nothing is written into ComfyUI's own folder.
    args.base_directory = _BASE.name


def _load_pack(name: str = "medsteer_pack") -> None:
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_BASE = tempfile.TemporaryDirectory(prefix="medsteer-", ignore_cleanup_errors=True)
_enter_comfyui()
_load_pack()
_WITH_THE_PACK = {name: module for name, module in sys.modules.items() if name.startswith("medsteer_pack.")}
# For `import tiny`; at the end, so that it hides nothing of ComfyUI's.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def pack_modules():
    """The modules that came with the pack, by name, before any test imported more."""
    return _WITH_THE_PACK


@pytest.fixture(scope="session")
def pixart():
    """A tiny random PixArt as MODEL. All tests share it, since nothing may ever change it."""
    import tiny

    return tiny.model()


@pytest.fixture(scope="session")
def endophantom():
    """The shipped EndoPhantom: MODEL, CLIP, VAE."""
    from medsteer_pack.medsteer_core.host.loading.embedded import load_endophantom

    return load_endophantom()
