"""What a counterfactual pair costs: model rows, seconds and memory of Counterfactual Sampler's ways and of others'.

On EndoPhantom and on a PixArt of XL's width with 1024 tokens (random weights, few blocks) are made in turn, several
times, in one process: one plain image; two; the default locked pair by steering, with all tokens and with those of its
mask; a pair by another prompt under the same lock; and two runs of diffusers' own PixArt pipeline with forward hooks on
its cross-attention, as the published code makes a pair. Same weights, same steps. Ratios are to
the plain image of the same turn. Rows are images times conditionings that the network was given, each for the share of
its tokens that was computed.

    python dev.py bench paired
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shared.command import aligned, common_options, finish
from benchmarks.shared.lab import CFG, STEPS, Lab, comfyui_version, start_comfyui
from benchmarks.shared.record import machine
from medsteer_core.run.demo import versions

ENDOPHANTOM, XL = "EndoPhantom", "XL width"
PLAIN, TWO, DENSE, SPARSE, PROMPT, THEIRS = (
    "one plain image", "two plain images", "locked pair, all tokens", "locked pair, the mask's tokens",
    "locked pair by prompt, the mask's tokens", "diffusers with hooks, two runs",
)  # fmt: skip
START, SEED, SAMPLES = 0.45, 7, 4
WIDTH, HEADS, CAPTIONS, TEXT, SIDE = 1152, 16, 4096, 120, 64  # PixArt-XL-2-512x512's, 1024 tokens
SHARE = 0.25  # of the XL-width image's tokens, those in the mask
# What the ratios to one plain image should not be above, and pairs a minute to the reference's not below.
MOST = {DENSE: 1.6, SPARSE: 1.25}
LEAST = 1.5


@dataclass(frozen=True)
class Scene:
    """A model, and what makes an image or a pair of it in each way."""

    name: str
    model: Any
    ways: Mapping[str, Callable[[], Any]]


def main(words: list[str]) -> int:
    options = common_options("paired", "What a counterfactual pair costs, in several ways.")
    options.add_argument("--blocks", type=int, default=2, help="blocks of the model of XL's width (2)")
    options.add_argument("--repeats", type=int, default=3, help="measurements of each way, in turn (3)")
    options.add_argument("--only", choices=(ENDOPHANTOM, XL), help="one of the two models")
    chosen = options.parse_args(words)
    if chosen.blocks < 1 or chosen.repeats < 1:
        options.error("--blocks and --repeats want 1 or more")
    record = finish("paired", chosen, run, table)
    return record if isinstance(record, int) else 0


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], None]:
    """Measure every way on both models: the record for paired.json, and no picture."""
    print("starting ComfyUI in this process ...", flush=True)
    start_comfyui(chosen.cpu)
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True  # as on a GPU, and as diffusers does everywhere
    scenes, device = {}, None
    with tempfile.TemporaryDirectory(prefix="medsteer-", ignore_cleanup_errors=True) as folder:
        for name, build in ((ENDOPHANTOM, lambda: endophantom()), (XL, lambda: xl(Path(folder), chosen.blocks))):
            if chosen.only in (None, name):
                scene = build()
                scenes[name] = measured(scene, chosen.repeats)
                device = scene.model.load_device
    record = {
        "benchmark": "paired", "scenes": scenes, "repeats": chosen.repeats, "blocks": chosen.blocks, "steps": STEPS,
        "start": START, "most": MOST, "least": LEAST, "machine": machine(device),
        "versions": versions({"comfyui_version": comfyui_version(), "pytorch_version": torch.__version__}),
    }  # fmt: skip
    return record, None


def endophantom() -> Scene:
    """The embedded model, and the example's pair: polyps to normal cecum, affine, lock by a map."""
    lab = Lab()
    vector = lab.extract("polyps", "normal cecum", SAMPLES, noise="same state")
    prompts = lab.prompt("polyps"), lab.conditioning(""), lab.prompt("normal cecum")
    latent = {"samples": torch.zeros(1, 4, lab.latent["samples"].shape[-2], lab.latent["samples"].shape[-1])}
    steered = _steered(lab.model, vector, "affine", {"strength": 2.0, "focus": 1.0})
    theirs = endophantom_of_diffusers(lab.model)
    directions = [vector.at_sites(vector.site_names, 1.0)[name].directions[0] for name in vector.site_names]
    side = latent["samples"].shape[-1]
    ways = _ways(lab.model, steered, prompts, latent, None)
    return Scene(ENDOPHANTOM, lab.model, {**ways, THEIRS: lambda: by_diffusers(theirs, prompts, directions, side)})


