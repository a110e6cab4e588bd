"""PixArts of every kind, made here without a reference library: what Load DiT takes them for, and what it refuses."""

import gc
import json
import logging
import weakref

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.checkpoints import pixart_state
from medsteer_pack.medsteer_core.checkpoints.pixart_state import Sizes
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.loading import checkpoints, pixart
from medsteer_pack.medsteer_core.host.loading.checkpoints import load_described, load_dit, model_names
from medsteer_pack.medsteer_core.host.loading.pixart import AnySizePixArtMS
from medsteer_pack.nodes.load import LoadDiT
from safetensors.torch import save_file

SIZES = Sizes("diffusers", 144, 2, 4, 8, 16, 2, False)
INDEX = "model.safetensors.index.json"


def weights(sizes=SIZES, prefix="", dtype=torch.float32):
    """Random weights of a PixArt under the names of its format."""
    generator = torch.Generator().manual_seed(0)
    shapes = {source: w.source_shape for w in pixart_state.layout(sizes) for source in w.sources}
    return {prefix + key: torch.randn(shape, generator=generator).mul(0.1).to(dtype) for key, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The models' folder "one", the only one that ComfyUI knows."""
    for name in ("diffusion_models", "checkpoints"):
        (tmp_path / name).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], {".safetensors"}))
        monkeypatch.delitem(folder_paths.filename_list_cache, name, raising=False)
    (tmp_path / "diffusion_models" / "one").mkdir()
    return tmp_path / "diffusion_models" / "one"


