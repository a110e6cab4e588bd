"""Load PEFT LoRA against peft itself: the same small models, merged by peft and patched by the node.

What each test compares with is diffusers' or transformers' own model, run by peft's own code, in float32.
"""

import copy
import json

import comfy.model_management
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.pixart_t5
import comfy.utils
import families
import folder_paths
import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.checkpoints import peft_lora
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.loading import lora
from medsteer_pack.medsteer_core.host.patching.fingerprint import differs, fingerprint
from medsteer_pack.medsteer_core.host.sampling import extraction
from medsteer_pack.nodes.lora import LoadPEFTLoRA
from safetensors.torch import load_file, save_file

import nodes as core

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
# peft warns of patterns that match no module: those for T5 in the transformer, and the other way round.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning", "ignore:PiSSA changes")

WIDTH, DEPTH, CAPTION = 48, 2, 16
LATENT = 64  # the side at which diffusers' and ComfyUI's position grids agree
PROMPT = "an endoscopy image of polyps"
TRANSFORMER_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "linear", "linear_1", "linear_2",
                      "pos_embed.proj", "proj_out"]  # fmt: skip
TEXT_LAYERS = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
# How peft scales: the options that a LoRA is saved with, for the transformer and for T5.
SCALINGS = {
    "alpha is r": {"r": 4, "lora_alpha": 4},
    "alpha is not r": {"r": 4, "lora_alpha": 10},
    "rsLoRA": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"to_q": 2, r".*\.1\.attn1\.to_k": 8, r"block\.0\.layer\.0\.SelfAttention\.[qv]": 3, "wo": 5},
        "alpha_pattern": {"attn1.to_q": 5, "ff.net.2": 1, "SelfAttention.q": 7, "encoder.block.1.*.wo": 0.5},
    },
    "rsLoRA with patterns": {
        "r": 4, "lora_alpha": 2, "use_rslora": True,
        "rank_pattern": {"^transformer_blocks.0.attn2.to_v": 6, "^encoder.block.1.layer.0.SelfAttention.o": 6},
        "alpha_pattern": {"to_out.0": 3, "o": 3},
    },
}  # fmt: skip


# The same small models, twice


def pixart_twins():
    """diffusers' PixArt with random weights, and ComfyUI's with the same."""
    torch.manual_seed(0)
    theirs = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=WIDTH // 2, in_channels=4, out_channels=8, num_layers=DEPTH,
        cross_attention_dim=WIDTH, sample_size=LATENT, patch_size=2, caption_channels=CAPTION,
        use_additional_conditions=False, norm_num_groups=1,
    ).eval()  # fmt: skip
    grid = theirs.pos_embed.pos_embed.clone()
    tiny.fill(theirs, 1)
    theirs.pos_embed.pos_embed.copy_(grid)
    ours = tiny.model(width=WIDTH, depth=DEPTH, pred_sigma=True, caption_channels=CAPTION)
    state = ours.model.diffusion_model.state_dict()
    places = comfy.utils.pixart_to_diffusers({"depth": DEPTH, "hidden_size": WIDTH})
    for name, value in theirs.state_dict().items():
        if name in places:  # all but the position grid
            key, part = (places[name], None) if isinstance(places[name], str) else places[name]
            (state[key] if part is None else state[key].narrow(*part)).copy_(value.reshape_as(value))
    return theirs, ours


