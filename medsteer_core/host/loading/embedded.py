"""EndoPhantom as ComfyUI's MODEL, CLIP and VAE."""

from __future__ import annotations

import logging
import math
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import folder_paths
import torch
from comfy.sd1_clip import escape_important, token_weights, unescape_important
from torch import Tensor, nn

from ...endophantom import text
from ...endophantom.autoencoder import PATCH
from ...endophantom.bundle import VAE_PATH, Bundle
from ..canvas.notes import say_on_running_node
from .pixart import allow_any_size

CONFIG_KEYS = ("in_channels", "patch_size", "hidden_size", "depth", "num_heads", "caption_channels",
               "model_max_length", "pe_interpolation")  # fmt: skip
TOKENS = "endophantom"


def load_endophantom() -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """The embedded default, ready for core's CLIP Text Encode, KSampler, Empty Latent Image and VAE Decode."""
    return load_model(), load_clip(), load_vae()


class EndoPhantomLatent(comfy.latent_formats.LatentFormat):
    """Latents of the bundle's autoencoder: unit mean square, 8x smaller than the image."""

    spacial_downscale_ratio = PATCH
    native_side = 128  # pixels, of its training renders

    def __init__(self, channels: int, preview: dict[str, list]):
        self.latent_channels = channels
        self.latent_rgb_factors = preview["factors"]
        self.latent_rgb_factors_bias = preview["bias"]


class _PixArt(comfy.supported_models.PixArtAlpha):
    """PixArt's schedule with v-prediction, in float32."""

    latent_format = comfy.latent_formats.LatentFormat
    supported_inference_dtypes = [torch.float32]

    def get_model(self, state_dict, prefix="", device=None):
        return comfy.model_base.PixArt(self, model_type=comfy.model_base.ModelType.V_PREDICTION, device=device).eval()


def load_model(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The PixArt as MODEL, run by ComfyUI's own PixArt classes."""
    bundle = Bundle()
    sizes = {key: bundle.recipe["generator"][key] for key in CONFIG_KEYS}
    # The config is not detected: ComfyUI's detection knows one width (1152) and four channels.
    config = _PixArt({**sizes, "micro_condition": False, "pred_sigma": False, "learn_sigma": False})
    config.latent_format = EndoPhantomLatent(sizes["in_channels"], bundle.recipe["autoencoder"]["preview"])
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    config.set_inference_dtype(torch.float32, None, device=device)
    weights = bundle.part("generator")
    model = config.get_model(weights, "")
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=device, offload_device=offload)
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_model, ())
    return allow_any_size(patcher)


class EndoPhantomTokenizer:
    """Words to weighted token ids; understands ComfyUI's ``(word:1.2)``."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        pass

    def tokenize_with_weights(self, prompt: str, return_word_ids: bool = False, **_kwargs) -> dict[str, list]:
        """The start token and the known words' ids; unknown words stand behind them as text, to be told of."""
        tokens: list[tuple] = [(text.tokenize("")[0], 1.0, 0)]
        unknown: list[tuple] = []
        for number, (segment, weight) in enumerate(token_weights(escape_important(prompt), 1.0), start=1):
            words = unescape_important(segment)
            tokens += [(token, weight, number) for token in text.word_ids(words)]
            unknown += [(word, weight, number) for word in text.ignored(words)]
        tokens += unknown
        return {TOKENS: [tokens if return_word_ids else [token[:2] for token in tokens]]}

    def untokenize(self, pairs: list[tuple]) -> list[tuple]:
        return [(pair, pair[0] if isinstance(pair[0], str) else text.VOCABULARY[pair[0]]) for pair in pairs]

    def state_dict(self) -> dict:
        return {}


class EndoPhantomText(nn.Module):
    """The text encoder behind ComfyUI's CLIP interface."""

    def __init__(self, device=None, dtype=None, model_options=None):
        super().__init__()
        self.encoder = text.TextEncoder().to(device=device, dtype=dtype).requires_grad_(False)
        self.dtypes = {dtype}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        pass

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple:
        """Context ``(1, tokens, width)`` and a pooled ``(1, width)``; weights scale away from the start token.

        Words that are not known are told of on the node that encodes, in the log, and in a third value.
        """
        (pairs,) = tokens[TOKENS]
        unknown = tuple(dict.fromkeys(pair[0] for pair in pairs if isinstance(pair[0], str)))
        pairs = [pair for pair in pairs if not isinstance(pair[0], str)]
        parameter = next(self.parameters())
        ids = torch.tensor([[pair[0] for pair in pairs]], device=parameter.device)
        weights = torch.tensor([pair[1] for pair in pairs], device=parameter.device, dtype=parameter.dtype)
        context = self.encoder(ids)
        start = context[:, :1]
        if not all(math.isclose(pair[1], 1.0) for pair in pairs):
            context = start + weights[None, :, None] * (context - start)
        device = comfy.model_management.intermediate_device()
        encoded = context.float().to(device), start[:, 0].float().to(device)
        if not unknown:
            return encoded
        logging.warning("MedSteer: %s", text.about_ignored(unknown))
        say_on_running_node(text.ignored_in_short(unknown))
        return *encoded, {text.IGNORED: unknown}

    def load_sd(self, state: dict[str, Tensor]):
        return self.encoder.load_state_dict(state, strict=False, assign=getattr(self, "can_assign_sd", False))


def load_clip(disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """The text encoder as a real CLIP object."""
    state = Bundle().part("text")
    target = comfy.supported_models_base.ClipTarget(EndoPhantomTokenizer, EndoPhantomText)
    size = sum(value.numel() for value in state.values())
    options = {"dtype": torch.float32}
    clip = comfy.sd.CLIP(
        target, parameters=size, state_dict=[state], model_options=options, disable_dynamic=disable_dynamic
    )
    clip.patcher.cached_patcher_init = (_load_clip_patcher, ())
    return clip


def _load_clip_patcher(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """What ComfyUI calls to have the text encoder a second time: for CLIP hooks, or on another device."""
    return load_clip(disable_dynamic).patcher


def load_vae() -> comfy.sd.VAE:
    """The autoencoder as a VAE, by ComfyUI's own TAESD; core's Load VAE gives the same from the same file."""
    vae = comfy.sd.VAE(sd=Bundle().autoencoder(), dtype=torch.float32)
    vae.patcher.cached_patcher_init = (_load_vae_patcher, ())
    return vae


def _load_vae_patcher(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_vae().patcher


def register_vae() -> None:
    """Let core's Load VAE list EndoPhantom's autoencoder."""
    folder_paths.add_model_folder_path("vae", str(VAE_PATH.parent))
