"""Diffusion transformers from the model folders: PixArts load and can be steered, anything else is refused by name."""

import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.checkpoints import pixart_state
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.loading import checkpoints
from medsteer_pack.medsteer_core.host.loading.checkpoints import load_dit, model_names
from medsteer_pack.medsteer_core.host.loading.pixart import AnySizePixArtMS
from medsteer_pack.medsteer_core.host.patching.sites import find_sites
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A one-block PixArt of the only width that ComfyUI detects, alone and inside a checkpoint; and foreign files."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: root / name for name in ("diffusion_models", "checkpoints")}
    for folder in folders.values():
        folder.mkdir()
    stock = tiny.stock_model(width=1152, depth=1, num_heads=16, caption_channels=4096, pred_sigma=True)
    state = {key: value.half() for key, value in stock.model.diffusion_model.state_dict().items()}
    save_file(state, folders["diffusion_models"] / "pixart.safetensors")
    prefixed = {f"model.diffusion_model.{key}": value for key, value in state.items()}
    save_file(prefixed, folders["checkpoints"] / "whole.safetensors")
    save_file(joint_attention(), folders["diffusion_models"] / "joint.safetensors")
    save_file({"some.weight": torch.ones(4, 4)}, folders["diffusion_models"] / "foreign.safetensors")
    save_file({"input_blocks.0.0.weight": torch.ones(4, 4)}, folders["diffusion_models"] / "part.safetensors")
    save_file({"some.weight": torch.ones(4, 4)}, folders["checkpoints"] / "foreign.safetensors")
    (folders["diffusion_models"] / "text.safetensors").write_text("not a model at all")
    return folders


def joint_attention():
    """The weights of a small SD3, which ComfyUI loads and which has no text cross-attention."""
    config = comfy.supported_models.SD3(
        {"in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 1, "input_size": None, "adm_in_channels": 8,
         "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64}},
         "pos_embed_scaling_factor": None}
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    return {key: torch.zeros_like(value) for key, value in config.get_model({}).diffusion_model.state_dict().items()}


@pytest.fixture(autouse=True)
def folders(files, monkeypatch):
    for name, folder in files.items():
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(folder)], {".safetensors"}))
        monkeypatch.delitem(folder_paths.filename_list_cache, name, raising=False)


def context(seed):
    return [[torch.randn(1, 3, 4096, generator=torch.Generator().manual_seed(seed)), {}]]


def test_the_list_holds_both_folders():
    assert {"diffusion_models/pixart.safetensors", "checkpoints/whole.safetensors"} <= set(model_names())


@pytest.mark.parametrize("name", ["diffusion_models/pixart.safetensors", "checkpoints/whole.safetensors"])
def test_a_pixart_loads_and_is_steered_at_small_latents(name):
    model = load_dit(name, "default")
    assert type(model.model.diffusion_model) is AnySizePixArtMS
    assert list(find_sites(model.model.diffusion_model)) == ["blocks.0.cross_attn.proj"]
    plain = tiny.run(model, context(1), context(2), steps=2)
    steered = tiny.run(tiny.steered(model, tiny.vector(model, steps=4, width=1152)), context(1), context(2), steps=2)
    assert torch.isfinite(steered).all() and plain.shape == (1, 4, 8, 8)
    assert (steered - plain).abs().mean() > 1e-3
    assert torch.equal(tiny.run(model, context(1), context(2), steps=2), plain)


def test_fp8_weights_are_steered_too():
    model = load_dit("diffusion_models/pixart.safetensors", "fp8_e4m3fn")
    assert model.model.diffusion_model.blocks[0].cross_attn.proj.weight.dtype == torch.float8_e4m3fn
    steered = tiny.steered(model, tiny.vector(model, steps=4, width=1152))
    assert torch.isfinite(tiny.run(steered, context(1), context(2), steps=1)).all()


def test_a_model_made_anew_from_its_file_takes_any_size():
    model = load_dit("diffusion_models/pixart.safetensors", "default")
    make, arguments = model.cached_patcher_init
    assert type(make(*arguments, disable_dynamic=True).model.diffusion_model) is AnySizePixArtMS


@pytest.mark.parametrize("name", ["diffusion_models/gone.safetensors", "loras/pixart.safetensors", "pixart", ""])
def test_a_missing_file_is_refused_with_advice(name):
    with pytest.raises(MedSteerError, match=f"no model '{name}'. Put the file into models/diffusion_models"):
        load_dit(name, "default")


def test_an_unknown_weight_dtype_is_refused():
    with pytest.raises(MedSteerError, match="weight_dtype is 'int1'; one of default, fp8_e4m3fn"):
        load_dit("diffusion_models/pixart.safetensors", "int1")


@pytest.mark.parametrize(
    "name",
    ["diffusion_models/foreign.safetensors", "diffusion_models/part.safetensors", "diffusion_models/text.safetensors",
     "checkpoints/foreign.safetensors"],
)  # fmt: skip
def test_a_file_that_comfyui_cannot_load_is_refused_by_name(name):
    with pytest.raises(MedSteerError, match=f"'{name.split('/')[1]}'"):
        load_dit(name, "default")


def test_running_out_of_memory_is_left_to_comfyui(monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.cuda.OutOfMemoryError("full")

    for place, function, name in (
        (checkpoints, "build", "pixart"),
        (comfy.sd, "load_diffusion_model_state_dict", "joint"),
        (comfy.utils, "load_torch_file", "foreign"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, function, full)
            with pytest.raises(torch.cuda.OutOfMemoryError):
                load_dit(f"diffusion_models/{name}.safetensors", "default")


def test_a_model_without_cross_attention_is_refused_with_the_families_that_work():
    with pytest.raises(MedSteerError, match="not a model that MedSteer can steer.*PixArt"):
        load_dit("diffusion_models/joint.safetensors", "default")


def test_a_family_that_is_none_is_refused():
    with pytest.raises(MedSteerError, match="family is 'PixArt'; one of auto, PixArt-alpha, PixArt-Sigma was expected"):
        load_dit("diffusion_models/pixart.safetensors", "default", "PixArt")


def test_comfyuis_detection_of_a_quantised_pixart_gets_the_right_latents():
    path = folder_paths.get_full_path("diffusion_models", "pixart.safetensors")
    for family, scale in (("auto", 0.18215), ("PixArt-Sigma", 0.13025)):
        state = dict(pixart_state.only_pixart(comfy.utils.load_torch_file(path), "original", ""))
        state["y_embedder.y_embedding"] = torch.zeros(120, 4096)
        contents = checkpoints.pixart_files.Contents(state, None)
        loaded = checkpoints._open_by_comfyui(contents, "pixart", {}, family, False)
        assert loaded.model.model.latent_format.scale_factor == scale
        assert f"latent scale {scale}" in loaded.text and "loaded by ComfyUI" in loaded.text
        assert type(loaded.model.model.diffusion_model) is AnySizePixArtMS
