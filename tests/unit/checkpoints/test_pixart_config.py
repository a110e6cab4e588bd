"""What weights don't say: heads, position grid, family. Refusals of config.json are in the host tests, with files."""

import json

import pytest
import torch

from medsteer_core.checkpoints.pixart_config import (
    ALPHA,
    SIGMA,
    check_config,
    extent_of_config,
    extent_of_positions,
    family_of,
    heads_of,
    parse_config,
    sine_grid,
)
from medsteer_core.checkpoints.pixart_state import DIFFUSERS, Sizes
from medsteer_core.errors import MedSteerError

SIZES = Sizes(DIFFUSERS, 1152, 28, 4, 8, 4096, 2, False)
PUBLISHED = {
    "_class_name": "Transformer2DModel", "_diffusers_version": "0.22.0.dev0", "activation_fn": "gelu-approximate",
    "attention_bias": True, "attention_head_dim": 72, "attention_type": "default", "caption_channels": 4096,
    "cross_attention_dim": 1152, "double_self_attention": False, "dropout": 0.0, "in_channels": 4,
    "norm_elementwise_affine": False, "norm_eps": 1e-06, "norm_num_groups": 32, "norm_type": "ada_norm_single",
    "num_attention_heads": 16, "num_embeds_ada_norm": 1000, "num_layers": 28, "num_vector_embeds": None,
    "only_cross_attention": False, "out_channels": 8, "patch_size": 2, "sample_size": 64, "upcast_attention": False,
    "use_linear_projection": False,
}  # fmt: skip


def sizes(**changes):
    return Sizes(**{**vars(SIZES), **changes})


def test_a_config_as_published_is_taken():
    config = parse_config(json.dumps(PUBLISHED), "config.json")
    check_config(config, SIZES, "config.json", "file")
    assert heads_of(SIZES, config, "file") == 16
    assert extent_of_config(config, SIZES) == 32


@pytest.mark.parametrize(
    ("width", "config", "heads"),
    [
        (1152, None, 16),
        (144, {}, 2),
        (1152, {"num_attention_heads": 8}, 8),
        (96, {"num_attention_heads": 4}, 4),
        (96, {"attention_head_dim": 32}, 3),
        (96, {"num_attention_heads": 2, "attention_head_dim": 48}, 2),
    ],
)
def test_heads_come_from_config_or_have_72_channels(width, config, heads):
    assert heads_of(sizes(width=width), config, "file") == heads


@pytest.mark.parametrize(
    ("width", "config"),
    [
        (96, None),
        (48, {}),
        (96, {"num_attention_heads": 5}),
        (96, {"attention_head_dim": 36}),
        (96, {"attention_head_dim": 99}),
    ],
)
def test_heads_that_cannot_be_known_are_asked_for(width, config):
    with pytest.raises(
        MedSteerError, match=f"'file' has width {width}.*heads can't be read from weights: put the config"
    ):
        heads_of(sizes(width=width), config, "file")


@pytest.mark.parametrize(
    ("side", "scale", "patch", "extent"),
    [(32, None, 2, 16), (64, None, 2, 32), (128, None, 2, 32), (256, None, 2, 32), (32, 0.5, 2, 32), (128, 2, 4, 16),
     (None, 2, 2, None)],
)  # fmt: skip
def test_the_grids_extent_is_diffusers(side, scale, patch, extent):
    config = {"sample_size": side, "interpolation_scale": scale}
    assert extent_of_config(config, sizes(patch_size=patch)) == extent


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("side", "step"), [(2, 1.0), (16, 1.0), (16, 2.0), (32, 1.0), (64, 0.5), (128, 0.25), (5, 0.3)]
)
def test_the_extent_is_measured_from_a_stored_grid(side, step, dtype):
    grid = sine_grid(side, step, 48)[None].to(dtype)
    assert extent_of_positions(grid, 48, "file") == pytest.approx(side * step, rel=2e-3)


def test_sine_grid_holds_columns_then_rows():
    grid = sine_grid(3, 0.5, 8)
    place = grid[1 * 3 + 2]  # row 1, column 2
    frequencies = torch.tensor([1.0, 0.01], dtype=torch.float64)
    column, row = 2 * 0.5 * frequencies, 1 * 0.5 * frequencies
    torch.testing.assert_close(place, torch.cat([column.sin(), column.cos(), row.sin(), row.cos()]))


def test_a_grid_that_was_never_filled_says_nothing():
    assert extent_of_positions(torch.zeros(1, 256, 48), 48, "file") is None
    assert extent_of_positions(torch.ones(1, 1, 48), 48, "file") is None


@pytest.mark.parametrize(
    "grid", [torch.ones(1, 256, 48), torch.rand(1, 256, 48), sine_grid(16, 1.0, 48)[:250], sine_grid(16, 1.0, 96)]
)
def test_a_grid_of_another_kind_is_refused(grid):
    with pytest.raises(MedSteerError, match="'file' has a position grid of shape .* that is not PixArt's"):
        extent_of_positions(grid, 48, "file")


@pytest.mark.parametrize(
    ("changes", "config", "name", "family", "why"),
    [
        ({"micro_conditioning": True, "tokens": 300}, {}, "sigma", ALPHA, "it has micro-conditioning"),
        ({"tokens": 120}, {"sample_size": 128}, "sigma", ALPHA, "its prompts have 120 tokens"),
        ({"tokens": 300}, None, "PixArt-XL-2-512x512", SIGMA, "its prompts have 300 tokens"),
        ({"tokens": 8}, {"model_max_length": 300}, "x", SIGMA, "its prompts have 300 tokens"),
        ({}, {"sample_size": 128}, "x", SIGMA, "it is for 1024 pixels and has no micro-conditioning"),
        (
            {},
            {"_name_or_path": "PixArt-alpha/PixArt-Sigma"},
            "PixArt-XL-2",
            SIGMA,
            "by the name 'PixArt-alpha/PixArt-Sigma'",
        ),
        ({}, None, "PixArt-XL-2-512x512/x.safetensors", ALPHA, "by the name 'PixArt-XL-2-512x512/x.safetensors'"),
        ({}, {"sample_size": 64}, "alphabet.safetensors", SIGMA, ""),
    ],
)
def test_facts_settle_the_family_before_names_do(changes, config, name, family, why):
    found = family_of(sizes(**changes), config, name)
    assert (found.name, found.why) == (family, why)
