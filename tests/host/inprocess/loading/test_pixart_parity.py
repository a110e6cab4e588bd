"""The same saved PixArt in diffusers and, by Load DiT, in ComfyUI: the same numbers.

The reference is diffusers' own `PixArtTransformer2DModel`; its small random models are saved as Hugging Face ships real
ones, in one file or in shards, and loaded from those very folders.
"""

import copy
import json
import shutil

import comfy.lora
import comfy.samplers
import folder_paths
import pytest
import tiny
import torch
from comfy.ldm.pixart.pixartms import PixArtMS
from medsteer_pack.medsteer_core.host.loading.checkpoints import load_described, load_dit, model_names
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers")

LIMIT = 1e-4
ALPHA = {"use_additional_conditions": True}
SIGMA = {"use_additional_conditions": False, "interpolation_scale": 2}
FILE = "diffusion_pytorch_model.safetensors"
SIZES = [(8, 8), (16, 24), (2, 62), (34, 34), (64, 40)]  # the last two run through stock PixArt where its grid is used


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def only_this_folder(folder, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(folder)], {".safetensors"}))
    monkeypatch.delitem(folder_paths.filename_list_cache, "diffusion_models", raising=False)


def reference(seed=0, heads=2, head_channels=24, **config):
    """A small random PixArt of diffusers, of width heads x head_channels."""
    torch.manual_seed(seed)
    sizes = {"num_layers": 2, "caption_channels": 16, "cross_attention_dim": heads * head_channels, "sample_size": 128}
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_channels, **{**sizes, **config}
    ).eval()


def saved(folder, name, model, **how):
    """Save a diffusers model and give the name under which Load DiT lists it."""
    shutil.rmtree(folder / name, ignore_errors=True)
    model.save_pretrained(folder / name, **how)
    folder_paths.filename_list_cache.pop("diffusion_models", None)
    (listed,) = [entry for entry in model_names() if entry.startswith(f"diffusion_models/{name}/")]
    return listed


def inputs(height, width, tokens, channels=4, captions=16):
    generator = torch.Generator().manual_seed(height * 1000 + width + tokens)
    latent = torch.randn(2, channels, height, width, generator=generator)
    return latent, torch.tensor([951.0, 30.0]), torch.randn(2, tokens, captions, generator=generator)


@torch.no_grad()
def by_diffusers(model, latent, timestep, text):
    """The predicted noise, with the sizes of the image that diffusers' pipeline gives."""
    height, width = latent.shape[-2:]
    micro = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        micro["resolution"] = torch.tensor([[8.0 * height, 8.0 * width]] * len(latent))
        micro["aspect_ratio"] = torch.tensor([[height / width]] * len(latent))
    out = model(latent, encoder_hidden_states=text, timestep=timestep, added_cond_kwargs=micro).sample
    return out[:, : latent.shape[1]]


@torch.no_grad()
def by_comfyui(model, latent, timestep, text):
    return model.model.diffusion_model(latent, timestep, text)


def worst(model, expected, sizes=SIZES, tokens=(1, 5, 120), **shapes):
    """The largest error relative to the largest output, over latent sizes and caption lengths."""
    errors = []
    for (height, width), length in [(size, length) for size in sizes for length in tokens]:
        given = inputs(height, width, length, **shapes)
        right = by_diffusers(expected, *given)
        assert right.std() > 0.05
        errors.append(float((by_comfyui(model, *given) - right).abs().max() / right.abs().max()))
    return max(errors)


@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("family", [ALPHA, SIGMA], ids=["alpha", "sigma"])
def test_a_saved_folder_gives_the_same_numbers(folder, family, shards):
    expected = reference(**family)
    how = {"max_shard_size": "60KB"} if shards else {}
    name = saved(folder, f"parity-{len(family)}-{shards}", expected, **how)
    assert name.endswith(f"{FILE}.index.json" if shards else FILE)
    loaded = load_described(name)
    files = len(list((folder / name.split("/")[1]).glob("*.safetensors")))
    assert files > 2 if shards else files == 1
    assert (f"{files} shards of float32" if shards else "one file of float32") in loaded.text
    assert ("PixArt-alpha" if family is ALPHA else "PixArt-Sigma") in loaded.text.splitlines()[0]
    assert worst(loaded.model, expected) < LIMIT


@pytest.mark.parametrize(
    ("config", "extent"),
    [
        ({"sample_size": 32}, 16),
        ({"sample_size": 32, "interpolation_scale": 0.5}, 32),
        ({"sample_size": 16}, 8),
        ({"sample_size": 64}, 32),
        ({"sample_size": 256}, 32),
        ({"sample_size": 256, "interpolation_scale": 2}, 64),
        ({"sample_size": 128, "patch_size": 4}, 16),
    ],
)
def test_the_position_grid_is_the_configs(folder, config, extent):
    expected = reference(use_additional_conditions=False, **config)
    loaded = load_described(saved(folder, "grid", expected))
    assert f"positions over {extent} patches" in loaded.text
    assert worst(loaded.model, expected, sizes=[(8, 8), (16, 24), (36, 64)], tokens=[5]) < LIMIT