def t5_twins():
    """transformers' T5 encoder as T5 v1.1 has it, and ComfyUI's PixArt CLIP with the same weights."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 32128}
    theirs = transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    tiny.fill(theirs, 2)
    options = {**sizes, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "t5"}
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(
            comfy.text_encoders.pixart_t5.PixArtTokenizer, comfy.text_encoders.pixart_t5.pixart_te()
        ),
        state_dict=[theirs.state_dict()],
        model_options={"dtype": torch.float32, "t5xxl_model_config": options},
    )
    return theirs, clip


@pytest.fixture(scope="module")
def pixarts():
    return pixart_twins()


@pytest.fixture(scope="module")
def t5s():
    return t5_twins()


@torch.no_grad()
def predict(model):
    """The noise that a transformer predicts, ``(2, 4, 64, 64)``; a ComfyUI MODEL is loaded with its patches first."""
    generator = torch.Generator().manual_seed(3)
    latent, text = (
        torch.randn(2, 4, LATENT, LATENT, generator=generator),
        torch.randn(2, 5, CAPTION, generator=generator),
    )
    times = torch.tensor([700, 120])
    if hasattr(model, "model") and hasattr(model.model, "diffusion_model"):
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        return model.model.diffusion_model(latent, times, text)
    conditions = {"resolution": None, "aspect_ratio": None}
    return model(latent, encoder_hidden_states=text, timestep=times, added_cond_kwargs=conditions).sample[:, :4]


@torch.no_grad()
def encode(model):
    """The hidden states of a prompt, ``(1, tokens, 32)``."""
    if isinstance(model, comfy.sd.CLIP):
        return model.encode_from_tokens(model.tokenize(PROMPT))
    ids = [
        pair[0] for pair in comfy.text_encoders.pixart_t5.PixArtTokenizer().tokenize_with_weights(PROMPT)["t5xxl"][0]
    ]
    return model(torch.tensor([ids])).last_hidden_state


def relative_error(value, wanted):
    """Largest error, relative to the largest value."""
    return float((value - wanted).abs().max() / wanted.abs().max())


# LoRAs as peft saves them


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty models/loras."""
    root = tmp_path / "loras"
    root.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(root)], {".safetensors"}))
    monkeypatch.delitem(folder_paths.filename_list_cache, "loras", raising=False)
    return root


def trained(base, targets, seed=5, **options):
    """peft's model with a LoRA that does something: peft begins with up = 0."""
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=targets, **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            # Without gradients: peft trains these, and the test only needs some values.
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 / parameter.shape[-1] ** 0.5
    return wrapped


def merged(wrapped, strength=1.0):
    """What peft merges, with the LoRA ``strength`` times as strong."""
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data *= strength
    return wrapped.merge_and_unload()


def save_transformer(pixarts, path, seed=5, targets=TRANSFORMER_LAYERS, strength=1.0, **options):
    """Save a LoRA and give the prediction of the model that peft merged it into."""
    wrapped = trained(pixarts[0], targets, seed, **(options or SCALINGS["alpha is not r"]))
    wrapped.save_pretrained(path)
    return predict(merged(wrapped, strength))


def save_text(t5s, path, seed=6, targets=TEXT_LAYERS, strength=1.0, **options):
    wrapped = trained(t5s[0], targets, seed, **(options or SCALINGS["alpha is not r"]))
    wrapped.save_pretrained(path)
    return encode(merged(wrapped, strength))


def edit_config(path, **options):
    file = path / peft_lora.CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


def edit_tensors(path, edit):
    tensors = edit(load_file(path / peft_lora.WEIGHTS_FILE))
    save_file(tensors, path / peft_lora.WEIGHTS_FILE)


# Parity


def test_the_models_are_the_same_before_any_lora(pixarts, t5s):
    assert relative_error(predict(pixarts[1]), predict(pixarts[0])) < 1e-5
    assert relative_error(encode(t5s[1]), encode(t5s[0])) < 1e-5


@pytest.mark.parametrize("options", SCALINGS.values(), ids=SCALINGS)
def test_a_transformer_lora_gives_what_peft_gives_merged(pixarts, folder, options):
    wanted = save_transformer(pixarts, folder / "transformer_lora", **options)
    model, _clip, report = lora.apply_lora(pixarts[1], None, "transformer_lora", 1.0, 1.0)
    assert relative_error(predict(pixarts[1]), wanted) > 0.05, "the LoRA must matter"
    assert relative_error(predict(model), wanted) < 1e-4
    assert f"applied {DEPTH * 10 + 7}: " in report and "missing 0" in report and "unexpected 0" in report


@pytest.mark.parametrize("options", SCALINGS.values(), ids=SCALINGS)
def test_a_text_lora_gives_what_peft_gives_merged(t5s, folder, pixarts, options):
    wanted = save_text(t5s, folder / "text_encoder_lora", **options)
    _model, clip, report = lora.apply_lora(pixarts[1], t5s[1], "text_encoder_lora", 1.0, 1.0)
    assert relative_error(encode(t5s[1]), wanted) > 0.05, "the LoRA must matter"
    assert relative_error(encode(clip), wanted) < 1e-4
    assert "applied 14: " in report and "missing 0" in report and "unexpected 0" in report


