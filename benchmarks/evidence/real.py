"""Real images: how near does an edit come to the true counterfactual, with which method, at what cost?

The images are phantoms that no training, judge or extraction saw, so that the same scene can be drawn as the other
class: the truth. Every method gives the change of the latents, which is decoded and added to the image's own pixels;
every method is offered the same lock: where a finding is to come, a user's mask. Settings are chosen on development
scenes by one rule (`--sweep`): of those that flip at least 0.9 the nearest to the truth. They are in `CHOSEN`; what is
reported is of test scenes.

    python dev.py bench real --n 200
    python dev.py bench real --split development --sweep --n 24
    python dev.py bench real --odd --n 60

`--odd` shows ours images out of the training's range: other colours, glare, a scope's frame, burnt-in text.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence import _real_odd
from benchmarks.evidence._choice import FLIP_WANTED
from benchmarks.evidence._real_case import MEASURES, SEEDS, SHOWN, Case, mean_of, row_of
from benchmarks.evidence._real_methods import (
    BASELINES,
    CHOSEN,
    OPEN,
    OURS,
    RECIPE,
    Methods,
    Real,
    Way,
    label_of,
    recipe_of,
    ways,
)
from benchmarks.evidence._real_plot import plot
from benchmarks.shared.command import aligned, common_options, finish, with_interval
from benchmarks.shared.lab import Lab, comfyui_version, start_comfyui
from benchmarks.shared.presets import PAIRS, Pair, check_pairs
from benchmarks.shared.record import machine
from benchmarks.shared.sheet import sheet
from medsteer_core.intervals import newcombe

IN_SHEET = (RECIPE, "ours_both", *BASELINES)


def main(words: list[str]) -> int:
    options = common_options("real", "Counterfactuals of real images against the truth, ours and four baselines.")
    options.add_argument("--n", type=int, default=200, help="images a pair (200)")
    options.add_argument("--split", choices=list(SEEDS), default="test", help="which scenes (test)")
    options.add_argument("--sweep", action="store_true", help="every setting, not the chosen ones alone")
    options.add_argument("--free", action="store_true", help="in a sweep, the settings without a lock too")
    options.add_argument("--odd", action="store_true", help="images out of the training's range, by ours alone")
    options.add_argument("--pairs", nargs="+", metavar="PAIR", help="some of the pairs, as 'source -> target'")
    options.add_argument("--methods", nargs="+", choices=[*OURS, *BASELINES], default=[*OURS, *BASELINES])
    chosen = options.parse_args(words)
    check_pairs(options, chosen.pairs)
    if chosen.n < 2:
        options.error("--n wants 2 or more")
    if chosen.odd:
        record = finish("real_odd", chosen, _real_odd.run, _real_odd.table)
    else:
        record = finish("real_sweep" if chosen.sweep else "real", chosen, run, table)
    return record if isinstance(record, int) else 0


@torch.no_grad()
def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    start_comfyui(chosen.cpu)
    lab = Lab()
    extracted: dict[Pair, Any] = {}

    def vector(pair: Pair) -> Any:
        if pair not in extracted:
            extracted[pair] = lab.extract(pair.source, pair.target, samples=32, noise="same state")
        return extracted[pair]

    methods = Methods(lab, vector)
    kept = chosen.output / "real_kept"
    pairs, blocks = {}, {}
    for pair in PAIRS:
        if chosen.pairs and pair.name not in chosen.pairs:
            continue
        case = Case(lab, pair, chosen.n, SEEDS[chosen.split])
        real = case.masked() if pair.kind == "adding" else case.real()
        if not real.drawn and not pair.diffuse:
            real = replace(real, allowed=methods.lock_of(real))
        rows, shown = {}, {}
        rows["nothing"] = row_of(case.scores(case.image), 0, 0)
        rows["truth"] = row_of(case.scores(case.truth), 0, 0)
        tried = [(name, way) for name in chosen.methods for way in _ways(name, pair, chosen)]
        for name, way in tried:
            label = label_of(name, way)
            images, row = _measured(case, methods, real, name, way, kept / chosen.split / pair.slug, chosen.n)
            rows[label] = row
            if name in IN_SHEET:
                shown[label] = images
            print(f"{pair.name}: {_line(label, row)}", flush=True)
        pairs[pair.name] = {
            "methods": rows,
            "mask": float(real.allowed.float().mean()),
            "minus_ours": _minus_ours(rows),
            "chosen": {name: _best(rows, name) for name in chosen.methods},
        }
        if not chosen.sweep and shown:
            columns = [case.image, case.truth, *shown.values()]
            blocks[pair.name] = torch.stack([images[:SHOWN] for images in columns], dim=1)
            names = ["real", "truth", *(label.split(" ")[0].replace("_", " ") for label in shown)]
    record = {
        "settings": {"n": chosen.n, "split": chosen.split, "sweep": chosen.sweep, "seed": SEEDS[chosen.split]},
        "machine": machine(lab.model.load_device), "comfyui": comfyui_version(), "pairs": pairs,
    }  # fmt: skip
    return record, plot(pairs) if chosen.sweep else sheet(names, blocks) if blocks else None


def _ways(name: str, pair: Pair, chosen: argparse.Namespace) -> list[Way]:
    if chosen.sweep:
        return ways(name, pair, chosen.free)
    if name == RECIPE:
        return [recipe_of(pair)]
    own = CHOSEN.get(pair.name, {}).get(name)
    return [] if own is None else [own]


def _measured(case: Case, methods: Methods, real: Real, name: str, way: Way, folder: Any, n: int) -> tuple:
    """The images of one setting and their row; both are kept, so that a run that was stopped goes on."""
    own = label_of("ours_prompt" if name == RECIPE else name, way)  # one and the same
    path = folder / f"{own.replace(' ', '_')}_{n}.pt"
    if path.exists():
        held = torch.load(path, weights_only=True)
        return held["images"].float() / 255, held["row"]
    start = time.monotonic()
    images = case.edited(methods.run(name, real, way), way.lock != OPEN)
    row = row_of(case.scores(images), methods.rows, (time.monotonic() - start) / len(images))
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"images": (images * 255).round().to(torch.uint8), "row": row}, path)
    return images, row


def _best(rows: Mapping[str, Mapping[str, Any]], name: str) -> str | None:
    """The rule of choice: of a method's settings that flip enough the nearest to the truth, else what flips most."""
    own = {label: row for label, row in rows.items() if label.split(" ")[0] == name}
    flips = {label: row for label, row in own.items() if row["flip"] >= FLIP_WANTED}
    if flips:
        return max(flips, key=lambda label: flips[label]["psnr"])
    return max(own, key=lambda label: own[label]["flip"]) if own else None


