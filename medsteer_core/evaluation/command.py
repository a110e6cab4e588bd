"""`python -m medsteer_core.evaluation FOLDER`: evaluate the pairs of a dataset folder (`dataset/pair_dataset.py`).

Exit status 0: every pair was evaluated, and no null test failed; 1: a report was written, and a null test failed, a
pair could not be read or the judge does not know a label; 2: nothing was evaluated. One pair is held at a time.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from ..dataset.pair_dataset import PairDataset
from ..errors import MedSteerError
from ..files.whole_file import write_whole
from ..judges.judge import Judge
from ..scores.lpips import Lpips, load_lpips
from .report import NO_MASK, Scored, report, scored
from .table import markdown, pairs_csv, text

EMBEDDED = "EndoPhantom"
_TOLD = 20  # as many pairs that could not be read are named; the report has all


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives its exit status."""
    chosen = _parser().parse_args(arguments)
    try:
        judge = _judge(chosen.judge, chosen.device)
        found = evaluate_folder(PairDataset(chosen.folder), judge, chosen.split, show_progress=not chosen.quiet)
        _write(Path(chosen.output or _beside(chosen.folder)), found)
    except (MedSteerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for group in found["groups"]:
        print(text(group))
    for problem in found["problems"][:_TOLD]:
        print(f"not evaluated: {problem['pair']}: {problem['why']}", file=sys.stderr)
    if len(found["problems"]) > _TOLD:
        print(f"... and {len(found['problems']) - _TOLD} more; see report.json", file=sys.stderr)
    failed = any(group["null_test"]["passed"] is False for group in found["groups"])
    return 1 if failed or found["problems"] else 0


def evaluate_folder(
    dataset: PairDataset, judge: Judge, split: str | None = None, show_progress: bool = False
) -> dict[str, Any]:
    """`evaluation.report` of every pair of intended labels (``groups``), and the pairs that were left out
    (``problems``). MedSteerError for a folder without any pair that could be evaluated."""
    lpips, missing = load_lpips()
    groups: dict[tuple[str, str], list[Scored]] = {}
    problems = []
    ids = dataset.ids()
    if not ids:
        raise MedSteerError(
            f"{dataset.root} has no pairs; a folder that Save Counterfactual Pairs wrote, with 'records', was expected."
        )
    for number, pair_id in enumerate(ids, start=1):
        try:
            pair = _scored(dataset, pair_id, judge, split, lpips)
        except MedSteerError as error:
            problems.append({"pair": pair_id, "why": str(error)})
            continue
        if pair is not None:
            groups.setdefault((pair.score.source, pair.score.target), []).append(pair)
        if show_progress and sys.stderr.isatty():
            print(f"\r{number} of {len(ids)} pairs", end="\n" if number == len(ids) else "", file=sys.stderr)
    if not groups:
        why = f" The first: {problems[0]['why']}" if problems else f" None is in the split '{split}'."
        raise MedSteerError(f"{dataset.root}: none of {len(ids)} pairs could be evaluated.{why}")
    notes = [missing] if missing else []
    return {
        "judge": judge.identity,
        "groups": [report(pairs, judge, notes) for _, pairs in sorted(groups.items(), key=lambda group: group[0])],
        "problems": problems,
    }


def _scored(dataset: PairDataset, pair_id: str, judge: Judge, split: str | None, lpips: Lpips | None) -> Scored | None:
    """A pair of the folder scored; None for one of another split."""
    record = dataset.record(pair_id)
    if split is not None and record["split"] != split:
        return None
    images = [_pixels(dataset, record, side, "RGB").movedim(-1, 0) for side in ("factual", "counterfactual")]
    mask_source = record.get("mask_source", NO_MASK)
    mask = None if mask_source == NO_MASK else _pixels(dataset, record, "mask", "L")
    label = record["intended_label"]
    more = {"arm": record["arm"], "name": pair_id, "mask": mask, "mask_source": mask_source}
    return scored(*images, label["factual"], label["counterfactual"], judge, **more, lpips=lpips)


def _pixels(dataset: PairDataset, record: dict[str, Any], kind: str, mode: str) -> Tensor:
    """A record's picture in 0..1, ``(H, W, 3)`` for RGB and ``(H, W)`` for L."""
    try:
        with Image.open(io.BytesIO(dataset.image(record, kind))) as picture:
            return torch.from_numpy(numpy.array(picture.convert(mode))).float() / 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, MedSteerError):
            raise
        words = " ".join(str(error).split())
        raise MedSteerError(
            f"the {kind} of pair {record['pair_id']} is not a readable image ({words:.120}). Delete the pair's record, "
            "and run again what made it."
        ) from error


def _judge(name: str, device: str) -> Judge:
    if name == EMBEDDED:
        from ..scores.scorer import embedded_judges

        return embedded_judges()
    from ..judges.files import load_judge

    if not Path(name).exists():
        raise MedSteerError(
            f"There is no judge '{name}'; {EMBEDDED}, a judge's folder or a weights file with its JSON was expected."
        )
    return load_judge(name, device=device)


def _beside(folder: str) -> str:
    # Not inside: loaders would take a folder 'evaluation' for a split, and the plot for one of its images.
    if "://" in folder:
        raise MedSteerError("A dataset at an address was given; say with --output which folder the report goes to.")
    path = Path(folder).resolve()
    return str(path.with_name(f"{path.name}-evaluation"))


def _write(output: Path, found: dict[str, Any]) -> None:
    from .plot import evaluation_picture

    picture = (evaluation_picture(found["groups"]).movedim(0, -1) * 255).round().byte().numpy()
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG")
    files = {
        "pairs.csv": pairs_csv(found["groups"]).encode(),
        "table.md": "\n".join(markdown(group) for group in found["groups"]).encode(),
        "plot.png": png.getvalue(),
        # last: who finds a report finds the rest of the same evaluation
        "report.json": (json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_whole(output / name, data)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m medsteer_core.evaluation",
        description="Evaluate the counterfactual pairs and controls of a dataset folder with a judge.",
        epilog="Exit status 0: all evaluated; 1: a null test failed or pairs were left out; 2: nothing was evaluated.",
    )
    parser.add_argument("folder", help="a folder (or fsspec address) that Save Counterfactual Pairs wrote")
    parser.add_argument(
        "--judge", default=EMBEDDED, help=f"{EMBEDDED} (default), a judge's folder, or a weights file with its JSON"
    )
    parser.add_argument("--device", default="cpu", help="where a judge from files runs: cpu (default) or cuda")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="only this split (default: all)")
    parser.add_argument("--output", help="folder of report.json, table.md, pairs.csv, plot.png (FOLDER-evaluation)")
    parser.add_argument("--quiet", action="store_true", help="no progress line")
    return parser
