"""In a fresh process: ComfyUI as it is when it comes to the custom nodes, then packs, timed as ComfyUI times them.

    python -m benchmarks.speed._import_once FOLDER [FOLDER ...]

prints a line of JSON for each: seconds, and the modules that were not there before. Of several folders each is imported
in a copy of the process (fork) that has seen no other. ComfyUI's folder is COMFYUI_PATH.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from medsteer_core.run.server import comfyui_from_environment


def main(folders: Sequence[Path]) -> None:
    """Import the pack in each folder. Ends with status 1 where ComfyUI could not."""
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() not in folders]
    sys.path.insert(0, str(comfyui_from_environment()))
    logging.disable(logging.INFO)
    from comfy.cli_args import args

    args.cpu, args.disable_api_nodes = True, True
    with tempfile.TemporaryDirectory(prefix="medsteer-", ignore_cleanup_errors=True) as base:
        args.base_directory = base  # before folder_paths is imported: nothing goes into ComfyUI's own folder
        asyncio.run(comfyui_up_to_custom_nodes())
        for folder in folders:
            if len(folders) == 1:
                print(json.dumps(asyncio.run(imported(folder))))
            elif os.waitstatus_to_exitcode(os.waitpid(in_a_copy(folder), 0)[1]):
                sys.exit(1)


async def comfyui_up_to_custom_nodes() -> None:
    """The server object and ComfyUI's own nodes, as its main.py makes them."""
    import server

    import nodes

    server.PromptServer(asyncio.get_running_loop())
    await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)


def in_a_copy(folder: Path) -> int:
    """Import and print in a fork of this process; its number."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        print(json.dumps(asyncio.run(imported(folder))), flush=True)
        status = 0
    finally:
        os._exit(status)


async def imported(folder: Path) -> dict:
    """Seconds of one import, wall and processor's, and the new modules."""
    import nodes

    before = set(sys.modules)
    begun, busy = time.perf_counter(), time.thread_time()
    loaded = await nodes.load_custom_node(str(folder), module_parent="custom_nodes")
    spent = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.thread_time() - busy}
    if not loaded:
        print(f"ComfyUI could not import {folder}", file=sys.stderr)
        sys.exit(1)
    return {**spent, "modules": sorted(set(sys.modules) - before)}


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
