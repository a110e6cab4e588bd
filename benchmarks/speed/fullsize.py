"""Whether a full-size PixArt-XL loads, is extracted from and is steered in an ordinary computer's memory, and how fast.

The model has random weights (28 blocks of width 1152 in 16 heads, bfloat16) and is written as Hugging Face ships the
real one, in shards with an index and a config.json, so that nothing is downloaded. Its images are noise; only times and
memory count. Fails when the process ever held more than the limit.

    python dev.py bench fullsize --cpu
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.shared.command import aligned, common_options, finish
from benchmarks.shared.lab import comfyui_version, start_comfyui
from medsteer_core.checkpoints.pixart_state import DIFFUSERS, Sizes, layout
from medsteer_core.errors import MedSteerError

FULL = Sizes(
    DIFFUSERS, width=1152, depth=28, in_channels=4, out_channels=8, caption_channels=4096, patch_size=2,
    micro_conditioning=False,
)  # fmt: skip
HEADS, TOKENS = 16, 120
STEPS, CFG, SEED = 2, 4.0, 1000
SHARD_BYTES = 400e6
LIMIT_GB = 24.0
STEM = "diffusion_pytorch_model"


@dataclass
class Stages:
    """Seconds of each stage, and the most memory that the process has held by its end."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"{name} ...", end="", flush=True)
        begun = time.monotonic()
        yield
        seconds, peak = time.monotonic() - begun, peak_gb()
        self.rows.append({"stage": name, "seconds": round(seconds, 2), "peak_gb": round(peak, 2)})
        print(f" {seconds:.1f} s, {peak:.1f} GB", flush=True)


def main(words: list[str]) -> int:
    options = common_options("fullsize", "Time and memory of a full-size PixArt-XL.")
    options.add_argument("--blocks", type=int, default=FULL.depth, help="blocks of the transformer (28)")
    options.add_argument("--side", type=int, default=64, help="side of the latent, an eighth of the image's (64)")
    chosen = options.parse_args(words)
    if chosen.blocks < 1 or chosen.side < 1:
        options.error("--blocks and --side want 1 or more")
    record = finish("fullsize", chosen, run, table)
    if isinstance(record, int):
        return record
    if record["peak_gb"] > LIMIT_GB:
        print(f"error: {record['peak_gb']:.1f} GB were needed; {LIMIT_GB:g} GB are the limit.", file=sys.stderr)
        return 1
    return 0


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], None]:
    """Write the model, load it, extract, sample without and with steering: the record for fullsize.json, no picture."""
    start_comfyui(chosen.cpu)
    stages, sizes = Stages(), Sizes(**{**vars(FULL), "depth": chosen.blocks})
    with tempfile.TemporaryDirectory(prefix="medsteer-", ignore_cleanup_errors=True) as folder:
        with stages.stage("write the model"):
            files = write_model(Path(folder) / "fullsize", sizes)
        found, device = _measure(stages, folder, chosen.side)
    record = {
        "benchmark": "fullsize",
        "model": {**vars(sizes), "heads": HEADS, "shards": len(files), "bytes": sum(files.values())},
        "found": found,
        "settings": {"steps": STEPS, "cfg": CFG, "latent_side": chosen.side, "tokens": TOKENS, "samples": 1},
        "stages": stages.rows,
        "peak_gb": round(peak_gb(), 2),
        "limit_gb": LIMIT_GB,
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "comfyui": comfyui_version()},
    }
    return record, None