@pytest.mark.parametrize(
    "config",
    [
        {"out_channels": 4},
        {"in_channels": 16, "out_channels": 32},
        {"in_channels": 16, "out_channels": 16},
        {"heads": 3, "head_channels": 40, "num_layers": 3},
        {"heads": 1, "head_channels": 36, "caption_channels": 40},
    ],
)
@pytest.mark.parametrize("family", [ALPHA, SIGMA], ids=["alpha", "sigma"])
def test_other_sizes_give_the_same_numbers(folder, family, config):
    expected = reference(**family, **config)
    shapes = {"channels": config.get("in_channels", 4), "captions": config.get("caption_channels", 16)}
    model = load_dit(saved(folder, "sizes", expected))
    assert worst(model, expected, sizes=[(8, 8), (16, 24), (64, 64)], tokens=[5], **shapes) < LIMIT
    assert model.model.latent_format.latent_channels == shapes["channels"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_files_lose_nothing_more(folder, dtype):
    """On the CPU ComfyUI computes in float32, so that only the file's own rounding is left, which both have."""
    rounded = reference(**SIGMA).to(dtype)
    model = load_dit(saved(folder, "half", rounded))
    assert worst(model, rounded.float(), sizes=[(8, 8), (64, 40)], tokens=[5]) < LIMIT


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_fp8_weights_are_the_rounded_weights(folder, weight_dtype):
    expected = reference(**ALPHA)
    name = saved(folder, "fp8", expected)
    model = load_dit(name, weight_dtype)
    dtype = getattr(torch, weight_dtype.replace("fp8", "float8"))
    assert model.model.diffusion_model.blocks[0].attn.qkv.weight.dtype == dtype
    rounded = copy.deepcopy(expected)
    for key, parameter in rounded.named_parameters():
        if not key.endswith("scale_shift_table"):  # ComfyUI keeps the modulations in float32
            parameter.data = parameter.data.to(dtype).float()
    assert worst(model, rounded, sizes=[(8, 8), (64, 40)], tokens=[5]) < LIMIT
    assert worst(model, expected, sizes=[(8, 8)], tokens=[5]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", [ALPHA, SIGMA], ids=["alpha", "sigma"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (40, 48)])
def test_a_sampled_image_is_the_same(folder, family, height, width):
    """Euler with guidance over diffusers' model, against KSampler: latents, times and sizes are handed on rightly."""
    expected = reference(**family)
    model = load_dit(saved(folder, "sampled", expected))
    steps, cfg = 3, 2.0
    size = {"samples": torch.zeros(1, 4, height, width)}
    ours = tiny.run(model, tiny.cond(1, 5), tiny.cond(2, 3), steps=steps, cfg=cfg, size=size)
    space = model.model.model_sampling
    sigmas = sampling.schedule(model, steps, "euler", "normal").sigmas
    x = sigmas[0] * torch.randn(1, 4, height, width, generator=torch.manual_seed(7))
    if space.sigma_max <= sigmas[0]:  # ComfyUI starts from the full noise so that its variance with the image is right
        x = x * (1 + sigmas[0] ** 2) ** 0.5 / sigmas[0]
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        time, scaled = space.timestep(sigma)[None].float(), x / (1 + sigma**2) ** 0.5
        noise = [by_diffusers(expected, scaled, time, tiny.cond(*which)[0][0]) for which in ((1, 5), (2, 3))]
        x = x + (after - sigma) * (noise[1] + cfg * (noise[0] - noise[1]))
    right = x / model.model.latent_format.scale_factor
    assert (ours - right).abs().max() / right.abs().max() < LIMIT


@pytest.mark.parametrize("family", ["PixArt-alpha", "PixArt-Sigma"])
def test_a_model_saved_in_comfyuis_format_comes_back_bit_by_bit(folder, family):
    name = saved(folder, "diffusers", reference(sample_size=32, use_additional_conditions=False))
    first = load_dit(name, family=family)
    (folder / "original").mkdir(exist_ok=True)
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in first.model.diffusion_model.state_dict().items()},
        folder / "original" / "model.safetensors",
    )
    shutil.copy(folder / "diffusers" / "config.json", folder / "original")
    second = load_described("diffusion_models/original/model.safetensors")
    assert "original format" in second.text and second.text.startswith(f"{family} (its prompts have ")
    for size in [(8, 8), (64, 40)]:
        given = inputs(*size, 5)
        assert torch.equal(by_comfyui(second.model, *given), by_comfyui(first, *given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("side", "scale", "extent"), [(32, None, 16), (32, 0.5, 32), (64, None, 32), (128, 1, 64)])
def test_a_stored_position_grid_in_the_original_format_is_honoured(folder, side, scale, extent, dtype):
    """PixArt's own files hold the grid that they were trained with, and no config.json: here of 2 heads of 72."""
    expected = reference(
        heads=2, head_channels=72, sample_size=side, interpolation_scale=scale, use_additional_conditions=False
    )
    state = load_dit(saved(folder, "grids", expected)).model.diffusion_model.state_dict()
    (folder / "bare").mkdir(exist_ok=True)
    grid = expected.pos_embed.pos_embed.to(dtype).clone()
    save_file({**state, "pos_embed": grid}, folder / "bare" / "model.safetensors")
    loaded = load_described("diffusion_models/bare/model.safetensors")
    assert "2 heads" in loaded.text and f"positions over {extent} patches" in loaded.text
    limit = LIMIT if dtype is torch.float32 else 2e-3  # the grid is measured from rounded values
    assert worst(loaded.model, expected, sizes=[(8, 8), (16, 24), (64, 40)], tokens=[5]) < limit


def test_a_prefixed_single_file_gives_the_same_numbers(folder):
    expected = reference(**SIGMA)
    saved(folder, "prefixed", expected)
    path = folder / "prefixed" / FILE
    for prefix in ("transformer.", "model.diffusion_model.", "ema.model."):
        save_file({f"{prefix}{k}": v for k, v in expected.state_dict().items()} | {"vae.w": torch.ones(1)}, path)
        model = load_dit(f"diffusion_models/prefixed/{FILE}")
        assert worst(model, expected, sizes=[(8, 8)], tokens=[5]) < LIMIT


def test_a_model_made_anew_is_the_same(folder):
    expected = reference(sample_size=32, **SIGMA)
    model = load_dit(saved(folder, "anew", expected, max_shard_size="60KB"), "fp8_e4m3fn", "PixArt-alpha")
    make, arguments = model.cached_patcher_init
    again = make(*arguments, disable_dynamic=True)
    assert again.model.latent_format.scale_factor == model.model.latent_format.scale_factor == 0.18215
    states = [m.model.diffusion_model.state_dict() for m in (model, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value.float(), states[1][key].float()) for key, value in states[0].items())
    given = inputs(16, 24, 5)
    assert torch.equal(by_comfyui(again, *given), by_comfyui(model, *given))


def test_loras_map_onto_any_width(folder):
    model = load_dit(saved(folder, "lora", reference(**SIGMA)))
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    qkv = "diffusion_model.blocks.1.attn.qkv.weight"
    assert keys["transformer.transformer_blocks.1.attn1.to_k"] == (qkv, (0, 48, 48))
    assert keys["base_model.model.transformer_blocks.1.attn1.to_v"] == (qkv, (0, 96, 48))
    known = {f"diffusion_model.{key}" for key in model.model.diffusion_model.state_dict()}
    assert {to if isinstance(to, str) else to[0] for key, to in keys.items() if "transformer_blocks" in key} <= known


def test_every_weight_of_the_network_comes_from_the_file(folder):
    expected = reference(**ALPHA)
    network = load_dit(saved(folder, "whole", expected)).model.diffusion_model
    ours = sum(value.numel() for key, value in network.state_dict().items() if key != "y_embedder.y_embedding")
    assert ours == sum(value.numel() for value in expected.state_dict().values())
    assert isinstance(network, PixArtMS)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


def test_heads_that_no_config_gives_are_asked_for(folder):
    name = saved(folder, "headless", reference(**SIGMA))
    (folder / "headless" / "config.json").unlink()
    with pytest.raises(ValueError, match="width 48.*no multiple of PixArt's 72.*put the config.json.*beside the file"):
        load_dit(name)


def test_a_config_of_another_model_is_refused_beside_a_diffusers_file(folder):
    name = saved(folder, "foreign", reference(**SIGMA))
    config = folder / "foreign" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 28}))
    with pytest.raises(
        ValueError, match="'foreign/config.json' has num_layers 28, but the weights of 'foreign/.* have 2"
    ):
        load_dit(name)


def test_a_file_without_config_reads_as_stock_comfyui_has_it(folder):
    """Width 144 is 2 heads of 72; the grid is the usual one of 32 patches."""
    expected = reference(heads=2, head_channels=72, sample_size=64, use_additional_conditions=False)
    name = saved(folder, "plain", expected)
    (folder / "plain" / "config.json").unlink()
    assert set(load_file(folder / "plain" / FILE)) == set(expected.state_dict())
    loaded = load_described(name)
    assert "Set family to PixArt-alpha if it is one" in loaded.text
    assert worst(loaded.model, expected, sizes=[(8, 8), (64, 40)], tokens=[5]) < LIMIT