def endophantom_of_diffusers(model: Any) -> nn.Module:
    """The embedded model's weights in diffusers' PixArt. RuntimeError where the two answer differently."""
    import comfy.model_management
    import comfy.utils
    import diffusers

    comfy.model_management.load_models_gpu([model])
    ours = model.model.diffusion_model
    sizes = model.model.model_config.unet_config
    width, channels, longest = sizes["hidden_size"], sizes["in_channels"], sizes["model_max_length"]
    side = 16  # of the latent for which the pipeline makes position embeddings: EndoPhantom's 128 pixels
    theirs = diffusers.PixArtTransformer2DModel(
        num_attention_heads=sizes["num_heads"], attention_head_dim=width // sizes["num_heads"], in_channels=channels,
        out_channels=channels, num_layers=sizes["depth"], sample_size=64, caption_channels=sizes["caption_channels"],
        cross_attention_dim=width, use_additional_conditions=False, interpolation_scale=sizes["pe_interpolation"],
    ).eval()  # fmt: skip
    weights = ours.state_dict()
    for name, source in comfy.utils.pixart_to_diffusers(sizes).items():
        key, (_axis, start, length) = (source, (0, 0, None)) if isinstance(source, str) else source
        if key in weights and name in theirs.state_dict():
            value = weights[key]
            theirs.state_dict()[name].copy_(value if length is None else value.narrow(0, start, length))
    theirs.to(model.load_device)
    latent = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0)).to(model.load_device)
    text = torch.randn(1, longest, sizes["caption_channels"], generator=torch.Generator().manual_seed(1)).to(latent)
    level = torch.tensor([500.0], device=latent.device)
    with torch.no_grad():
        one = ours(latent, level, context=text)
        other = theirs(latent, encoder_hidden_states=text, timestep=level, return_dict=False,
                       added_cond_kwargs={"resolution": None, "aspect_ratio": None})[0]  # fmt: skip
    if (one - other).abs().max() > 1e-3 * one.abs().max():
        raise RuntimeError(f"diffusers' PixArt differs by {(one - other).abs().max():.3g} from the embedded model's.")
    return theirs


def xl(folder: Path, blocks: int) -> Scene:
    """A random PixArt of XL's width from diffusers, loaded by Load DiT, with a mask over a quarter of its tokens."""
    import diffusers
    import folder_paths

    from medsteer_core.host.loading.checkpoints import load_described
    from medsteer_core.host.patching import fingerprint
    from medsteer_core.host.patching.sites import find_sites
    from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections

    torch.manual_seed(0)
    theirs = diffusers.PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, num_layers=blocks, sample_size=SIDE,
        caption_channels=CAPTIONS, cross_attention_dim=WIDTH, use_additional_conditions=False,
    ).eval()  # fmt: skip
    theirs.save_pretrained(folder / "xl")
    folder_paths.add_model_folder_path("diffusion_models", str(folder))
    model = load_described("diffusion_models/xl/diffusion_pytorch_model.safetensors").model
    shutil.rmtree(folder / "xl")
    generator = torch.Generator().manual_seed(1)

    def site() -> SiteDirections:
        directions = nn.functional.normalize(torch.randn(1, 1, WIDTH, generator=generator), dim=-1)
        one = torch.ones(1, 1)
        return SiteDirections(directions, one, torch.zeros(1, WIDTH), torch.tensor([[[0.5], [-0.5]]]), torch.ones(1, 2))

    names = list(find_sites(model.model.diffusion_model))
    vector = PathologyVector({name: site() for name in names}, torch.ones(1), {"model": fingerprint.fingerprint(model)})
    prompts = tuple(
        [[torch.randn(1, TEXT, CAPTIONS, generator=torch.Generator().manual_seed(seed)), {}]] for seed in range(3)
    )
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, : SIDE // 2, : int(2 * SHARE * SIDE)] = 1
    steered = _steered(model, vector, "suppress", {"strength": 2.0})
    ways = _ways(model, steered, prompts, {"samples": torch.zeros(1, 4, SIDE, SIDE)}, mask)
    directions = [vector.sites[name].directions[0, 0] for name in names]
    theirs = theirs.to(model.load_device)
    return Scene(XL, model, {**ways, THEIRS: lambda: by_diffusers(theirs, prompts, directions, SIDE)})


