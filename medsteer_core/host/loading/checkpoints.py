"""Diffusion transformers from the user's model folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.ldm.pixart.pixartms import PixArtMS
from comfy.model_patcher import ModelPatcher

from ...checkpoints import pixart_config, pixart_state
from ...checkpoints.pixart_config import ALPHA, SIGMA
from ...checkpoints.pixart_state import DIFFUSERS
from ...errors import MedSteerError
from ...files.inside import shown
from ..patching.sites import family_name, find_sites
from . import pixart_files
from .pixart import GRID, Recipe, allow_any_size, build, latent_format

FOLDERS = ("diffusion_models", "checkpoints")
AUTO = "auto"
FAMILIES = (AUTO, ALPHA, SIGMA)
WEIGHT_DTYPES: dict[str, dict] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


@dataclass(frozen=True)
class Loaded:
    """A model and, in a few lines for the user, what it was taken for."""

    model: ModelPatcher
    text: str


def model_names() -> list[str]:
    """Every model, as ``folder/name``; a model in shards is one name, that of its index."""
    return [f"{folder}/{name}" for folder in FOLDERS for name in pixart_files.entries(folder)]


def load_dit(model_name: str, weight_dtype: str = "default", family: str = AUTO) -> ModelPatcher:
    """A cross-attention DiT as MODEL, PixArts of any latent size; raises as `load_described`."""
    return load_described(model_name, weight_dtype, family).model


def load_described(model_name: str, weight_dtype: str = "default", family: str = AUTO) -> Loaded:
    """A cross-attention DiT as MODEL, and what it is.

    Raises MedSteerError for a file that is missing, damaged or no diffusion model, for one whose model can't be
    steered, and for a PixArt whose weights are not exactly a PixArt's.
    """
    folder, _, name = model_name.partition("/")
    if folder not in FOLDERS or model_name not in model_names():
        raise MedSteerError(
            f"There is no model '{shown(model_name)}'. Put the file into models/diffusion_models or models/checkpoints "
            "and refresh the list (R)."
        )
    if weight_dtype not in WEIGHT_DTYPES:
        raise MedSteerError(f"weight_dtype is '{weight_dtype}'; one of {', '.join(WEIGHT_DTYPES)} was expected.")
    if family not in FAMILIES:
        raise MedSteerError(f"family is '{family}'; one of {', '.join(FAMILIES)} was expected.")
    path = folder_paths.get_full_path(folder, name)
    if path is None or not os.path.isfile(path):
        raise MedSteerError(f"'{name}' is a link to a file that is gone. Put the file back and refresh the list (R).")
    loaded = _open(path, name, WEIGHT_DTYPES[weight_dtype], family)
    logging.info("MedSteer: %s: %s", name, "; ".join(loaded.text.splitlines()))
    return loaded


def _load(path: str, name: str, options: dict, family: str, disable_dynamic: bool = False) -> ModelPatcher:
    """What ComfyUI calls to have the model a second time."""
    return _open(path, name, options, family, disable_dynamic).model


def _open(path: str, name: str, options: dict, family: str, disable_dynamic: bool = False) -> Loaded:
    contents = pixart_files.read(path, name)
    found = pixart_state.find_pixart(contents.state)
    if found is None or pixart_state.is_quantised(contents.state, found[1], contents.metadata):
        loaded = _open_by_comfyui(contents, name, options, family, disable_dynamic)
    else:
        loaded = _open_pixart(contents, found, path, name, options, family, disable_dynamic)
    loaded.model.cached_patcher_init = (_load, (path, name, options, family))
    return loaded


def _open_pixart(
    contents: pixart_files.Contents, found: tuple[str, str], path: str, name: str, options: dict, family: str,
    disable_dynamic: bool,
) -> Loaded:  # fmt: skip
    state = pixart_state.only_pixart(contents.state, *found)
    contents.state.clear()
    sizes = pixart_state.sizes_of(state, found[0], name)
    config, remarks = _config(path, name, sizes)
    heads = pixart_config.heads_of(sizes, config, name)
    extent = _extent(state, sizes, config, name)
    guess = pixart_config.family_of(sizes, config, name)
    chosen = guess.name if family == AUTO else family
    if family == AUTO and not guess.why and sizes.in_channels == 4:
        remarks.append(
            f"Nothing in the file tells alpha from Sigma: taken for Sigma. Set family to {ALPHA} if it is one."
        )
    kept = str(comfy.utils.weight_dtype(state)).removeprefix("torch.")
    # The length of the stored prompt tells the family when the model is saved from ComfyUI and loaded again.
    sizes = replace(sizes, tokens=sizes.tokens or pixart_config.TOKENS_OF_FAMILY[chosen])
    weights = pixart_state.to_original(state, sizes, name)
    recipe = Recipe(sizes, heads, chosen, extent)
    with _naming(name):
        model = build(weights, recipe, options, disable_dynamic)
    why = "chosen" if family != AUTO else guess.why
    text = [f"{chosen}{f' ({why})' if why else ''}", *_lines(recipe, model, kept, contents.shards), *remarks]
    return Loaded(model, "\n".join(text))


def _config(path: str, name: str, sizes: pixart_state.Sizes) -> tuple[dict[str, Any] | None, list[str]]:
    """The config.json beside the file, checked against the weights, and what there is to remark on it.

    Diffusers' files come with theirs, so one that doesn't fit is an error. A file in the original format has none, and
    may lie in one folder with another model's: there it is left aside.
    """
    try:
        beside = pixart_files.config_beside(path, name)
        if beside is not None:
            pixart_config.check_config(beside[0], sizes, beside[1], name)
    except MedSteerError as error:
        if sizes.format == DIFFUSERS:
            raise
        return None, [f"config.json was left aside: {error}"]
    return (beside[0] if beside else None), []


def _extent(state: dict, sizes: pixart_state.Sizes, config: dict[str, Any] | None, name: str) -> float | None:
    said = pixart_config.extent_of_config(config, sizes) if config else None
    stored = state.get(pixart_state.POSITIONS[sizes.format])
    if said is not None or stored is None:
        return said
    return pixart_config.extent_of_positions(stored, sizes.width, name)


def _lines(recipe: Recipe, model: ModelPatcher, kept: str, shards: int) -> list[str]:
    """What was found of a PixArt, for the user."""
    sizes, scale = recipe.sizes, model.model.latent_format.scale_factor
    network = model.model.diffusion_model
    used, cast = model.model.get_dtype(), model.model.manual_cast_dtype
    extent = recipe.grid_extent or GRID / sizes.patch_size
    predicts = "noise and its variance" if sizes.predicts_sigma else "noise"
    known = "" if sizes.in_channels == 4 else f" (none is known for {sizes.in_channels} channels)"
    return [
        f"{sizes.depth} blocks of width {sizes.width}, {recipe.heads} heads, {len(find_sites(network))} sites",
        f"{sizes.in_channels} channels, predicts {predicts}, captions of {sizes.caption_channels}, "
        f"{'with' if sizes.micro_conditioning else 'no'} micro-conditioning",
        f"latent scale {scale:g}{known}, positions over {extent:g} patches",
        f"{sizes.format} format, {f'{shards} shards of' if shards > 1 else 'one file of'} {kept}, "
        f"{_dtypes(used, cast)}",
    ]


def _dtypes(used: torch.dtype, cast: torch.dtype | None) -> str:
    words = [str(dtype).removeprefix("torch.") for dtype in (used, cast or used)]
    return f"kept and run in {words[0]}" if words[0] == words[1] else f"kept in {words[0]}, run in {words[1]}"


def _open_by_comfyui(
    contents: pixart_files.Contents, name: str, options: dict, family: str, disable_dynamic: bool
) -> Loaded:
    """Any other family, and quantised PixArts: ComfyUI's own loader, which also takes the model out of a checkpoint."""
    with _naming(name):
        model = comfy.sd.load_diffusion_model_state_dict(
            contents.state, model_options=options, metadata=contents.metadata, disable_dynamic=disable_dynamic
        )
        if model is None:
            raise ValueError("its weights are of no known family")
    network = model.model.diffusion_model
    try:
        text = f"{family_name(network)}, {len(find_sites(network))} sites, loaded by ComfyUI"
    except MedSteerError as error:
        raise MedSteerError(f"'{name}' can't be used: {error}") from error
    if isinstance(network, PixArtMS):
        _set_latents(model, family)
        text += f"; latent scale {model.model.latent_format.scale_factor:g}"
    elif family != AUTO:
        raise MedSteerError(f"family is '{family}', but '{name}' is a {family_name(network)}; set family to {AUTO}.")
    text += f"; {_dtypes(model.model.get_dtype(), model.model.manual_cast_dtype)}"
    return Loaded(allow_any_size(model), text)


def _set_latents(model: ModelPatcher, family: str) -> None:
    """Give a PixArt that ComfyUI detected the latent scale of its family; by the stored prompt's length for auto.

    ComfyUI takes an alpha without size conditioning (256 and 512 pixels) for a Sigma, whose latents are scaled as
    SDXL's.
    """
    if family == AUTO:
        tokens = model.model.model_config.unet_config.get("model_max_length")
        family = pixart_config.FAMILY_OF_TOKENS.get(tokens, AUTO)
    if family != AUTO:
        model.model.latent_format = latent_format(family, model.model.latent_format.latent_channels)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Any error of ComfyUI's, which has no class of its own for files that it does not understand, names the file."""
    try:
        yield
    except Exception as error:
        if comfy.model_management.is_oom(error):
            raise  # ComfyUI answers this one itself, by unloading models
        words = pixart_files.one_line(error)
        raise MedSteerError(f"ComfyUI can't load '{name}' as a diffusion model: {words}.") from error
