"""Tiny random models of every family, of ComfyUI's own classes, each with what it is sampled with.

Two blocks and a few dozen channels each: a run takes a fraction of a second. `ALL` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.supported_models as supported
import tiny
import torch
from comfy.ldm.anima.model import LLMAdapter
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor
from comfy.ops import disable_weight_init
from medsteer_pack.medsteer_core.host.patching import levels
from medsteer_pack.medsteer_core.host.patching.fingerprint import fingerprint
from medsteer_pack.medsteer_core.host.patching.sites import find_sites, output_width
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections
from torch import Tensor, nn

TEXT = 16  # channels of a text token


@dataclass(frozen=True, eq=False)
class Small:
    """One tiny model: how it is made, and what is known of it without looking.

    ``latent`` is the shape of one empty latent, ``tokens`` how many tokens a site gives for it (by site, where sites
    differ), ``tokens_first`` whether they come before the rows, ``sound`` the shape of the sound beside a video.
    """

    family: str
    build: Callable[[], nn.Module]
    sites: tuple[str, ...]
    latent: tuple[int, ...]
    tokens: tuple[int, ...]
    options: Callable[[int], dict[str, Any]] = lambda _seed: {}
    words: int = 4
    text: int = TEXT
    tokens_first: bool = False
    sound: tuple[int, ...] = ()

    def model(self) -> ModelPatcher:
        base = self.build().eval()
        fill(base.diffusion_model)
        return comfy.model_patcher.CoreModelPatcher(base, torch.device("cpu"), torch.device("cpu"))

    def cond(self, seed: int) -> list:
        """A CONDITIONING of random tokens, with what else the family wants of one."""
        return [[random(seed, 1, self.words, self.text), self.options(seed)]]

    def empty(self, batch: int = 1, **fields) -> dict:
        samples = torch.zeros(batch, *self.latent[1:])
        if self.sound:
            samples = NestedTensor([samples, torch.zeros(batch, *self.sound[1:])])
        return {"samples": samples, **fields}

    def run(self, model, positive: list, negative: list, *, images: tuple[int, ...] = (0,), steps: int = 2,
            cfg: float = 3.0) -> Tensor:  # fmt: skip
        """What KSampler gives for an empty latent, of these images of a batch; of video and sound the video."""
        samples = self.empty(len(images))["samples"]
        noise = sampling.noise_for(samples, 7, images)
        latents = comfy.sample.sample(
            model, noise, steps, cfg, "euler", "normal", positive, negative, samples, seed=7, disable_pbar=True
        )
        return latents.tensors[0] if latents.is_nested else latents


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Random weights (ComfyUI leaves them unset) under which every layer matters; norms near 1, biases small."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))


def made(config: type, **sizes) -> Callable[[], nn.Module]:
    """How ComfyUI makes a model of this class of supported_models.py, with other sizes."""

    def build() -> nn.Module:
        settings = config({**config.unet_config, **sizes})
        settings.set_inference_dtype(torch.float32, None)
        return settings.get_model({}, "")

    return build


def unet(config: type, **sizes) -> Callable[[], nn.Module]:
    """A UNet of two levels, the lower one with attention, the SDXL one with two blocks deep."""
    common = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": (1, 2), "use_spatial_transformer": True, "context_dim": TEXT, "legacy": False,
    }  # fmt: skip
    return made(config, **{**common, **sizes})


def numbered(pattern: str, count: int = 2) -> tuple[str, ...]:
    return tuple(pattern.format(index) for index in range(count))


def _hunyuan(seed: int) -> dict[str, Any]:
    return {
        "attention_mask": torch.ones(1, 77), "attention_mask_mt5xl": torch.ones(1, 256),
        "conditioning_mt5xl": random(seed + 50, 1, 256, 32),
    }  # fmt: skip


def _mask(_seed: int) -> dict[str, Any]:
    return {"attention_mask": torch.ones(1, 4, dtype=torch.int64)}


def _t5_tokens(seed: int) -> dict[str, Any]:
    return {"t5xxl_ids": torch.arange(6) + 10 * seed, "t5xxl_weights": torch.ones(6)}


def _pooled(width: int) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {"pooled_output": random(seed + 50, 1, width)}


def _clip_image(_seed: int) -> dict[str, Any]:
    """The start image, the same for every prompt: its latent and what CLIP sees in it."""
    return {
        "concat_latent_image": random(90, 1, 16, 2, 4, 6),
        "clip_vision_output": SimpleNamespace(penultimate_hidden_states=random(91, 1, 5, 1280)),
    }


def _anima() -> nn.Module:
    """Its llm_adapter is 2 GB in every size that ComfyUI makes: a small one of the same class takes its place."""
    base = made(supported.Anima, **COSMOS)()
    base.diffusion_model.llm_adapter = LLMAdapter(
        source_dim=TEXT, target_dim=TEXT, model_dim=TEXT, num_layers=1, num_heads=2, operations=disable_weight_init
    )
    return base


WAN = {"dim": 48, "ffn_dim": 64, "freq_dim": 16, "text_dim": TEXT, "num_heads": 2, "num_layers": 2}
COSMOS = {
    "max_img_h": 16, "max_img_w": 16, "max_frames": 8, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 48, "num_blocks": 2, "num_heads": 2, "use_adaln_lora": True,
    "adaln_lora_dim": 8, "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "concat_padding_mask": True,
    "crossattn_emb_channels": TEXT,
}  # fmt: skip
COSMOS1 = {
    **COSMOS, "block_config": "FA-CA-MLP", "block_x_format": "THWBD", "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
LTX = {
    "in_channels": 128, "cross_attention_dim": 48, "attention_head_dim": 24, "num_attention_heads": 2,
    "caption_channels": TEXT, "num_layers": 2,
}  # fmt: skip
LTX2 = {
    **LTX, "audio_in_channels": 128, "audio_cross_attention_dim": 32, "audio_attention_head_dim": 16,
    "audio_num_attention_heads": 2, "connector_attention_head_dim": 8, "connector_num_attention_heads": 2,
}  # fmt: skip
KANDINSKY = {
    "in_text_dim": TEXT, "in_text_dim2": 8, "time_dim": 32, "model_dim": 48, "ff_dim": 64, "num_text_blocks": 1,
    "num_visual_blocks": 2, "axes_dims": (8, 8, 8),
}  # fmt: skip
UNET = ("input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1")
UNET_SITES = tuple(f"{block}.transformer_blocks.0.attn2.to_out" for block in UNET)
XL_SITES = tuple(f"{block}.transformer_blocks.{index}.attn2.to_out" for block in UNET for index in range(2))
FRAMES = (1, 16, 2, 4, 6)  # two latent frames of 4 x 6
VIDEO = (2 * 2 * 3,) * 2  # with patches of 1 x 2 x 2

ALL: dict[str, Small] = {
    "hunyuan_dit": Small(
        "HunyuanDiT",
        made(supported.HunyuanDiT1, hidden_size=48, depth=4, num_heads=2, text_states_dim=TEXT, text_states_dim_t5=32),
        numbered("blocks.{}.attn2.out_proj", 4), (1, 4, 4, 6), (6,) * 4, _hunyuan, words=77,
    ),
    "wan_t2v": Small(
        "Wan 2.x (text and image to video, VACE)", made(supported.WAN21_T2V, **WAN),
        numbered("blocks.{}.cross_attn.o"), FRAMES, VIDEO,
    ),
    "wan_i2v": Small(
        "Wan 2.x (text and image to video, VACE)", made(supported.WAN21_I2V, **WAN),
        numbered("blocks.{}.cross_attn.o"), FRAMES, VIDEO, _clip_image,
    ),
    "wan_vace": Small(
        "Wan 2.x (text and image to video, VACE)",
        made(supported.WAN21_Vace, **{**WAN, "num_layers": 4}, vace_layers=2, vace_in_dim=96),
        ("blocks.0.cross_attn.o", "vace_blocks.0.cross_attn.o", "blocks.1.cross_attn.o", "blocks.2.cross_attn.o",
         "vace_blocks.1.cross_attn.o", "blocks.3.cross_attn.o"), FRAMES, VIDEO * 3,
    ),
    "ltxv": Small(
        "LTX-Video", made(supported.LTXV, **LTX), numbered("transformer_blocks.{}.attn2.to_out"), (1, 128, 2, 2, 3),
        (12, 12), _mask,
    ),
    "ltx2": Small(
        "LTX-Video", made(supported.LTXAV, **LTX2), numbered("transformer_blocks.{}.attn2.to_out"), (1, 128, 2, 2, 3),
        (12, 12), _mask, text=2 * TEXT, sound=(1, 8, 5, 16),
    ),
    "cosmos": Small(
        "Cosmos 1", made(supported.CosmosT2V, **COSMOS1), numbered("blocks.block{}.blocks.1.block.attn.to_out"),
        FRAMES, VIDEO, tokens_first=True,
    ),
    "cosmos_predict2": Small(
        "Cosmos Predict2, Anima", made(supported.CosmosT2IPredict2, **COSMOS),
        numbered("blocks.{}.cross_attn.output_proj"), FRAMES, VIDEO,
    ),
    "anima": Small(
        "Cosmos Predict2, Anima", _anima, numbered("blocks.{}.cross_attn.output_proj"), (1, 16, 1, 4, 6), (6, 6),
        _t5_tokens,
    ),
    "kandinsky5": Small(
        "Kandinsky 5", made(supported.Kandinsky5, visual_embed_dim=132, **KANDINSKY),
        numbered("visual_transformer_blocks.{}.cross_attention.out_layer"), FRAMES, VIDEO, _pooled(8),
    ),
    "sd15": Small(
        "Stable Diffusion 1.x, 2.x and XL",
        unet(supported.SD15, transformer_depth=[0, 1], transformer_depth_output=[0, 0, 1, 1],
             transformer_depth_middle=1),
        UNET_SITES, (1, 4, 4, 6), (6,) * 4,
    ),
    "sd21": Small(
        "Stable Diffusion 1.x, 2.x and XL",
        unet(supported.SD20, transformer_depth=[0, 1], transformer_depth_output=[0, 0, 1, 1],
             transformer_depth_middle=1),
        UNET_SITES, (1, 4, 4, 6), (6,) * 4,
    ),
    "sdxl": Small(
        "Stable Diffusion 1.x, 2.x and XL",
        unet(supported.SDXL, transformer_depth=[0, 2], transformer_depth_output=[0, 0, 2, 2],
             transformer_depth_middle=2, num_classes="sequential", adm_in_channels=8 + 6 * 256),
        XL_SITES, (1, 4, 4, 6), (6,) * 8, _pooled(8),
    ),
}  # fmt: skip


def vector(model: ModelPatcher, steps: int = 4, seed: int = 0) -> PathologyVector:
    """A vector of random unit directions and gaps of 1 at every site, each of its site's width."""
    generator = torch.Generator().manual_seed(seed)
    sigmas = sampling.schedule(model, steps, "euler", "normal").sigmas[:-1]

    def site(width: int) -> SiteDirections:
        directions = torch.nn.functional.normalize(torch.randn(steps, 1, width, generator=generator), dim=-1)
        gaps, centres = torch.ones(steps, 1), torch.zeros(steps, width)
        return SiteDirections(directions, gaps, centres, torch.stack([gaps, -gaps], 1) / 2, torch.ones(steps, 2))

    sites = find_sites(model.model.diffusion_model)
    flow = levels.is_flow(model)
    values = {name: site(output_width(module)) for name, module in sites.items()}
    return PathologyVector(values, sigmas, {"model": fingerprint(model)}, flow)


