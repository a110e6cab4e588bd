"""Real images: how near does an edit come to the true counterfactual, with which method, at what cost?

The images are phantoms that no training, judge or extraction saw, so that the same scene can be drawn as the other
class: the truth. Every method gives the change of the latents, which is decoded and added to the image's own pixels;
every method is offered the same lock. Settings are chosen on development scenes by one rule (`--sweep`): of those that
flip at least 0.9 the nearest to the truth. They are in `CHOSEN`; what is reported is of test scenes.

    python dev.py bench real --n 200
    python dev.py bench real --split development --sweep --n 24
    python dev.py bench real --odd --n 60

`--odd` shows ours images out of the training's range: other colours, glare, a scope's frame, burnt-in text.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.evidence._real_methods import BASELINES, OPEN, OURS, PAIRS, Methods, Real, Way, ways
from benchmarks.evidence._real_odd import ODD, text_pixels
from benchmarks.evidence._real_plot import plot
from benchmarks.shared.command import aligned, common_options, finish, with_interval
from benchmarks.shared.lab import Lab, comfyui_version, start_comfyui
from benchmarks.shared.presets import Pair, check_pairs
from benchmarks.shared.record import machine
from benchmarks.shared.sheet import sheet
from medsteer_core.endophantom.true_pairs import true_pairs
from medsteer_core.intervals import bootstrap, newcombe, wilson
from medsteer_core.pictures.own_pixels import edited, without_ghosts
from medsteer_core.scores.scorer import score_pairs

SEEDS = {"development": 700_000, "test": 800_000}
FLIP_WANTED, AROUND, SHOWN = 0.9, 3, 4  # AROUND: pixels about the true change that are not yet outside of it
MEASURES = ("psnr", "ssim_outside", "anatomy_drift")
_FOCAL = {"cfg": 2.0}
# By the rule above, of 24 development scenes each; ours is the recipe's where the node has one.
CHOSEN: Mapping[str, Mapping[str, Way]] = {
    "polyps -> normal cecum": {
        "ours_prompt": Way(0.35, changes={"cfg": 3.0}),
        "ours_both": Way(0.5, changes={**_FOCAL, "start": 0.35}),
        "sdedit": Way(0.5),
        "ddim_inversion": Way(0.6),
        "flowedit": Way(0.35),
        "edit_friendly": Way(0.5),
    },
    "esophagitis -> normal z-line": {
        "ours_prompt": Way(0.35, changes={"cfg": 3.0}),
        "ours_both": Way(0.5, changes={**_FOCAL, "start": 0.35}),
        "sdedit": Way(0.4),
        "ddim_inversion": Way(0.6),
        "flowedit": Way(0.35),
        "edit_friendly": Way(0.5),
    },
    "dyed lifted polyps -> polyps": {
        "ours_prompt": Way(0.35, changes=_FOCAL),
        "ours_both": Way(0.5, changes={**_FOCAL, "start": 0.35}),
        "sdedit": Way(0.4),
        "ddim_inversion": Way(0.4),
        "flowedit": Way(0.5),
        "edit_friendly": Way(0.5),
    },
    "normal cecum -> polyps": {
        "ours_prompt": Way(0.35, changes={"cfg": 3.0}),
        "ours_both": Way(1.0, changes={**_FOCAL, "start": 0.35}),
        "sdedit": Way(0.5),
        "ddim_inversion": Way(0.6),
        "flowedit": Way(0.35),
        "edit_friendly": Way(0.4),
    },
}


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
        record = finish("real_odd", chosen, run_odd, odd_table)
    else:
        record = finish("real_sweep" if chosen.sweep else "real", chosen, run, table)
    return record if isinstance(record, int) else 0


class Case:
    """The images of one pair, their truth, and what is outside the true change."""

    def __init__(self, lab: Lab, pair: Pair, n: int, seed: int, change: Callable[[Tensor], Tensor] = lambda one: one):
        drawn = true_pairs(pair.source, pair.target, n, seed)
        self.lab, self.pair, self.image, self.truth = lab, pair, change(drawn.image), change(drawn.truth)
        self.outside = F.max_pool2d(drawn.mask[:, None], 2 * AROUND + 1, 1, AROUND)[:, 0] == 0
        self.latents = torch.cat([lab.vae.encode(part.movedim(1, -1)) for part in self.image.split(20)])
        self._decoded = self._pixels(self.latents)

    def _pixels(self, latents: Tensor) -> Tensor:
        return torch.cat([self.lab.vae.decode(part)[..., :3].movedim(-1, 1) for part in latents.split(20)])

    def edited(self, latents: Tensor, locked: bool) -> Tensor:
        """The images with what an edit of their latents changes, in 8 bits as they are saved; as the node does it."""
        difference = self._pixels(latents) - self._decoded
        if locked:
            difference = without_ghosts(difference, self.image, self._decoded)
        return (edited(self.image, difference) * 255).round() / 255

    def scores(self, images: Tensor) -> dict[str, list[Any]]:
        """Of each counterfactual: whether it flipped, drift, PSNR to the truth, SSIM outside the true change."""
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        judged = score_pairs(self.image, images, self.pair.source, self.pair.target)
        similar = ssim(images, self.image, data_range=1.0, return_full_image=True)[1].mean(1)
        errors = (images - self.truth).pow(2).flatten(1).mean(1).clamp_min(1e-10)
        return {
            "flip": [bool(score.flipped) for score in judged],
            "psnr": [-10 * float(error.log10()) for error in errors],
            "ssim_outside": [
                float(one[out].mean()) if bool(out.any()) else None
                for one, out in zip(similar, self.outside, strict=True)
            ],
            "anatomy_drift": [score.anatomy_drift for score in judged],
        }


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
        allowed = torch.ones(len(case.latents), *case.latents.shape[-2:], dtype=torch.bool)
        real = Real(pair, case.latents, allowed)
        if not pair.diffuse:
            real = Real(pair, case.latents, methods.lock_of(real))
        rows, shown = {}, {}
        rows["nothing"] = _row(case.scores(case.image), 0, 0)
        rows["truth"] = _row(case.scores(case.truth), 0, 0)
        tried = [(name, way) for name in chosen.methods for way in _ways(name, pair, chosen)]
        for name, way in tried:
            label = _label(name, way)
            images, row = _measured(case, methods, real, name, way, kept / chosen.split / pair.slug, chosen.n)
            rows[label] = row
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
    own = CHOSEN.get(pair.name, {}).get(name)
    return [] if own is None else [own]


def _label(name: str, way: Way) -> str:
    more = [f"{key} {value:g}" for key, value in way.changes.items()]
    return " ".join([name, f"{way.value:g}", *more, way.lock])


def _measured(case: Case, methods: Methods, real: Real, name: str, way: Way, folder: Any, n: int) -> tuple:
    """The images of one setting and their row; both are kept, so that a run that was stopped goes on."""
    path = folder / f"{_label(name, way).replace(' ', '_')}_{n}.pt"
    if path.exists():
        held = torch.load(path, weights_only=True)
        return held["images"].float() / 255, held["row"]
    start = time.monotonic()
    images = case.edited(methods.run(name, real, way), way.lock != OPEN)
    row = _row(case.scores(images), methods.rows, (time.monotonic() - start) / len(images))
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"images": (images * 255).round().to(torch.uint8), "row": row}, path)
    return images, row


def _row(scores: Mapping[str, list], rows: float, seconds: float) -> dict[str, Any]:
    flips = scores["flip"]
    row: dict[str, Any] = {
        "n": len(flips),
        "flip": sum(flips) / len(flips),
        "flip_ci": list(wilson(sum(flips), len(flips))),
    }
    for name in MEASURES:
        values = [value for value in scores[name] if value is not None]
        row |= (
            {name: sum(values) / len(values), f"{name}_ci": list(bootstrap(values) or ())} if values else {name: None}
        )
    return row | {"rows": rows, "seconds": seconds, "each": dict(scores)}


def _best(rows: Mapping[str, Mapping[str, Any]], name: str) -> str | None:
    """The rule of choice: of a method's settings that flip enough the nearest to the truth, else what flips most."""
    own = {label: row for label, row in rows.items() if label.split(" ")[0] == name}
    flips = {label: row for label, row in own.items() if row["flip"] >= FLIP_WANTED}
    if flips:
        return max(flips, key=lambda label: flips[label]["psnr"])
    return max(own, key=lambda label: own[label]["flip"]) if own else None


