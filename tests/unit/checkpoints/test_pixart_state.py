"""PixArt's weights in files: format and prefix found, sizes read, names and shapes turned into the original ones."""

import pytest
import torch

from medsteer_core.checkpoints import pixart_state
from medsteer_core.checkpoints.pixart_state import (
    DIFFUSERS,
    ORIGINAL,
    Sizes,
    find_pixart,
    is_quantised,
    layout,
    only_pixart,
    sizes_of,
    to_original,
)
from medsteer_core.errors import MedSteerError

SIZES = Sizes(DIFFUSERS, 24, 3, 4, 8, 10, 2, True, 5)
ATTENTION = "transformer_blocks.1.attn1."


def state(sizes=SIZES, prefix=""):
    """Every weight filled with a number of its own."""
    sources = {source: weight.source_shape for weight in layout(sizes) for source in weight.sources}
    return {prefix + key: torch.full(shape, float(i)) for i, (key, shape) in enumerate(sources.items())}


@pytest.mark.parametrize("form", [ORIGINAL, DIFFUSERS])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer.", "anything.else."])
def test_format_and_prefix_are_found(form, prefix):
    sizes = Sizes(form, 24, 2, 4, 4, 10, 2, False)
    assert find_pixart(state(sizes, prefix)) == (form, prefix)


def test_a_usual_prefix_comes_before_a_copy_of_the_weights():
    both = state(prefix="ema.") | state(prefix="model.diffusion_model.")
    assert find_pixart(both) == (DIFFUSERS, "model.diffusion_model.")
    assert find_pixart(state(prefix="ema.") | state()) == (DIFFUSERS, "")


def test_other_families_are_no_pixart():
    assert find_pixart([]) is None
    # LTXV has the modulation, PixArt-like ones the blocks: only together are they PixArt's
    assert (
        find_pixart(["adaln_single.linear.weight", "patchify_proj.weight", "transformer_blocks.0.attn2.to_q.weight"])
        is None
    )
    assert find_pixart(["t_block.1.weight", "x_embedder.proj.weight", "blocks.0.attn.qkv.weight"]) is None


def test_copies_and_other_parts_stay_out():
    whole = state() | state(prefix="ema.") | {"vae.x": torch.ones(1)}
    assert set(only_pixart(whole, DIFFUSERS, "")) == set(state()) | {"vae.x"}
    assert set(only_pixart(whole, DIFFUSERS, "ema.")) == set(state())


@pytest.mark.parametrize("form", [ORIGINAL, DIFFUSERS])
@pytest.mark.parametrize("micro", [True, False])
@pytest.mark.parametrize(("channels", "out"), [(4, 8), (4, 4), (16, 32), (16, 16)])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_sizes_are_read_from_shapes(form, micro, channels, out, patch):
    sizes = Sizes(form, 36, 12, channels, out, 7, patch, micro)
    assert sizes_of(state(sizes), form, "file") == sizes
    assert sizes.predicts_sigma == (out == 2 * channels)


def test_a_published_models_sizes_give_its_611_million_parameters():
    """The paper (arXiv 2310.00426) calls it 0.6B; its 1024-pixel model has 611.9 million with the size embeddings."""
    xl = Sizes(ORIGINAL, 1152, 28, 4, 8, 4096, 2, False)
    count = sum(torch.Size(weight.shape).numel() for weight in layout(xl))
    assert 610e6 < count < 613e6


def test_projections_are_fused_in_the_order_query_key_value():
    given = state()
    query, key, value = (given[f"{ATTENTION}to_{part}.weight"].clone() for part in "qkv")
    parts = [given[f"transformer_blocks.2.attn2.to_{part}.bias"].clone() for part in "kv"]
    converted = to_original(given, SIZES, "file")
    assert torch.equal(converted["blocks.1.attn.qkv.weight"], torch.cat([query, key, value]))
    assert torch.equal(converted["blocks.2.cross_attn.kv_linear.bias"], torch.cat(parts))
    assert given == {}, "weights must not be held twice"