@pytest.mark.parametrize("strength", [0.4, -1.5])
def test_strengths_scale_each_side_of_the_parent_folder(pixarts, t5s, folder, strength):
    wanted_model = save_transformer(pixarts, folder / "medsteer" / "transformer_lora", strength=strength)
    wanted_clip = save_text(t5s, folder / "medsteer" / "text_encoder_lora", strength=-strength)
    model, clip, report = lora.apply_lora(pixarts[1], t5s[1], "medsteer", strength, -strength)
    assert relative_error(predict(model), wanted_model) < 1e-4
    assert relative_error(encode(clip), wanted_clip) < 1e-4
    assert f"transformer_lora: on MODEL at strength {strength:g}, rank 4, scale 2.5" in report
    assert f"text_encoder_lora: on CLIP at strength {-strength:g}" in report


def test_the_side_follows_from_the_keys_and_not_from_the_folder(pixarts, t5s, folder):
    wanted = save_text(t5s, folder / "transformer_lora")
    model, clip, _report = lora.apply_lora(pixarts[1], t5s[1], "transformer_lora", 1.0, 1.0)
    assert model is pixarts[1]
    assert relative_error(encode(clip), wanted) < 1e-4


def test_keys_with_the_adapters_name_are_the_same_lora(pixarts, folder):
    wanted = save_transformer(pixarts, folder / "a")
    edit_tensors(folder / "a", lambda tensors: {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()})
    model, *_ = lora.apply_lora(pixarts[1], None, "a", 1.0, 1.0)
    assert relative_error(predict(model), wanted) < 1e-4


def test_half_precision_tensors_are_multiplied_in_float32(pixarts, folder):
    wrapped = trained(pixarts[0], ["to_q"], **SCALINGS["alpha is not r"])
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16().float()
    wrapped.save_pretrained(folder / "a")
    edit_tensors(folder / "a", lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    model, *_ = lora.apply_lora(pixarts[1], None, "a", 1.0, 1.0)
    assert relative_error(predict(model), predict(merged(wrapped))) < 1e-4


def test_a_pissa_lora_is_refused_until_peft_has_converted_it(pixarts, folder):
    options = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "ff.net.2"], init_lora_weights="pissa")
    wrapped = peft.get_peft_model(copy.deepcopy(pixarts[0]), options)
    options.init_lora_weights = True  # as peft asks for, so that the start is saved as an ordinary LoRA
    wrapped.save_pretrained(folder / "start")
    options.init_lora_weights = "pissa"
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))
    wrapped.save_pretrained(folder / "raw")
    wrapped.save_pretrained(folder / "converted", path_initial_model_for_weight_conversion=str(folder / "start"))
    refused(pixarts, "raw", "init_lora_weights = 'pissa', which changes the model's own weights.*conversion")
    model, _clip, report = lora.apply_lora(pixarts[1], None, "converted", 1.0, 1.0)
    assert relative_error(predict(model), predict(merged(wrapped))) < 1e-4
    assert "rank 8" in report


# What is not changed


def test_strength_zero_gives_the_same_objects_and_bits(pixarts, t5s, folder):
    save_transformer(pixarts, folder / "both" / "a")
    save_text(t5s, folder / "both" / "b")
    before = predict(pixarts[1]), encode(t5s[1])
    model, clip, report = lora.apply_lora(pixarts[1], t5s[1], "both", 0.0, 0.0)
    assert model is pixarts[1] and clip is t5s[1]
    assert torch.equal(predict(model), before[0]) and torch.equal(encode(clip), before[1])
    assert "a: not applied, the strength for MODEL is 0" in report
    model, clip, _report = lora.apply_lora(pixarts[1], t5s[1], "both", 0.0, 1.0)
    assert model is pixarts[1] and clip is not t5s[1]
    model, clip, _report = lora.apply_lora(pixarts[1], t5s[1], "both", 1.0, 0.0)
    assert model is not pixarts[1] and clip is t5s[1]


def test_the_inputs_are_never_changed(pixarts, t5s, folder):
    save_transformer(pixarts, folder / "both" / "a")
    save_text(t5s, folder / "both" / "b")
    before = predict(pixarts[1]), encode(t5s[1])
    model, clip, _report = lora.apply_lora(pixarts[1], t5s[1], "both", 1.0, 1.0)
    assert not torch.equal(predict(model), before[0]) and not torch.equal(encode(clip), before[1])
    assert not pixarts[1].patches and not t5s[1].patcher.patches
    assert torch.equal(predict(pixarts[1]), before[0]) and torch.equal(encode(t5s[1]), before[1])


# With other nodes