def _steered(model: Any, vector: Any, operator: str, parameters: Mapping[str, float]) -> Any:
    from medsteer_core.host.patching import steer

    return steer.steer(model, vector, operator, parameters, START, 1.0, "all", "all")[0]


def _ways(model: Any, steered: Any, prompts: tuple, latent: dict, mask: Tensor | None) -> dict[str, Callable[[], Any]]:
    from medsteer_core.host.sampling import runs as sampling
    from medsteer_core.host.sampling.counterfactual import sample_pair
    from medsteer_core.host.sampling.pair_request import ALL, CONCEPT, IN_MASK, PREDICTION, PairRequest

    schedule = sampling.schedule(model, STEPS, "euler", "normal")
    positive, negative, other = prompts
    noise = sampling.noise_for(sampling.empty_latent(model, latent), SEED, [0])

    def plain(which: Any = model) -> None:
        sampling.sample(which, positive, negative, noise, schedule, CFG, SEED)

    def pair(which: Any, tokens: str, **changes: Any) -> Any:
        asked = PairRequest(positive, negative, latent, SEED, CFG, schedule, mask=mask, computed_tokens=tokens,
                            **{"lock": CONCEPT, **changes})  # fmt: skip
        return sample_pair(which, asked)

    return {
        PLAIN: plain,
        TWO: lambda: (plain(), plain(steered)),
        DENSE: lambda: pair(steered, ALL),
        SPARSE: lambda: pair(steered, IN_MASK),
        PROMPT: lambda: pair(model, IN_MASK, lock=PREDICTION, counterfactual=other, start_percent=START),
    }


