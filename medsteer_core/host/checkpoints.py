"""Diffusion transformers from the user's model folders."""

from __future__ import annotations

import logging

import comfy.latent_formats
import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ..errors import MedSteerError
from .pixart import allow_any_size
from .sites import family_name, find_sites

FOLDERS = ("diffusion_models", "checkpoints")
ALPHA_TOKENS = 120  # longest prompt of PixArt-alpha; Sigma's is 300
WEIGHT_DTYPES: dict[str, dict] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


def model_names() -> list[str]:
    """Every model file, as ``folder/name``."""
    return [f"{folder}/{name}" for folder in FOLDERS for name in folder_paths.get_filename_list(folder)]


def load_dit(model_name: str, weight_dtype: str) -> ModelPatcher:
    """A cross-attention DiT as MODEL, PixArts of any latent size.

    Raises MedSteerError for a file that is missing, that ComfyUI can't load, or whose model can't be steered.
    """
    folder, _, name = model_name.partition("/")
    if folder not in FOLDERS or name not in folder_paths.get_filename_list(folder):
        raise MedSteerError(
            f"There is no model '{model_name}'. Put the file into models/diffusion_models or models/checkpoints and "
            "refresh the list (R)."
        )
    if weight_dtype not in WEIGHT_DTYPES:
        raise MedSteerError(f"weight_dtype is '{weight_dtype}'; one of {', '.join(WEIGHT_DTYPES)} was expected.")
    return _load(folder_paths.get_full_path_or_raise(folder, name), name, WEIGHT_DTYPES[weight_dtype])


def _load(path: str, name: str, options: dict, disable_dynamic: bool = False) -> ModelPatcher:
    try:  # this loader also takes the diffusion model out of a checkpoint, and heeds every weight dtype there
        model = comfy.sd.load_diffusion_model(path, model_options=options, disable_dynamic=disable_dynamic)
    except Exception as error:  # ComfyUI has no error class of its own for a file that it does not understand
        if comfy.model_management.is_oom(error):
            raise  # ComfyUI answers this one itself, by unloading models
        raise MedSteerError(f"ComfyUI can't load '{name}' as a diffusion model: {error}") from error
    network = model.model.diffusion_model
    logging.info("MedSteer: %s is a %s with %d sites.", name, family_name(network), len(find_sites(network)))
    _use_alpha_latents(model)
    model.cached_patcher_init = (_load, (path, name, options))
    return allow_any_size(model)


def _use_alpha_latents(model: ModelPatcher) -> None:
    """Give a PixArt-alpha without size conditioning (256 and 512 pixels) the latent scale of its VAE, SD 1.5's.

    ComfyUI takes it for a Sigma, whose latents are scaled as SDXL's; the length of the stored prompt tells them apart.
    """
    config = model.model.model_config.unet_config
    if config.get("image_model") == "pixart_sigma" and config.get("model_max_length") == ALPHA_TOKENS:
        model.model.latent_format = comfy.latent_formats.SD15()
