"""`python dev.py pictures`: make the help pages' pictures anew, with the shipped model and fixed seeds, on the CPU.

One machine makes the same pictures again; another rounds otherwise, so that the hashes in file names differ.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[0] = str(ROOT / "tests" / "browser")  # not this folder, which is a package
sys.path.append(str(ROOT))  # at the end, so that it hides nothing

import frontend  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from help_pictures import PICTURES  # noqa: E402
from help_pictures.studio import Studio  # noqa: E402
from medsteer_core.errors import MedSteerError  # noqa: E402
from medsteer_core.files.whole_file import write_whole  # noqa: E402
from medsteer_core.run.server import ComfyServer, ServerError, comfyui_from_environment  # noqa: E402
from medsteer_core.run.server import signals_as_interrupt as signals  # noqa: E402
from medsteer_core.run.workflow import WorkflowError  # noqa: E402

MOST_BYTES, QUALITIES = 35_000, range(80, 50, -4)


def main(words: list[str]) -> int:
    names = {Path(path).stem: path for path in PICTURES}
    options = argparse.ArgumentParser(prog="dev.py pictures", description="Make the help pages' pictures anew.")
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(sorted(names))}; none: all")
    options.add_argument("--output", type=Path, default=ROOT / "web" / "docs", help="another folder than web/docs")
    chosen = options.parse_args(words)
    if unknown := [name for name in chosen.names if name not in names]:
        options.error(f"there is no picture {unknown[0]!r}; those there are: {', '.join(sorted(names))}")
    try:
        with signals():
            make([path for name, path in names.items() if name in chosen.names or not chosen.names], chosen.output)
    except (ServerError, WorkflowError, MedSteerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def make(paths: list[str], output: Path) -> None:
    """Write these pictures below ``output``, each as soon as it is made."""
    with sync_playwright() as playwright, ComfyServer(comfyui_from_environment(), ROOT, cpu=True) as server:
        with playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=frontend.FLAGS) as browser:
            studio = Studio(server, browser)
            for path in paths:
                begun = time.monotonic()
                picture = PICTURES[path](studio)
                content = jpeg(picture)
                (output / path).parent.mkdir(parents=True, exist_ok=True)
                write_whole(output / path, content)
                size = f"{picture.width} x {picture.height}, {len(content) / 1000:.0f} kB"
                print(f"{output / path}: {size}, {time.monotonic() - begun:.0f} s", flush=True)


def jpeg(picture: Image.Image) -> bytes:
    """The picture as a JPEG of at most `MOST_BYTES`, if a quality gives that."""
    for quality in QUALITIES:
        written = io.BytesIO()
        picture.save(written, "JPEG", quality=quality, optimize=True)
        if written.tell() <= MOST_BYTES:
            break
    return written.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