@torch.no_grad()
def by_diffusers(transformer: Any, prompts: tuple, directions: list[Tensor], side: int) -> None:
    """Two runs of diffusers' pipeline from one noise, hooks on every cross-attention in the second.

    ``prompts`` are conditionings of one image, ``directions (C,)`` a block's each, ``side`` the latent's.
    """
    import diffusers

    scheduler = diffusers.DPMSolverMultistepScheduler()
    pipeline = diffusers.PixArtAlphaPipeline(None, None, None, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    device = next(transformer.parameters()).device
    positive, negative, _other = (prompt[0][0].to(device) for prompt in prompts)
    longest = max(positive.shape[1], negative.shape[1])
    padded = [nn.functional.pad(text, (0, 0, 0, longest - text.shape[1])) for text in (positive, negative)]
    attended = [(torch.arange(longest, device=device) < text.shape[1])[None].float() for text in (positive, negative)]
    settings = {
        "prompt": None, "negative_prompt": None, "prompt_embeds": padded[0], "prompt_attention_mask": attended[0],
        "negative_prompt_embeds": padded[1], "negative_prompt_attention_mask": attended[1],
        "num_inference_steps": STEPS, "guidance_scale": CFG, "height": 8 * side, "width": 8 * side,
        "output_type": "latent",
        "use_resolution_binning": False, "clean_caption": False,
    }  # fmt: skip

    def suppress(direction: Tensor) -> Callable:
        direction = direction.to(device)

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            along = (output @ direction).clamp_min(0)[..., None]
            steered = output - 2 * along * direction
            return steered * (output.norm(dim=-1, keepdim=True) / steered.norm(dim=-1, keepdim=True))

        return hook

    for hooked in (False, True):
        handles = [
            block.attn2.register_forward_hook(suppress(direction))
            for block, direction in zip(transformer.transformer_blocks, directions, strict=True)
        ] if hooked else []  # fmt: skip
        try:
            pipeline(generator=torch.Generator().manual_seed(SEED), **settings)
        finally:
            for handle in handles:
                handle.remove()


def measured(scene: Scene, repeats: int) -> dict[str, Any]:
    """Rows, seconds, ratios to a plain image of the same turn, and on CUDA the memory of each way."""
    ways: dict[str, dict[str, Any]] = {}
    scene.ways[PLAIN]()  # once before anything is timed
    for turn in range(repeats):
        for name, way in scene.ways.items():
            (taken, rows), peak = with_peak(lambda way=way: token_rows_of(scene.model, lambda: seconds(way)))
            found = ways.setdefault(name, {"seconds": [], "rows": rows, "peak_bytes": peak})
            found["seconds"].append(taken)
        print(f"  {scene.name}: turn {turn + 1} of {repeats}", flush=True)
    for found in ways.values():
        found["ratios"] = [own / one for own, one in zip(found["seconds"], ways[PLAIN]["seconds"], strict=True)]
        found["ratio"], found["pairs_a_minute"] = median(found["ratios"]), 60 / median(found["seconds"])
        if found["rows"]:
            found["row_ratio"] = found["rows"] / ways[PLAIN]["rows"]
    return ways


def with_peak(way: Callable[[], Any]) -> tuple[Any, int | None]:
    """What ``way`` gives, and the most bytes that CUDA held meanwhile (None on the CPU)."""
    if not torch.cuda.is_available():
        return way(), None
    torch.cuda.reset_peak_memory_stats()
    return way(), torch.cuda.max_memory_allocated()


def seconds(way: Callable[[], None]) -> float:
    begun = time.perf_counter()
    way()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def token_rows_of(model: Any, way: Callable[[], Any]) -> tuple[Any, float]:
    """What ``way`` gives, and images times conditionings, each for the share of its tokens that an MLP is given."""
    counted: list[tuple[int, int]] = []
    network = model.model.diffusion_model
    handle = network.blocks[0].mlp.register_forward_pre_hook(lambda _module, args: counted.append(args[0].shape[:2]))
    try:
        given = way()
    finally:
        handle.remove()
    most = max((tokens for _rows, tokens in counted), default=1)
    return given, sum(rows * tokens for rows, tokens in counted) / most


def table(record: Mapping[str, Any]) -> str:
    """A table for each model, and whether its ratios are within what they should be."""
    lines: list[str] = []
    for scene, ways in record["scenes"].items():
        rows = [("way", "rows, to a plain image", "time, to a plain image", "pairs a minute")]
        for name, found in ways.items():
            share = f"{found['row_ratio']:.2f}" if "row_ratio" in found else ""
            spread = f"{found['ratio']:.2f} [{min(found['ratios']):.2f}, {max(found['ratios']):.2f}]"
            rows.append((name, share, spread, "" if name == PLAIN else f"{found['pairs_a_minute']:.2f}"))
        lines += ["", f"{scene}, {record['steps']} steps", *aligned(rows)]
        for name, most in record["most"].items() if scene == XL else ():
            said = "within" if ways[name]["ratio"] <= most else "OVER"
            lines.append(f"{name}: {said} {most} times a plain image")
        if THEIRS in ways:
            gain = ways[SPARSE]["pairs_a_minute"] / ways[THEIRS]["pairs_a_minute"]
            said = "at least" if gain >= record["least"] else "BELOW"
            lines.append(f"pairs a minute, to the reference's: {gain:.2f}, {said} {record['least']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
