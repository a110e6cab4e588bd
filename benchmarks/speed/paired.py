"""What Counterfactual Sampler costs against two separate runs of a sampler: model rows, and time.

For windows that start at several shares of the steps, a factual and a steered run of KSampler's kind and one run of
Counterfactual Sampler are made in turn, several times, in one process. Rows are images times conditionings that the
network was given; times are of sampling only. The share of the rows says what the time should be.

    python dev.py bench paired
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from benchmarks.shared.command import aligned, common_options, finish
from benchmarks.shared.lab import CFG, STEPS, Lab, comfyui_version, start_comfyui
from benchmarks.shared.record import machine
from medsteer_core.run.demo import versions

STARTS = (0, 5, 10, 15)  # the first of the 20 steps that is steered
SAMPLES = 4
MOST = 1.05


def main(words: list[str]) -> int:
    options = common_options("paired", "Rows and time of Counterfactual Sampler against two separate runs.")
    options.add_argument("--batch", type=int, default=8, help="pairs made at once (8)")
    options.add_argument("--repeats", type=int, default=7, help="measurements of each kind, in turn (7)")
    chosen = options.parse_args(words)
    if chosen.batch < 1 or chosen.repeats < 1:
        options.error("--batch and --repeats want 1 or more")
    record = finish("paired", chosen, run, table)
    return record if isinstance(record, int) else 0


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], None]:
    """Measure every window: the record for paired.json, and no picture."""
    print("starting ComfyUI in this process ...", flush=True)
    start_comfyui(chosen.cpu)
    lab = Lab()
    vector = lab.extract("polyps", "normal cecum", SAMPLES, noise="same state")
    rows = [one_window(lab, vector, start, chosen.batch, chosen.repeats) for start in STARTS]
    record = {
        "benchmark": "paired", "windows": rows, "batch": chosen.batch, "repeats": chosen.repeats, "most": MOST,
        "steps": STEPS, "machine": machine(lab.model.load_device),
        "versions": versions({"comfyui_version": comfyui_version(), "pytorch_version": torch.__version__}),
    }  # fmt: skip
    return record, None


def one_window(lab: Lab, vector: Any, start: int, batch: int, repeats: int) -> dict[str, Any]:
    """Rows and median seconds of both ways, where steering starts at step ``start``."""
    from medsteer_core.host.patching import patch
    from medsteer_core.host.sampling import counterfactual
    from medsteer_core.steering.operators import make_operator
    from medsteer_core.steering.plan import Steering
    from medsteer_core.vectors.schedule import SigmaWindow

    window = SigmaWindow(float(lab.schedule.sigmas[start]), 0.0)
    operator = make_operator("affine", strength=2.0)
    steered = patch.steered(lab.model, Steering(vector, operator, window, vector.site_names))
    positive, noise = lab.prompt("polyps"), lab.noise(range(batch))
    latent = {"samples": torch.zeros_like(noise)}
    request = counterfactual.PairRequest(positive, lab.conditioning(""), latent, 7, CFG, lab.schedule)

    def separate() -> None:
        for model in (lab.model, steered):
            lab.sample(model, positive, noise)

    def together() -> None:
        counterfactual.sample_pair(steered, request)

    separate_rows, paired_rows = rows_of(lab.model, separate), rows_of(lab.model, together)
    times: dict[str, list[float]] = {"separate": [], "paired": []}
    for _ in range(repeats):
        for name, way in (("separate", separate), ("paired", together)):
            times[name].append(seconds(way))
    ratios = [pair / two for pair, two in zip(times["paired"], times["separate"], strict=True)]
    share, ratio = paired_rows / separate_rows, median(ratios)
    result = {
        "start_step": start, "rows_separate": separate_rows, "rows_paired": paired_rows, "row_share": share,
        "seconds_separate": round(median(times["separate"]), 4), "seconds_paired": round(median(times["paired"]), 4),
        "time_ratio": round(ratio, 4), "time_over_row_share": round(ratio / share, 4),
        "ratios": [round(value, 4) for value in ratios],
    }  # fmt: skip
    print(f"  from step {start}: {ratio:.3f} of the time for {share:.3f} of the rows", flush=True)
    return result


def seconds(way: Callable[[], None]) -> float:
    begun = time.perf_counter()
    way()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def rows_of(model: Any, way: Callable[[], None]) -> int:
    """Images times conditionings that the network is given meanwhile."""
    counted: list[int] = []
    hook = model.model.diffusion_model.register_forward_pre_hook(
        lambda _module, args, kwargs: counted.append((args[0] if args else kwargs["x"]).shape[0]), with_kwargs=True
    )
    try:
        way()
    finally:
        hook.remove()
    return sum(counted)


def table(record: Mapping[str, Any]) -> str:
    lines = [("steered from step", "rows", "share of two runs", "time, share of two runs", "time / rows")]
    for row in record["windows"]:
        rows = f"{row['rows_paired']} of {row['rows_separate']}"
        shares = (f"{row['row_share']:.3f}", f"{row['time_ratio']:.3f}", f"{row['time_over_row_share']:.3f}")
        lines.append((f"{row['start_step']} of {record['steps']}", rows, *shares))
    worst = max(row["time_over_row_share"] for row in record["windows"])
    said = "within" if worst <= record["most"] else "OVER"
    return "\n".join([*aligned(lines), f"largest time / rows {worst:.3f}: {said} {record['most']}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
