"""The quality benchmark's record: where and with what it was made, and its tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.command import aligned, with_interval
from benchmarks.shared.presets import EXTRACTION_SEED, SPLITS


def seeds_record(split: str, n: int) -> dict[str, Any]:
    """First and last seed of each split at this n; `used` names the split that the numbers are of."""
    ranges = {name: [first, first + n - 1] for name, first in SPLITS.items()}
    return {**ranges, "used": split, "extraction": EXTRACTION_SEED}


def machine(device: torch.device) -> dict[str, Any]:
    """What the seconds were measured on."""
    return {
        "device": str(device), "cpu": _cpu_name(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "system": platform.platform(),
    }  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(record: Mapping[str, Any]) -> str:
    """One aligned table a pair; intervals at 95%."""
    settings, split = record["settings"], record["seeds"]["used"]
    text = [f"\nn = {settings['n']}, {split} seeds, {settings['steps']} steps, cfg {settings['cfg']:g}"]
    for name, pair in record["pairs"].items():
        lines = [("method", "setting", "accepted", "flip [95%]", "SSIM outside", "drift", "off target", "s a pair")]
        for method, row in pair["methods"].items():
            numbers = (row["ssim_outside"], row["anatomy_drift"], row["off_target_drift"], row["seconds"])
            flip = with_interval(row["flip"], row["flip_ci"])
            cells = ["-" if number is None else f"{number:.3f}" for number in numbers]
            lines.append((method, row["setting"], f"{row['accepted']} of {row['n']}", flip, *cells))
        ceiling = pair["ceiling"]
        drift = f"{ceiling['anatomy_drift']:.3f}"
        lines.append(("ceiling", "", "", "", f"{ceiling['ssim_outside']:.3f}", drift, "", ""))
        text += ["", name, *aligned(lines)]
        if beside := pair.get("differences_from_ours"):
            text += ["minus our recipe, on the same seeds:", *aligned(_beside(beside))]
        if pair["dominates"]:
            text.append(f"the recipe dominates: {_said(pair['dominates'])}; is dominated by: "
                        f"{_said(pair['dominated_by'])}")  # fmt: skip
    return "\n".join(text)


def _beside(differences: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Lines of methods beside ours."""
    lines = [("method", "pairs", "flip [95%]", "SSIM outside [95%]", "drift [95%]")]
    for method, row in differences.items():
        told = (with_interval(row[name], row[f"{name}_ci"]) for name in ("flip", "ssim_outside", "anatomy_drift"))
        lines.append((method, str(row["n"]), *told))
    return lines


def _said(booleans: Mapping[str, bool | None]) -> str:
    return ", ".join(f"{name} {'?' if value is None else 'yes' if value else 'no'}" for name, value in booleans.items())