@pytest.fixture
def put(folder):
    """Writes a model, ``put({file: weights}, config={...}, index={...})``, and gives the name of its folder."""

    def write(parts, config=None, index=None):
        for file, state in parts.items():
            save_file(state, folder / file)
        if config is not None:
            (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        if index is not None:
            (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps({"weight_map": index}))
        folder_paths.filename_list_cache.clear()
        return "diffusion_models/one/"

    return write


def shards(state, count=3):
    """``state`` in ``count`` shards, and the index's weight map."""
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    parts = {name: {key: state[key] for key in sorted(state)[i::count]} for i, name in enumerate(names)}
    return parts, {key: name for name, part in parts.items() for key in part}


CONFIG = {
    "_class_name": "PixArtTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 72, "num_layers": 2,
    "in_channels": 4, "out_channels": 8, "sample_size": 64, "caption_channels": 16, "cross_attention_dim": 144,
    "patch_size": 2, "norm_type": "ada_norm_single", "activation_fn": "gelu-approximate", "attention_bias": True,
    "norm_eps": 1e-6, "norm_elementwise_affine": False, "interpolation_scale": None, "use_additional_conditions": False,
}  # fmt: skip


def test_a_model_in_shards_is_one_name_in_the_list(put):
    parts, index = shards(weights())
    place = put(parts, index=index)
    put({"other.safetensors": weights()})
    folder_paths.filename_list_cache.clear()
    assert [name for name in model_names() if name.startswith(place)] == [
        f"{place}{INDEX}",
        f"{place}other.safetensors",
    ]
    assert "in 3 shards" not in load_described(f"{place}other.safetensors").text
    assert "3 shards of float32" in load_described(f"{place}{INDEX}").text


def test_shards_of_a_variant_are_listed_by_its_index(put, folder):
    parts, index = shards(weights())
    rename = {name: name.replace("model-", "model.fp16-") for name in parts}
    place = put({rename[name]: part for name, part in parts.items()})
    variant = f"{place}model.safetensors.index.fp16.json"
    (folder / "model.safetensors.index.fp16.json").write_text(
        json.dumps({"weight_map": {key: rename[name] for key, name in index.items()}})
    )
    folder_paths.filename_list_cache.clear()
    assert [name for name in model_names() if name.startswith(place)] == [variant]
    assert "3 shards" in load_described(variant).text


@pytest.mark.parametrize(
    ("changes", "config", "family", "scale"),
    [
        ({"micro_conditioning": True}, {}, "PixArt-alpha (it has micro-conditioning)", 0.18215),
        ({"tokens": 120}, {}, "PixArt-alpha (its prompts have 120 tokens)", 0.18215),
        ({"tokens": 300}, {}, "PixArt-Sigma (its prompts have 300 tokens)", 0.13025),
        ({}, {"model_max_length": 120}, "PixArt-alpha (its prompts have 120 tokens)", 0.18215),
        ({}, {"sample_size": 128}, "PixArt-Sigma (it is for 1024 pixels and has no micro-conditioning)", 0.13025),
        ({}, {"_name_or_path": "PixArt-alpha/PixArt-XL-2-512x512"}, "PixArt-alpha (by the name", 0.18215),
        ({}, {"_name_or_path": "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"}, "PixArt-Sigma (by the name", 0.13025),
        ({}, {}, "PixArt-Sigma\n", 0.13025),
    ],
)
def test_auto_settles_the_family_and_its_latent_scale(put, changes, config, family, scale):
    sizes = Sizes(**{**vars(SIZES), **changes})
    state = weights(sizes)
    if sizes.tokens:
        state[pixart_state.PROMPT["diffusers"]] = torch.zeros(sizes.tokens, sizes.caption_channels)
    parts = {"model.safetensors": state}
    name = put(parts, {**CONFIG, "use_additional_conditions": None, **config}) + "model.safetensors"
    loaded = load_described(name)
    assert loaded.text.startswith(family)
    assert f"latent scale {scale}," in loaded.text
    assert loaded.model.model.latent_format.scale_factor == scale
    assert ("Set family to PixArt-alpha if it is one" in loaded.text) == family.endswith("\n")
    chosen = load_described(name, family="PixArt-alpha")
    assert chosen.text.startswith("PixArt-alpha (chosen)") and "Set family" not in chosen.text
    assert chosen.model.model.latent_format.scale_factor == 0.18215
    assert load_dit(name, family="PixArt-Sigma").model.latent_format.scale_factor == 0.13025


def test_channels_without_a_known_vae_have_scale_1_and_the_node_says_so(put):
    sizes = Sizes("original", 144, 1, 16, 16, 16, 2, False)
    loaded = load_described(put({"model.safetensors": weights(sizes)}) + "model.safetensors")
    assert "latent scale 1 (none is known for 16 channels)" in loaded.text
    assert loaded.model.model.latent_format.latent_channels == 16


def test_the_node_shows_what_was_found_and_the_log_has_it_once(put, caplog):
    name = put({"model.safetensors": weights(dtype=torch.float16)}, CONFIG) + "model.safetensors"
    with caplog.at_level(logging.INFO):
        output = LoadDiT.PREPARE_CLASS_CLONE(None).execute(name, "default")
    (shown,) = output.ui.as_dict()["text"]
    assert shown.splitlines() == [
        "PixArt-Sigma",
        "2 blocks of width 144, 2 heads, 2 sites",
        "4 channels, predicts noise and its variance, captions of 16, no micro-conditioning",
        "latent scale 0.13025, positions over 32 patches",
        "diffusers format, one file of float16, kept and run in float32",
        "Nothing in the file tells alpha from Sigma: taken for Sigma. Set family to PixArt-alpha if it is one.",
    ]
    assert sum("MedSteer: " in message for message in caplog.messages) == 1
    assert type(output.args[0].model.diffusion_model) is AnySizePixArtMS


def test_the_names_of_other_copies_and_parts_in_a_file_do_not_matter(put):
    sizes = Sizes("original", 144, 2, 4, 8, 16, 2, True)
    plain = weights(sizes)
    state = {**plain, **weights(sizes, "ema."), "vae.decoder.weight": torch.ones(2)}
    prefixed = {
        f"model.diffusion_model.{key}" if "ema" not in key and "vae" not in key else key: v for key, v in state.items()
    }
    model = load_dit(put({"model.safetensors": prefixed}) + "model.safetensors")
    loaded = model.model.diffusion_model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in plain.items())


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (33, 8), (37, 63)])
def test_odd_latents_run_with_a_grid_of_the_models_own(put, size):
    config = {**CONFIG, "sample_size": 32}
    model = load_dit(put({"model.safetensors": weights()}, config) + "model.safetensors")
    assert model.model.diffusion_model.grid_extent == 16
    empty = {"samples": torch.zeros(1, 4, *size)}
    result = tiny.run(model, tiny.cond(1), tiny.cond(2), steps=2, size=empty)
    assert result.shape == (1, 4, *size) and torch.isfinite(result).all()