def test_it_adds_to_what_cores_lora_loader_does_in_either_order(pixarts, folder):
    wrapped = trained(pixarts[0], ["to_q"], **SCALINGS["alpha is not r"])
    wrapped.save_pretrained(folder / "peft")
    theirs = wrapped.merge_and_unload()
    up, down = torch.randn(WIDTH, 3), torch.randn(3, WIDTH) * 0.1
    names = ["diffusion_model.blocks.0.attn.proj", "lora_unet_blocks_1_cross_attn_proj"]
    plain = {f"{n}.lora_{side}.weight": value for n in names for side, value in (("up", up), ("down", down))}
    save_file({key: value.clone() for key, value in plain.items()}, folder / "plain.safetensors")
    for module in (theirs.transformer_blocks[0].attn1, theirs.transformer_blocks[1].attn2):
        module.to_out[0].weight.data += 0.7 * up @ down
    load = core.LoraLoaderModelOnly().load_lora_model_only
    ours_last, *_ = lora.apply_lora(load(pixarts[1], "plain.safetensors", 0.7)[0], None, "peft", 1.0, 1.0)
    ours_first = load(lora.apply_lora(pixarts[1], None, "peft", 1.0, 1.0)[0], "plain.safetensors", 0.7)[0]
    wanted = predict(theirs)
    assert relative_error(predict(ours_last), wanted) < 1e-4
    assert relative_error(predict(ours_first), wanted) < 1e-4


def test_two_of_its_own_add_up(pixarts, folder):
    save_transformer(pixarts, folder / "a", seed=5)
    wrapped = trained(pixarts[0], TRANSFORMER_LAYERS, seed=5, **SCALINGS["alpha is not r"])
    once = merged(wrapped, 1.0)
    twice = predict(merged(trained(once, TRANSFORMER_LAYERS, seed=5, **SCALINGS["alpha is not r"]), 0.5))
    model, *_ = lora.apply_lora(pixarts[1], None, "a", 1.0, 1.0)
    model, *_ = lora.apply_lora(model, None, "a", 0.5, 1.0)
    assert relative_error(predict(model), twice) < 1e-4


def test_a_vector_says_that_it_was_extracted_with_the_lora(pixarts, folder):
    save_transformer(pixarts, folder / "a", seed=5)
    save_transformer(pixarts, folder / "b", seed=8)
    stock = pixarts[1]
    model, *_ = lora.apply_lora(stock, None, "a", 1.0, 1.0)
    present, absent, negative = (tiny.cond(seed) for seed in range(3))
    vector = extraction.extract(model, tiny.request(model, present, absent, negative, samples=1))
    made_with = vector.provenance["model"]
    assert made_with["patches"] and made_with == fingerprint(model)
    assert made_with["weights"] == fingerprint(stock)["weights"]
    others = [stock, lora.apply_lora(stock, None, "b", 1.0, 1.0)[0], lora.apply_lora(stock, None, "a", 0.9, 1.0)[0]]
    assert [differs(vector, other) for other in others] == [
        "the vector was extracted with other LoRAs on this model"
    ] * 3
    assert differs(vector, lora.apply_lora(stock, None, "a", 1.0, 1.0)[0]) == ""


def test_steer_and_the_lora_compose_in_either_order(pixarts, folder):
    save_transformer(pixarts, folder / "a")
    stock, prompts = pixarts[1], (tiny.cond(1), tiny.cond(2))
    vector = tiny.vector(stock)
    model, *_ = lora.apply_lora(stock, None, "a", 1.0, 1.0)
    lora_first = tiny.run(tiny.steered(model, vector), *prompts)
    steer_first = tiny.run(lora.apply_lora(tiny.steered(stock, vector), None, "a", 1.0, 1.0)[0], *prompts)
    assert torch.equal(lora_first, steer_first)
    assert relative_error(tiny.run(model, *prompts), lora_first) > 1e-3
    assert relative_error(tiny.run(tiny.steered(stock, vector), *prompts), lora_first) > 1e-3