def _minus_ours(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every other row minus the node's recipe on the same images, with intervals."""
    mine = [label for label in rows if label.split(" ")[0] == RECIPE]
    if not mine:
        return {}
    told, ours = {}, rows[mine[0]]
    for label, row in rows.items():
        if label in (mine[0], "nothing", "truth"):
            continue
        both = row["each"]["flip"], ours["each"]["flip"]
        told[label] = {"flip": row["flip"] - ours["flip"], "flip_ci": list(newcombe(*both))}
        for name in MEASURES:
            couples = zip(row["each"][name], ours["each"][name], strict=True)
            told[label] |= mean_of(name, [a - b for a, b in couples if None not in (a, b)])
    return {"ours": mine[0], "others": told}


def _line(label: str, row: Mapping[str, Any]) -> str:
    return f"{label}: flip {row['flip']:.3f}, PSNR {row['psnr']:.2f}, {row['seconds']:.2f} s an image"


def table(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    text = [f"\nn = {settings['n']}, {settings['split']} scenes"]
    for name, pair in record["pairs"].items():
        lines = [("method", "flip [95%]", "PSNR to truth", "SSIM outside", "drift", "rows", "s")]
        for label, row in pair["methods"].items():
            numbers = [with_interval(row[key], row.get(f"{key}_ci")) for key in MEASURES]
            flip = with_interval(row["flip"], row["flip_ci"])
            lines.append((label, flip, *numbers, f"{row['rows']:.0f}", f"{row['seconds']:.2f}"))
        text += ["", f"{name} (the lock's mask: {pair['mask']:.2f} of the image)", *aligned(lines)]
        if beside := pair["minus_ours"]:
            lines = [("minus " + beside["ours"], "flip [95%]", "PSNR [95%]", "SSIM outside [95%]", "drift [95%]")]
            for label, row in beside["others"].items():
                told = (with_interval(row.get(key), row.get(f"{key}_ci")) for key in ("flip", *MEASURES))
                lines.append((label, *told))
            text += aligned(lines)
        if settings["sweep"]:
            text.append("chosen: " + "; ".join(str(label) for label in pair["chosen"].values()))
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