def test_a_quantised_pixart_goes_through_comfyuis_loader(put, monkeypatch):
    seen = []

    def load(state, **_options):
        seen.append(set(state))
        return None

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", load)
    state = {**weights(), "transformer_blocks.0.attn2.to_q.weight_scale": torch.ones(1)}
    with pytest.raises(MedSteerError, match="can't load '.*model.safetensors' as a diffusion model"):
        load_dit(put({"model.safetensors": state}) + "model.safetensors")
    assert seen == [set(state)]


# Bad input: one line that names the file, and no model was begun


@pytest.fixture
def nothing_is_built(monkeypatch):
    built = []
    monkeypatch.setattr(checkpoints, "build", lambda *_args: built.append("PixArt"))
    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", lambda *_args, **_kwargs: built.append("other"))
    yield
    assert built == []


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


Q = "transformer_blocks.1.attn1.to_q.weight"
BAD_WEIGHTS = {
    "missing": (
        without(weights(), Q),
        "lacks 'transformer_blocks.1.attn1.to_q.weight' of a PixArt of 2 blocks and width 144",
    ),
    "unknown": (
        {**weights(), "transformer_blocks.0.norm1.weight": torch.ones(144)},
        "has 'transformer_blocks.0.norm1.weight', which",
    ),
    "shape": (
        {**weights(), Q: torch.ones(144, 12)},
        r"'transformer_blocks.1.attn1.to_q.weight' is \(144, 12\); \(144, 144\)",
    ),
    "prompt": (
        {**weights(), "caption_projection.y_embedding": torch.ones(120, 7)},
        r"is \(120, 7\); \(120, 16\) was expected",
    ),
    "channels": ({**weights(), "proj_out.weight": torch.ones(20, 144)}, "predicts 5 channels from 4"),
    "flat": (
        {**weights(), "proj_out.weight": torch.ones(20)},
        r"'proj_out.weight' is \(20,\); 2 dimensions were expected",
    ),
    "integers": ({**weights(), Q: torch.ones(144, 144, dtype=torch.int8)}, "holds torch.int8 in"),
    "no depth 0": (
        without(weights(), "transformer_blocks.0.attn1.to_k.bias"),
        "lacks 'transformer_blocks.0.attn1.to_k.bias'",
    ),
    "width": (weights(Sizes("diffusers", 146, 1, 4, 8, 16, 2, False)), "has width 146; a multiple of 4 was expected"),
    "compressed": (
        {**weights(Sizes("original", 144, 1, 4, 8, 16, 2, False)), "blocks.0.attn.sr.weight": torch.ones(144, 1, 2, 2)},
        "has 'blocks.0.attn.sr.weight'.*no key-value compression",
    ),
    "positions": (
        {**weights(Sizes("original", 144, 1, 4, 8, 16, 2, False)), "pos_embed": torch.ones(1, 256, 144)},
        r"position grid of shape \(1, 256, 144\) that is not PixArt's",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_are_not_a_pixarts_are_refused(put, nothing_is_built, case):
    state, message = BAD_WEIGHTS[case]
    refused(put({"model.safetensors": state}) + "model.safetensors", message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{broken", "config.json' is no JSON"),
        ("[]", "config.json' holds a list"),
        ({}, "is the config of a None; PixArtTransformer2DModel was expected"),
        ({**CONFIG, "_class_name": "FluxTransformer2DModel"}, "is the config of a FluxTransformer2DModel"),
        ({**CONFIG, "activation_fn": "geglu"}, 'has activation_fn "geglu"; "gelu-approximate" was expected'),
        ({**CONFIG, "norm_type": "layer_norm"}, 'has norm_type "layer_norm"'),
        ({**CONFIG, "attention_bias": False}, "has attention_bias false; true was expected"),
        ({**CONFIG, "norm_eps": 1e-5}, "has norm_eps 1e-05"),
        ({**CONFIG, "sample_size": "64"}, 'has sample_size "64"; a positive number was expected'),
        ({**CONFIG, "interpolation_scale": 0}, "has interpolation_scale 0; a positive number was expected"),
        ({**CONFIG, "num_layers": 28}, "has num_layers 28, but the weights of '.*' have 2"),
        ({**CONFIG, "num_attention_heads": 16}, "has num_attention_heads x attention_head_dim 1152, but .* have 144"),
        ({**CONFIG, "use_additional_conditions": True}, "has use_additional_conditions true, but .* have false"),
    ],
)
def test_a_config_that_is_not_the_models_is_refused(put, nothing_is_built, config, message):
    refused(put({"model.safetensors": weights()}, config) + "model.safetensors", message)


def test_a_strangers_config_beside_a_file_in_the_original_format_is_left_aside_and_told(put):
    sizes = Sizes("original", 144, 1, 4, 8, 16, 2, False)
    name = put({"model.safetensors": weights(sizes)}, {"_class_name": "T5EncoderModel"}) + "model.safetensors"
    assert "config.json was left aside: " in load_described(name).text


def broken_index(case):
    parts, index = shards(weights())
    first, second, third = parts
    if case == "missing shard":
        return without(parts, second), index, f"The shard 'one/{second}' is not beside '.*{INDEX}'"
    if case == "truncated shard":
        return parts, index, f"'one/{third}' can't be read as a model file"
    if case == "outside":
        return parts, {**index, Q: "../pixart.safetensors"}, 'names the shard "../pixart.safetensors"; the plain name'
    if case == "absolute":
        return parts, {**index, Q: "/tmp/x.safetensors"}, 'names the shard "/tmp/x.safetensors"'
    if case == "pickle":
        return parts, {**index, Q: "model.bin"}, 'names the shard "model.bin"'
    if case == "number":
        return parts, {**index, Q: 3}, "names the shard 3"
    if case == "not in the shard":
        return parts, {**index, "more.weight": first}, "'more.weight' is in the index but not in the shard"
    if case == "not in the index":
        return parts, without(index, Q), f"'{Q}' is in the shard but not in the index"
    if case == "no map":
        return parts, "{}", "has no weight_map"
    return parts, "{", f"'.*{INDEX}' can't be read: .*The index of a sharded model was expected"


@pytest.mark.parametrize(
    "case",
    ["missing shard", "truncated shard", "outside", "absolute", "pickle", "number", "not in the shard",
     "not in the index", "no map", "no json"],
)  # fmt: skip
def test_a_broken_index_is_refused(put, folder, nothing_is_built, case):
    parts, index, message = broken_index(case)
    name = put(parts, index=index) + INDEX
    if case == "truncated shard":
        truncate(folder / list(parts)[-1])
    refused(name, message)


def test_a_shard_without_its_index_is_refused(put, nothing_is_built):
    parts, _ = shards(weights())
    name = put(parts) + list(parts)[0]
    refused(name, f"is one of 3 parts of a model; its index '{INDEX}' was expected beside it")


def test_a_truncated_file_is_refused(put, folder, nothing_is_built):
    name = put({"model.safetensors": weights()}) + "model.safetensors"
    truncate(folder / "model.safetensors")
    refused(name, "'.*model.safetensors' can't be read as a model file: .*download it again")


def test_nothing_of_a_model_remains_that_fails_while_it_is_made(put, monkeypatch):
    """A failure after ComfyUI made the network, as when weights don't fit into memory: it is freed, listed nowhere."""
    made = []

    def fail(patcher, *_args):
        made.append(weakref.ref(patcher.model))
        raise RuntimeError("something\nbroke")

    monkeypatch.setattr(pixart, "allow_any_size", fail)
    name = put({"model.safetensors": weights()}) + "model.safetensors"
    folder_paths.filename_list_cache.clear()
    loaded = list(comfy.model_management.current_loaded_models)
    with pytest.raises(
        MedSteerError, match="ComfyUI can't load 'one/model.safetensors' .*: something broke[.]$"
    ) as caught:
        load_dit(name)
    del caught
    gc.collect()
    assert [reference() for reference in made] == [None]
    assert comfy.model_management.current_loaded_models == loaded


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def refused(name, message):
    folder_paths.filename_list_cache.clear()
    with pytest.raises(MedSteerError, match=message) as caught:
        load_dit(name, "default")
    text = str(caught.value)
    assert "\n" not in text and f"'{name.split('/')[1]}/" in text