def test_a_unet_takes_a_peft_lora_too(folder):
    """Other families' names are known to ComfyUI in other forms; a UNet's only in that of kohya's files."""
    config = comfy.supported_models.SD15(
        {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
         "channel_mult": [1, 2], "transformer_depth": [1, 0], "transformer_depth_middle": 0,
         "transformer_depth_output": [1, 1, 0, 0], "context_dim": 16, "num_heads": 2, "num_head_channels": -1,
         "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False, "adm_in_channels": None,
         "use_temporal_attention": False}
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    network = config.get_model({})
    families.fill(network)
    model = comfy.model_patcher.CoreModelPatcher(network, torch.device("cpu"), torch.device("cpu"))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
    up, down = torch.randn(32, 2), torch.randn(2, 32)
    (folder / "unet").mkdir()
    tensors = {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    save_file(tensors, folder / "unet" / peft_lora.WEIGHTS_FILE)
    (folder / "unet" / peft_lora.CONFIG_FILE).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 6}')
    patched, *_ = lora.apply_lora(model, None, "unet", 1.0, 1.0)
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    weight = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2.to_out[0].weight
    before = weight.clone()
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    weight = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2.to_out[0].weight
    torch.testing.assert_close(weight, before + 3 * up @ down)


# What does not fit


def refused(pixarts, name, match, clip=None):
    """Applying it is refused, in one line, and leaves no patch behind."""
    with pytest.raises(MedSteerError, match=match) as error:
        lora.apply_lora(pixarts[1], clip, name, 1.0, 1.0)
    assert "\n" not in str(error.value)
    assert not pixarts[1].patches and (clip is None or not clip.patcher.patches)


def test_a_text_part_without_a_clip_is_refused_unless_its_strength_is_zero(pixarts, t5s, folder):
    save_transformer(pixarts, folder / "both" / "a")
    save_text(t5s, folder / "both" / "b")
    refused(pixarts, "both", "'b' is a LoRA for the text encoder, and no clip is connected. Connect the clip, or set")
    model, clip, _report = lora.apply_lora(pixarts[1], None, "both", 1.0, 0.0)
    assert model.patches and clip is None


def test_a_lora_of_another_width_is_refused_with_both_shapes(pixarts, folder):
    save_transformer(pixarts, folder / "a", targets=["to_q", "proj_out"])

    def narrower(tensors):
        return {k: v[:, :40].clone() if "proj_out.lora_A" in k else v for k, v in tensors.items()}

    edit_tensors(folder / "a", narrower)  # one module of five: nothing may be applied before all are looked at
    refused(pixarts, "a", r"'a' is a LoRA for a model of another size: 'proj_out' is \(32, 40\) there and \(32, 48\)")


def test_a_fused_slice_is_checked_by_its_own_shape(pixarts, folder):
    save_transformer(pixarts, folder / "a", targets=["to_v"])
    edit_tensors(folder / "a", lambda tensors: {k: v.repeat(3, 1) if "lora_B" in k else v for k, v in tensors.items()})
    refused(pixarts, "a", r"'transformer_blocks.0.attn1.to_v' is \(144, 48\) there and \(48, 48\)")


def test_blocks_that_the_lora_lacks_are_missing_and_those_that_the_model_lacks_unexpected(pixarts, folder):
    save_transformer(pixarts, folder / "a", targets=["to_q"])

    def other_depth(tensors):
        moved = {k.replace("blocks.1.", "blocks.7."): v for k, v in tensors.items()}
        return {**moved, "base_model.model.scale_shift_table": torch.ones(2)}

    edit_tensors(folder / "a", other_depth)
    model, _clip, report = lora.apply_lora(pixarts[1], None, "a", 1.0, 1.0)
    assert {entry.removeprefix("diffusion_model.") for entry in model.patches} == {
        "blocks.0.attn.qkv.weight",
        "blocks.0.cross_attn.q_linear.weight",
    }
    assert "applied 2: transformer_blocks.0.attn1.to_q, transformer_blocks.0.attn2.to_q" in report
    assert "Warning: missing 2: transformer_blocks.1.attn1.to_q, transformer_blocks.1.attn2.to_q" in report
    assert "Warning: unexpected 3: transformer_blocks.7.attn1.to_q, transformer_blocks.7.attn2.to_q, base_" in report


def test_a_lora_of_which_nothing_fits_is_refused(pixarts, t5s, folder):
    save_transformer(pixarts, folder / "a", targets=["to_q"])
    edit_tensors(
        folder / "a", lambda tensors: {k.replace("transformer_blocks", "layers"): v for k, v in tensors.items()}
    )
    refused(
        pixarts, "a", r"'a' fits nothing in this MODEL: none of its 4 modules \('layers.0.attn1.to_q', .*AnySizePixArt"
    )
    save_text(t5s, folder / "b", targets=["q"])
    edit_tensors(folder / "b", lambda tensors: {k.replace("encoder.b", "decoder.b"): v for k, v in tensors.items()})
    refused(pixarts, "b", "'b' fits nothing in this CLIP: none of its 2 modules", clip=t5s[1])


def test_two_loras_for_the_same_weights_are_no_parts_of_one(pixarts, folder):
    save_transformer(pixarts, folder / "run" / "checkpoint-500", targets=["to_q"])
    save_transformer(pixarts, folder / "run" / "checkpoint-900", targets=["to_q", "to_k"])
    refused(pixarts, "run", "'run' holds 'checkpoint-500' and 'checkpoint-900', which both change '.*to_q'.*Choose one")


def test_a_part_that_is_damaged_keeps_the_whole_from_being_applied(pixarts, t5s, folder):
    save_transformer(pixarts, folder / "both" / "a", targets=["to_q"])
    save_text(t5s, folder / "both" / "b", targets=["q"])
    file = folder / "both" / "b" / peft_lora.WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-9])
    refused(pixarts, "both", "b.adapter_model.safetensors' is not a readable safetensors file, or cut off", clip=t5s[1])


