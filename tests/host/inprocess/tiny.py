"""Small things to test with: a random PixArt as MODEL, conditionings, a vector, a spy on the cross-attentions.

The PixArt is made of ComfyUI's own classes, three blocks of 48 channels, so that a run takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
from medsteer_pack.medsteer_core.host.loading.pixart import allow_any_size
from medsteer_pack.medsteer_core.host.patching import patch, steer
from medsteer_pack.medsteer_core.host.patching.fingerprint import fingerprint
from medsteer_pack.medsteer_core.host.patching.sites import find_sites
from medsteer_pack.medsteer_core.host.sampling import extraction
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections
from torch import Tensor, nn

WIDTH, DEPTH, CHANNELS, CAPTION = 48, 3, 4, 16


def stock_model(width: int = WIDTH, depth: int = DEPTH, seed: int = 0, **sizes) -> comfy.model_patcher.ModelPatcher:
    """A random PixArt as ComfyUI makes it, which can't run latents of 32x32 and less."""
    config = comfy.supported_models.PixArtAlpha(
        {
            "in_channels": CHANNELS, "hidden_size": width, "depth": depth, "num_heads": 2, "caption_channels": CAPTION,
            "model_max_length": 8, "micro_condition": False, "pred_sigma": False, **sizes,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    config.latent_format = comfy.latent_formats.LatentFormat()
    # With v-prediction even random weights give latents of about unit size.
    model = comfy.model_base.PixArt(config, model_type=comfy.model_base.ModelType.V_PREDICTION).eval()
    fill(model.diffusion_model, seed)
    return comfy.model_patcher.CoreModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def model(**sizes) -> comfy.model_patcher.ModelPatcher:
    """The same for every latent size."""
    return allow_any_size(stock_model(**sizes))


@torch.no_grad()
def fill(network: nn.Module, seed: int) -> None:
    """Random weights (ComfyUI leaves them unset) under which every layer matters and nothing explodes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    for buffer in network.buffers():
        buffer.zero_()


def cond(seed: int, tokens: int = 4) -> list:
    """A CONDITIONING of random tokens."""
    context = torch.randn(1, tokens, CAPTION, generator=torch.Generator().manual_seed(1000 + seed))
    return [[context, {}]]


def latent(height: int = 8, width: int = 8, batch: int = 1, **fields) -> dict:
    return {"samples": torch.zeros(batch, CHANNELS, height, width), **fields}


def run(
    model, positive: list, negative: list, *, steps: int = 6, cfg: float = 4.0, sampler: str = "euler", seed: int = 7,
    size: dict | None = None, scheduler: str = "normal",
) -> Tensor:  # fmt: skip
    """What KSampler gives for an empty latent of this size, its ``batch_index`` included."""
    size = size or latent()
    samples = size["samples"]
    noise = comfy.sample.prepare_noise(samples, seed, size.get("batch_index"))
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, samples, seed=seed, disable_pbar=True
    )


def run_guider(guider, *, steps: int = 4, seed: int = 7, sampler: str = "euler") -> Tensor:
    """What SamplerCustomAdvanced gives with this guider."""
    empty = latent()["samples"]
    sigmas = sampling.schedule(guider.model_patcher, steps, sampler, "normal").sigmas
    noise = comfy.sample.prepare_noise(empty, seed)
    return guider.sample(noise, empty, comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=seed)


def vector(
    model, steps: int = 10, seed: int = 0, names: list[str] | None = None, width: int = WIDTH
) -> PathologyVector:
    """A vector of random unit directions and gaps of 1 at every site of ``model``, or at ``names``."""
    generator = torch.Generator().manual_seed(seed)
    sigmas = sampling.schedule(model, steps, "euler", "normal").sigmas[:-1]

    def site() -> SiteDirections:
        directions = torch.nn.functional.normalize(torch.randn(steps, 1, width, generator=generator), dim=-1)
        gaps, centres = torch.ones(steps, 1), torch.zeros(steps, width)
        return SiteDirections(directions, gaps, centres, torch.stack([gaps, -gaps], 1) / 2, torch.ones(steps, 2))

    names = names or list(find_sites(model.model.diffusion_model))
    return PathologyVector({name: site() for name in names}, sigmas, {"model": fingerprint(model)})


def steered(
    model, vector: PathologyVector, *, operator: str = "ablate", start: float = 0.0, end: float = 1.0,
    sites: str = "all", rows: str = "all", **parameters,
) -> comfy.model_patcher.ModelPatcher:  # fmt: skip
    """The MODEL that the Steer node gives."""
    return steer.steer(model, vector, operator, parameters, start, end, sites, rows)[0]


def request(model, present: list, absent: list, negative: list, *, steps: int = 4, sampler: str = "euler", **changes):
    """An extraction's request with small defaults."""
    fields = {
        "latent": latent(), "samples": 3, "seed": 5, "cfg": 3.0, "noise": extraction.PAIRED,
        "schedule": sampling.schedule(model, steps, sampler, "normal"), **changes,
    }  # fmt: skip
    return extraction.Request(present, absent, negative, **fields)


def rows_of(model, way) -> int:
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


def hook_count(model) -> int:
    """Forward hooks on all modules of the model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.diffusion_model.modules())


def is_steered(model) -> bool:
    return bool(patch.plan_of(model).steerings)


@dataclass(frozen=True, eq=False)
class Row:
    """One row of one site in model call number ``call``: ``raw`` and ``out`` (tokens, C), before and after steering."""

    call: int
    sigma: float
    name: str
    site: str
    raw: Tensor
    out: Tensor

    @property
    def changed(self) -> bool:
        return not torch.equal(self.raw, self.out)


@contextmanager
def spying(model, **conditionings: list) -> Iterator[list[Row]]:
    """Record every site's rows of every call. A row is named by the text that it was given, not by ComfyUI's labels.

    The projection gives the raw output (this hook is older than the pack's), the attention around it the steered one.
    """
    rows: list[Row] = []
    call = SimpleNamespace(number=-1, sigma=0.0, names=[], raw={})
    network = model.model.diffusion_model

    def before_call(_module, _args, kwargs):
        call.number += 1
        call.sigma = float(kwargs["transformer_options"]["sigmas"][0])
        call.names = [_name(context, conditionings) for context in kwargs["context"]]

    def remember(site, output):
        call.raw[site] = output.clone()

    def compare(site, output):
        for index, name in enumerate(call.names):
            rows.append(Row(call.number, call.sigma, name, site, call.raw[site][index], output[index].clone()))

    handles = [network.register_forward_pre_hook(before_call, with_kwargs=True)]
    for site, module in find_sites(network).items():
        attention = network.get_submodule(site.removesuffix(".proj"))
        # A hook must not give back the output: what it returns would replace it.
        handles.append(module.register_forward_hook(lambda _m, _a, out, site=site: remember(site, out)))
        handles.append(attention.register_forward_hook(lambda _m, _a, out, site=site: compare(site, out)))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _name(context: Tensor, conditionings: dict[str, list]) -> str:
    found = [
        name
        for name, conditioning in conditionings.items()
        for text, _options in conditioning
        if text.shape[1:] == context.shape and torch.equal(text[0], context)
    ]
    assert found, "a row was given a text that the test does not know"
    return found[0]


def changed_by_name(rows: list[Row]) -> dict[str, set[bool]]:
    """For each conditioning whether its rows were changed: {True}, {False} or, where only some were, both."""
    result: dict[str, set[bool]] = {}
    for row in rows:
        result.setdefault(row.name, set()).add(row.changed)
    return result