def _measure(stages: Stages, folder: str, side: int) -> tuple[str, str]:
    """Everything after writing; gives what Load DiT says of the model, and the device."""
    import folder_paths

    from medsteer_core.host.loading.checkpoints import load_described
    from medsteer_core.host.patching import steer
    from medsteer_core.host.sampling import extraction
    from medsteer_core.host.sampling import runs as sampling

    folder_paths.add_model_folder_path("diffusion_models", folder)
    present, absent, negative = (conditioning(seed) for seed in range(3))
    with stages.stage("load"):
        loaded = load_described(f"diffusion_models/{os.path.join('fullsize', STEM)}.safetensors.index.json")
    model = loaded.model
    plan = sampling.schedule(model, STEPS, "euler", "normal")
    latent = {"samples": torch.zeros(1, 4, side, side)}
    with stages.stage(f"extract, 1 seed, {STEPS} steps"):
        request = extraction.Request(present, absent, negative, latent, 1, SEED, CFG, extraction.PAIRED, plan)
        vector = extraction.extract(model, request)
    noise = sampling.noise_for(latent["samples"], SEED + 1, [0])
    with stages.stage(f"sample, {STEPS} steps"):
        factual = sampling.sample(model, present, negative, noise, plan, CFG, SEED)
    steered, _ = steer.steer(model, vector, "suppress", {"strength": 1.0}, 0.0, 1.0, "all", "positive")
    with stages.stage(f"sample steered, {STEPS} steps"):
        counterfactual = sampling.sample(steered, present, negative, noise, plan, CFG, SEED)
    _check(factual, counterfactual)
    return loaded.text, str(model.load_device)


def _check(factual: Tensor, counterfactual: Tensor) -> None:
    if not (torch.isfinite(factual).all() and torch.isfinite(counterfactual).all()):
        raise MedSteerError("the model gave values that are no numbers; times of such a run say nothing.")
    if torch.equal(factual, counterfactual):
        raise MedSteerError("steering changed nothing, so its time says nothing.")


def write_model(folder: Path, sizes: Sizes) -> dict[str, int]:
    """Random bfloat16 weights in shards with an index and a config.json; the shards and their bytes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {source: weight.source_shape for weight in layout(sizes) for source in weight.sources}
    shards = split(shapes)
    weight_map: dict[str, str] = {}
    files: dict[str, int] = {}
    for number, keys in enumerate(shards, start=1):
        name = f"{STEM}-{number:05}-of-{len(shards):05}.safetensors"
        save_file({key: weight(shapes[key], generator) for key in keys}, folder / name)
        weight_map.update(dict.fromkeys(keys, name))
        files[name] = (folder / name).stat().st_size
    index = {"metadata": {"total_size": sum(files.values())}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config(sizes)), encoding="utf-8")
    return files


def split(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Names of weights in their order, in shards of about `SHARD_BYTES` in bfloat16."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if shards[-1] and size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(key)
        room -= size
    return shards


def weight(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random weights under which activations keep their size."""
    fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
    return (torch.randn(shape, generator=generator) * fan_in**-0.5).bfloat16()


def config(sizes: Sizes) -> dict[str, Any]:
    """The config.json of PixArt-XL-2-512x512, for these sizes."""
    return {
        "_class_name": "Transformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": sizes.width // HEADS,
        "caption_channels": sizes.caption_channels,
        "cross_attention_dim": sizes.width,
        "in_channels": sizes.in_channels,
        "model_max_length": TOKENS,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_single",
        "num_attention_heads": HEADS,
        "num_layers": sizes.depth,
        "out_channels": sizes.out_channels,
        "patch_size": sizes.patch_size,
        "sample_size": 64,
    }


def conditioning(seed: int) -> list:
    """A CONDITIONING of random tokens, ``(1, 120, 4096)``, as T5-XXL would give."""
    shape = (1, TOKENS, FULL.caption_channels)
    return [[torch.randn(shape, generator=torch.Generator().manual_seed(seed)), {}]]


def peak_gb() -> float:
    """The most memory that this process has held at once, files mapped into memory included."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def table(record: Mapping[str, Any]) -> str:
    """The stages as aligned lines."""
    lines = [("stage", "seconds", "peak memory so far")]
    lines += [(row["stage"], f"{row['seconds']:.1f}", f"{row['peak_gb']:.1f} GB") for row in record["stages"]]
    model, side = record["model"], record["settings"]["latent_side"]
    title = (
        f"PixArt of {model['depth']} blocks, width {model['width']}, {model['bytes'] / 1e9:.2f} GB in "
        f"{model['shards']} shards; {8 * side}x{8 * side} pixels; {record['device']}, {record['threads']} threads"
    )
    notes = f"peak {record['peak_gb']:.1f} GB of {record['limit_gb']:g} GB allowed"
    return "\n".join(["", title, *aligned(lines), notes])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