def test_dora_as_peft_saves_it_is_refused(pixarts, folder):
    save_transformer(pixarts, folder / "a", targets=["to_q"], r=4, lora_alpha=8, use_dora=True)
    refused(pixarts, "a", "uses use_dora = True")
    edit_config(folder / "a", use_dora=False)
    refused(pixarts, "a", "lora_magnitude_vector.*which is use_dora")


# The list, and the node


def test_the_list_holds_parts_and_their_parents(pixarts, folder):
    for place in ("medsteer/transformer_lora", "medsteer/text_encoder_lora", "style/deep/one", "alone"):
        (folder / place).mkdir(parents=True)
        save_file({"x": torch.ones(1)}, folder / place / peft_lora.WEIGHTS_FILE)
        (folder / place / peft_lora.CONFIG_FILE).write_text("{}")
    (folder / "no config").mkdir()
    save_file({"x": torch.ones(1)}, folder / "no config" / peft_lora.WEIGHTS_FILE)
    save_file({"x": torch.ones(1)}, folder / "plain.safetensors")
    assert lora.names() == [
        "alone", "medsteer", "medsteer/text_encoder_lora", "medsteer/transformer_lora", "style/deep", "style/deep/one",
    ]  # fmt: skip
    assert [path.name for path in lora.find("medsteer")] == ["text_encoder_lora", "transformer_lora"]
    assert lora.find("alone") == [folder / "alone"]


@pytest.mark.parametrize("name", ["", ".", "..", "../loras/a", "a/../a", "a/", "/a", "gone", "plain.safetensors"])
def test_a_name_that_is_not_listed_is_refused(folder, name):
    (folder / "a").mkdir()
    save_file({"x": torch.ones(1)}, folder / "a" / peft_lora.WEIGHTS_FILE)
    (folder / "a" / peft_lora.CONFIG_FILE).write_text("{}")
    with pytest.raises(MedSteerError, match=f"no PEFT LoRA '{name}'. Put its folder, .* into models/loras"):
        lora.find(name)
    assert LoadPEFTLoRA.validate_inputs(lora_name=name) == lora.problem(name) != ""


def test_the_node_gives_model_clip_and_report(pixarts, t5s, folder):
    save_transformer(pixarts, folder / "medsteer" / "transformer_lora")
    wanted = save_text(t5s, folder / "medsteer" / "text_encoder_lora")
    assert LoadPEFTLoRA.validate_inputs(lora_name="medsteer") is True
    assert LoadPEFTLoRA.validate_inputs(lora_name=None) is True
    model, clip, report = (
        LoadPEFTLoRA.PREPARE_CLASS_CLONE(None).execute(pixarts[1], "medsteer", 1.0, 1.0, t5s[1]).result
    )
    assert model.patches and relative_error(encode(clip), wanted) < 1e-4
    assert report.count("applied") == 2


def test_changed_files_are_read_again(pixarts, folder):
    save_transformer(pixarts, folder / "a", targets=["to_q"])
    before = LoadPEFTLoRA.fingerprint_inputs(lora_name="a")
    assert LoadPEFTLoRA.fingerprint_inputs(lora_name="a") == before
    edit_config(folder / "a", lora_alpha=123)
    assert LoadPEFTLoRA.fingerprint_inputs(lora_name="a") != before