def test_every_weight_goes_to_one_place_with_its_shape():
    converted = to_original(state(), SIZES, "file")
    assert {w.name: w.shape for w in layout(SIZES)} | {"y_embedder.y_embedding": (5, 10)} == {
        key: tuple(value.shape) for key, value in converted.items()
    }
    assert sum(value.numel() for value in state().values()) + 50 == sum(v.numel() for v in converted.values())
    original = Sizes(**{**vars(SIZES), "format": ORIGINAL})
    assert list(to_original(state(original), original, "file")) == list(converted)


def test_a_missing_prompt_is_zeros_and_a_stored_one_is_kept():
    assert not to_original(state(), SIZES, "file")["y_embedder.y_embedding"].any()
    prompt = torch.rand(5, 10)
    kept = to_original(state() | {"caption_projection.y_embedding": prompt}, SIZES, "file")
    assert torch.equal(kept["y_embedder.y_embedding"], prompt)


def test_position_grids_are_dropped():
    grid = {"pos_embed.pos_embed": torch.ones(1, 4, 24)}
    assert not any("pos_embed" in key for key in to_original(state() | grid, SIZES, "file"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{ATTENTION}to_k.bias": None}, f"'file' lacks '{ATTENTION}to_k.bias' of a PixArt of 3 blocks and width 24"),
        ({f"{ATTENTION}to_k.bias": None, f"{ATTENTION}to_v.bias": None}, "and 1 more weights"),
        ({"transformer_blocks.0.norm1.weight": torch.ones(24)}, "'file' has 'transformer_blocks.0.norm1.weight'"),
        ({f"{ATTENTION}to_k.bias": torch.ones(23)}, r"'file' '.*to_k.bias' is \(23,\); \(24,\) was expected"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_changed(changes, message):
    given = {key: value for key, value in (state() | changes).items() if value is not None}
    before = set(given)
    with pytest.raises(MedSteerError, match=message):
        to_original(given, SIZES, "file")
    assert set(given) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_embed.proj.weight": torch.ones(24, 16)}, r"is \(24, 16\); 4 dimensions were expected"),
        ({"pos_embed.proj.weight": torch.ones(24, 4, 0, 0)}, r"is \(24, 4, 0, 0\)"),
        ({"caption_projection.linear_1.weight": None}, "'caption_projection.linear_1.weight' is missing"),
        ({"proj_out.weight": torch.ones(24, 24)}, "predicts 6 channels from 4"),
        ({"proj_out.weight": torch.ones(24, 24).int()}, "holds torch.int32 in 'proj_out.weight'"),
        ({"epoch": 3}, "holds int in 'epoch'"),
    ],
)
def test_shapes_that_no_pixart_has_are_refused(changes, message):
    given = {key: value for key, value in (state() | changes).items() if value is not None}
    with pytest.raises(MedSteerError, match=message):
        sizes_of(given, DIFFUSERS, "file")


@pytest.mark.parametrize(("width", "micro", "multiple"), [(26, False, 4), (28, True, 12), (30, True, 12)])
def test_widths_that_sines_or_micro_conditioning_cannot_split_are_refused(width, micro, multiple):
    sizes = Sizes(DIFFUSERS, width, 1, 4, 8, 10, 2, micro)
    with pytest.raises(MedSteerError, match=f"has width {width}; a multiple of {multiple} was expected"):
        sizes_of(state(sizes), DIFFUSERS, "file")


def test_scales_beside_weights_mean_quantised():
    assert is_quantised(["a.b.scale_weight"], "a.", None)
    assert is_quantised(["scaled_fp8"], "", None)
    assert is_quantised(["a.weight"], "", {"_quantization_metadata": "{}"})
    assert not is_quantised(["t5.a.scale_weight", "model.scale_shift_table"], "model.", {"format": "pt"})


def test_a_stray_block_number_is_refused_before_anything_is_built():
    state = dict.fromkeys(("blocks.0.a", "blocks.1.a", "blocks.300000.a"))
    with pytest.raises(MedSteerError, match="has 3 blocks and no block 2 among them"):
        pixart_state._depth(state, pixart_state.ORIGINAL, "odd.safetensors")


def test_names_that_are_no_text_are_not_a_pixarts():
    assert pixart_state.find_pixart([0, 1, "blocks.0.cross_attn.kv_linear.weight"]) is None
