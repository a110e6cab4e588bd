"""What the benchmarks share: nodes of API workflows, pixels as tensors, aligned tables, files."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsteer_core.errors import MedSteerError, needs
from medsteer_core.files.whole_file import write_whole
from medsteer_core.pictures.difference import png
from medsteer_core.run.demo import ROOT
from medsteer_core.run.server import ServerError
from medsteer_core.run.workflow import WorkflowError
from medsteer_core.scores.scorer import embedded_judges

TIME_LIMIT = 3600.0


def node(class_type: str, title: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": dict(inputs), "_meta": {"title": title}}


def values(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not isinstance(value, list)}


def tensor(pixels) -> Tensor:
    """uint8 pixels ``(n, H, W, 3)`` as ``(n, 3, H, W)`` in 0..1."""
    return torch.from_numpy(pixels).movedim(-1, 1).float() / 255


def as_saved(images: Tensor) -> Tensor:
    """Images in 0..1 rounded to the 8 bits of a saved PNG."""
    return (images.clamp(0, 1) * 255).round() / 255


def with_interval(value: float | None, interval: list[float] | None) -> str:
    return "-" if value is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of words as columns; the first line is the head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [shown[0], "  ".join("-" * width for width in widths), *shown[1:]]


def check_scoring() -> None:
    """Fail now, not after minutes of sampling, when the judges or the packages for scoring are missing."""
    for package in ("matplotlib", "torchmetrics"):
        with needs(package):
            importlib.import_module(package)
    embedded_judges()


def common_options(name: str, description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(prog=f"dev.py bench {name}", description=description)
    where = ROOT / "output" / "bench"
    options.add_argument("--output", type=Path, default=where, help="another folder for the results")
    options.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    return options


def finish(
    name: str,
    chosen: argparse.Namespace,
    run: Callable[[argparse.Namespace], tuple[dict[str, Any], Tensor | None]],
    table: Callable[[Mapping[str, Any]], str],
) -> dict[str, Any] | int:
    """Run a benchmark, write NAME.json and, where it has a picture, NAME.png, print its table.

    Returns the record, or an exit status on failure.
    """
    try:
        record, sheet = run(chosen)
    except (ServerError, WorkflowError, MedSteerError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_whole(chosen.output / f"{name}.json", json.dumps(record, indent=1, ensure_ascii=False).encode())
    written = [chosen.output / f"{name}.json"]
    if sheet is not None:
        written.append(chosen.output / f"{name}.png")
        write_whole(written[-1], png(sheet))
    print(table(record))
    print("\n".join(f"  {path}" for path in written))
    return record