def _minus_ours(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every method minus our best on the same images, with intervals."""
    mine = [label for label in rows if label.split(" ")[0] in OURS]
    if not mine:
        return {}
    best = max((label for name in OURS if (label := _best(rows, name))), key=lambda label: (
        rows[label]["flip"] >= FLIP_WANTED, rows[label]["psnr"]))  # fmt: skip
    ours, told = rows[best]["each"], {}
    for label, row in rows.items():
        if label in (best, "nothing", "truth"):
            continue
        both = row["each"]["flip"], ours["flip"]
        told[label] = {"flip": row["flip"] - rows[best]["flip"], "flip_ci": list(newcombe(*both))}
        for name in MEASURES:
            values = [a - b for a, b in zip(row["each"][name], ours[name], strict=True) if None not in (a, b)]
            if values:
                told[label] |= {name: sum(values) / len(values), f"{name}_ci": list(bootstrap(values) or ())}
    return {"ours": best, "others": told}


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


@torch.no_grad()
def run_odd(chosen: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Polyps taken out of changed images by the chosen setting of ours; the truth is changed in the same way."""
    start_comfyui(chosen.cpu)
    lab, pair = Lab(), PAIRS[0]
    methods = Methods(lab, lambda _: None)
    way, rows, columns = CHOSEN[pair.name]["ours_prompt"], {}, []
    for name, change in ODD.items():
        case = Case(lab, pair, chosen.n, SEEDS[chosen.split], change)
        real = Real(pair, case.latents, torch.ones(len(case.latents), *case.latents.shape[-2:], dtype=torch.bool))
        images = case.edited(methods.run("ours_prompt", real, way), way.lock != OPEN)
        row = _row(case.scores(images), methods.rows, 0.0)
        nothing = case.edited(case.latents, True)
        row["same_bytes_at_0"] = bool(torch.equal(nothing, case.image))
        row["psnr_of_nothing"] = _row(case.scores(case.image), 0, 0)["psnr"]
        if name == "text overlay":
            changed = ((images - case.image).abs().amax(1) > 0)[:, text_pixels(*images.shape[-2:])]
            row["text_changed"] = float(changed.float().mean())
        rows[name] = row
        columns.append(torch.stack([case.image[:SHOWN], images[:SHOWN], case.truth[:SHOWN]], dim=1))
    record = {
        "settings": {"n": chosen.n, "split": chosen.split, "pair": pair.name, "setting": _label("ours_prompt", way)},
        "machine": machine(lab.model.load_device), "comfyui": comfyui_version(), "images": rows,
    }  # fmt: skip
    return record, sheet(["real", "ours", "truth"], dict(zip(ODD, columns, strict=True)))


def odd_table(record: Mapping[str, Any]) -> str:
    lines = [("images", "flip [95%]", "PSNR to truth", "of nothing", "SSIM outside", "same bytes at 0", "text changed")]
    for name, row in record["images"].items():
        numbers = [with_interval(row[key], row.get(f"{key}_ci")) for key in ("psnr", "ssim_outside")]
        text = f"{row['text_changed']:.3f}" if "text_changed" in row else "-"
        told = (numbers[0], f"{row['psnr_of_nothing']:.2f}", numbers[1], str(row["same_bytes_at_0"]), text)
        lines.append((name, with_interval(row["flip"], row["flip_ci"]), *told))
    return "\n".join([f"{record['settings']['pair']}, n = {record['settings']['n']}", *aligned(lines)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