@contextmanager
def spying(small: Small, model: ModelPatcher, **conditionings: list) -> Iterator[list[tiny.Row]]:
    """Record every site's rows of every call, as `tiny.spying`: named by the text given, raw and as steered.

    Rows are taken from the dimension that ``small`` says, and the attention around a site is its parent module.
    """
    rows: list[tiny.Row] = []
    call = SimpleNamespace(number=-1, sigma=0.0, names=[], raw={})
    network = model.model.diffusion_model
    texts = {name: conditioning[0][0][0] for name, conditioning in conditionings.items()}
    axis = 1 if small.tokens_first else 0

    def before_call(_module, _args, kwargs):
        call.number += 1
        call.sigma = float(kwargs["transformer_options"]["sigmas"][0])
        call.names = [
            next(name for name, text in texts.items() if torch.equal(text, context)) for context in kwargs["context"]
        ]

    def remember(site, output):
        call.raw[site] = output.clone()

    def compare(site, output):
        output = output[0] if isinstance(output, tuple) else output
        assert output.shape == call.raw[site].shape
        for index, name in enumerate(call.names):
            raw, out = (tensor.select(axis, index).clone() for tensor in (call.raw[site], output))
            rows.append(tiny.Row(call.number, call.sigma, name, site, raw, out))

    handles = [network.register_forward_pre_hook(before_call, with_kwargs=True)]
    for site in small.sites:
        module, attention = network.get_submodule(site), network.get_submodule(site.rpartition(".")[0])
        # A hook must not give back the output: what it returns would replace it.
        handles.append(module.register_forward_hook(lambda _m, _a, out, site=site: remember(site, out)))
        handles.append(attention.register_forward_hook(lambda _m, _a, out, site=site: compare(site, out)))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
