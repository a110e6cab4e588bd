"""Every model family: where its sites are, and that extraction and steering hold there what they hold for PixArt."""

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models as supported
import families
import pytest
import tiny
import torch
from comfy.ldm.ace.model import ACEStepTransformer2DModel
from comfy.ldm.audio.dit import AudioDiffusionTransformer
from comfy.ldm.hunyuan3dv2_1.hunyuandit import HunYuanDiTPlain
from comfy.ldm.lightricks.av_model import LTXAVModel
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import HumoWanModel, VaceWanModel, WanModel_S2V
from comfy.ldm.wan.model_animate import AnimateWanModel
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.patching import hooks, patch, steer
from medsteer_pack.medsteer_core.host.patching.families import FAMILIES
from medsteer_pack.medsteer_core.host.patching.sites import family_name, find, find_sites, output_width, owns_its_output
from medsteer_pack.medsteer_core.host.sampling import extraction
from medsteer_pack.medsteer_core.host.sampling import runs as sampling

ERRORS = [RuntimeError, comfy.model_management.InterruptProcessingException]


@pytest.fixture(scope="module", params=list(families.ALL))
def small(request):
    return families.ALL[request.param]


@pytest.fixture(scope="module")
def model(small):
    """One model of the family. Its tests share it, since nothing may ever change it."""
    return small.model()


@pytest.fixture(scope="module")
def vector(model):
    return families.vector(model)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request):
    yield
    if "model" in request.fixturenames:
        model = request.getfixturevalue("model")
        assert tiny.hook_count(model) == 0
        assert not tiny.is_steered(model)
        assert "medsteer_observers" not in model.model_options.get("transformer_options", {})


def run(small, model, **options):
    return small.run(model, small.cond(1), small.cond(2), **options)


def apart(one, other):
    """How far two latents are from each other, in units of the first one's own spread."""
    return float((one - other).abs().mean() / one.std())


# Sites


def test_every_family_of_the_table_is_tested_here():
    assert {small.family for small in families.ALL.values()} | {"PixArt (alpha, Sigma)"} == {f.name for f in FAMILIES}


def test_the_sites_are_the_text_cross_attentions_in_execution_order(small, model):
    network, ran = model.model.diffusion_model, []
    assert family_name(network) == small.family
    assert tuple(find_sites(network)) == small.sites
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in find_sites(network).items()
    ]
    run(small, model, steps=1, cfg=1.0)
    for handle in handles:
        handle.remove()
    assert tuple(ran) == small.sites


def test_a_site_gives_a_tensor_of_its_own_so_that_steering_may_write_into_it(small, model):
    """Neither an input, a weight, nor what another site or call gave shares its memory."""
    network = model.model.diffusion_model
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    given = []  # kept alive, so that no memory is used twice

    def look(_module, args, output):
        inputs = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        given.append(output)
        assert type(output) is torch.Tensor and not output.requires_grad
        assert output.untyped_storage().data_ptr() not in inputs | weights
        assert output.untyped_storage().nbytes() == output.numel() * output.element_size()

    sites = find(network).sites.values()
    handles = [site.register_forward_hook(look) for site in sites]
    try:
        run(small, model, steps=1)
    finally:
        for handle in handles:
            handle.remove()
    assert len(given) >= len(small.sites)
    assert len({output.untyped_storage().data_ptr() for output in given}) == len(given)
    assert all(owns_its_output(fresh) for fresh in find(network).fresh.values())


def test_steering_in_place_gives_what_steering_a_copy_gives(small, model, vector, monkeypatch):
    steered = tiny.steered(model, vector, operator="suppress", strength=2.0, keep_norm=False)
    in_place = run(small, steered)
    monkeypatch.setattr(hooks, "owns_its_output", lambda fresh: False)
    copied = run(small, steered)
    assert apart(copied, in_place) < 1e-5


def test_a_site_gives_rows_and_tokens_and_says_its_width(small, model):
    with families.spying(small, model, positive=small.cond(1), negative=small.cond(2)) as rows:
        run(small, model, steps=1, images=(0, 1))
    sites = find_sites(model.model.diffusion_model)
    assert len(rows) == 2 * 2 * len(sites)
    for row in rows:
        tokens = small.tokens[small.sites.index(row.site)]
        assert row.raw.shape == (tokens, output_width(sites[row.site]))


def test_the_text_alone_moves_the_sites_that_are_steered(small, model):
    """Otherwise they would not be text cross-attentions: the first one sees nothing of the text but through itself."""
    with families.spying(small, model, positive=small.cond(1), negative=small.cond(2)) as rows:
        run(small, model, steps=1)
    first = {row.name: row.raw for row in rows if row.site == small.sites[0]}
    assert apart(first["positive"], first["negative"]) > 1e-2


def test_the_start_image_of_wan_is_in_the_output_that_is_steered():
    """`o` projects the sum of what text and CLIP image give: with the text alone unchanged the site still moves."""
    small = families.ALL["wan_i2v"]
    model, found = small.model(), []
    for seed in (91, 92):
        ((text, options),) = small.cond(1)
        options["clip_vision_output"].penultimate_hidden_states = families.random(seed, 1, 5, 1280)
        prompt = [[text, options]]
        with families.spying(small, model, prompt=prompt) as rows:
            small.run(model, prompt, prompt, steps=1, cfg=1.0)
        found.append(next(row.raw for row in rows if row.site == small.sites[0]))
    assert apart(*found) > 1e-2


@pytest.mark.parametrize("kind", [WanModel_S2V, HumoWanModel, AnimateWanModel, LTXAVModel], ids=lambda c: c.__name__)
def test_the_cross_attentions_to_sound_and_faces_are_no_sites(kind):
    network = on_meta(kind, num_layers=2)
    pattern = "transformer_blocks.{}.attn2.to_out" if kind is LTXAVModel else "blocks.{}.cross_attn.o"
    assert tuple(find_sites(network)) == families.numbered(pattern)
    assert any("audio" in name or "face" in name for name, _ in network.named_modules())


@pytest.mark.parametrize(("layers", "vace"), [(40, 8), (30, 15)])
def test_vace_blocks_stand_where_comfyui_runs_them(layers, vace):
    network = on_meta(VaceWanModel, num_layers=layers, vace_layers=vace, vace_in_dim=96)
    expected = []
    for index in range(layers):
        expected.append(f"blocks.{index}.cross_attn.o")
        if index in network.vace_layers_mapping:
            expected.append(f"vace_blocks.{network.vace_layers_mapping[index]}.cross_attn.o")
    assert list(find_sites(network)) == expected


def test_block_ten_comes_after_block_nine():
    names = [f"blocks.block{index}.blocks.1.block.attn.to_out" for index in range(12)]
    config = {**families.COSMOS1, "num_blocks": 12}
    assert list(find_sites(families.made(supported.CosmosT2V, **config)().diffusion_model)) == names


# Extraction


@pytest.mark.parametrize("noise", ["paired", "same state"])
def test_an_extracted_vector_has_every_site_and_steers(small, model, noise):
    request = tiny.request(
        model, small.cond(1), small.cond(3), small.cond(2), steps=2, noise=noise, samples=2, rank=2,
        latent=small.empty(),
    )  # fmt: skip
    vector = extraction.extract(model, request)
    sites = find_sites(model.model.diffusion_model)
    assert vector.site_names == small.sites
    assert [vector.channels(name) for name in small.sites] == [output_width(site) for site in sites.values()]
    assert vector.steps == 2 and vector.provenance["latent_shape"] == list(small.latent)
    operator = {"operator": "affine" if noise == "same state" else "suppress", "strength": 2.0}
    plain = run(small, model)
    assert apart(plain, run(small, tiny.steered(model, vector, **operator))) > 1e-3


def means_by_site(rows):
    """site -> (S, C), the mean over images and tokens at each sigma, the highest first."""
    found = {}
    for row in rows:
        found.setdefault(row.site, {}).setdefault(row.sigma, []).append(row.raw)
    return {
        site: torch.stack([torch.stack(levels[sigma]).mean(dim=(0, 1)) for sigma in sorted(levels, reverse=True)])
        for site, levels in found.items()
    }


def test_the_extracted_directions_are_those_of_a_plain_computation(small, model):
    """The difference of the prompts' token means, recorded by a spy that knows the family's layout."""
    request = tiny.request(
        model, small.cond(1), small.cond(3), small.cond(2), steps=2, samples=2, seed=7, latent=small.empty()
    )
    vector = extraction.extract(model, request)
    means = []
    for prompt in (small.cond(1), small.cond(3)):
        with families.spying(small, model, prompt=prompt, negative=small.cond(2)) as rows:
            small.run(model, prompt, small.cond(2), images=(0, 1))
        means.append(means_by_site([row for row in rows if row.name == "prompt"]))
    for site in small.sites:
        difference = means[0][site] - means[1][site]
        length = difference.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(vector.sites[site].gaps, length, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(vector.sites[site].directions[:, 0], difference / length, rtol=0, atol=1e-3)


def test_an_image_latent_makes_a_vector_of_a_video_model():
    small = families.ALL["wan_t2v"]
    model = small.model()
    latent = {"samples": torch.zeros(1, 16, 4, 6)}
    request = tiny.request(model, small.cond(1), small.cond(3), small.cond(2), steps=2, samples=2, latent=latent)
    assert extraction.extract(model, request).provenance["latent_shape"] == [1, 16, 1, 4, 6]


@pytest.mark.parametrize("name", ["ltx2", "wan_t2v"])
def test_the_noise_of_a_video_and_its_sound_is_the_same_alone_and_in_a_batch(name):
    empty = families.ALL[name].empty()["samples"]
    batch, alone = sampling.noise_for(empty, 7, [0, 1, 2]), sampling.noise_for(empty, 7, [1])
    pairs = zip(batch.unbind(), alone.unbind(), strict=True) if batch.is_nested else [(batch, alone)]
    assert all(torch.equal(many[1:2], one) for many, one in pairs)


# Steering


def test_steering_changes_the_sample_and_leaves_the_model_as_it_was(small, model, vector):
    first, steered, third = run(small, model), run(small, tiny.steered(model, vector)), run(small, model)
    assert torch.equal(first, third)
    assert torch.isfinite(steered).all()
    assert apart(first, steered) > 1e-3


def test_strength_zero_is_bit_identical_to_no_node(small, model, vector):
    still = tiny.steered(model, vector, operator="suppress", strength=0.0)
    assert torch.equal(run(small, still), run(small, model))


def test_the_operator_acts_on_every_token_of_every_site(small, model, vector):
    with families.spying(small, model, positive=small.cond(1), negative=small.cond(2)) as rows:
        run(small, tiny.steered(model, vector, operator="ablate"), images=(0, 1), steps=1)
    assert rows
    for row in rows:
        direction = vector.at(row.site, row.sigma).directions[0]
        expected = row.raw - (row.raw @ direction)[:, None] * direction
        torch.testing.assert_close(row.out, expected, rtol=1e-5, atol=1e-5)
        assert row.changed


@pytest.mark.parametrize("rows", ["all", "positive", "negative"])
def test_only_the_named_rows_are_changed(small, model, vector, rows):
    steered = tiny.steered(model, vector, rows=rows)
    with families.spying(small, model, positive=small.cond(1), negative=small.cond(2)) as found:
        run(small, steered, images=(0, 1, 2))
    assert len({row.call for row in found}) == 2  # both texts in one call, so that rows could be mixed up
    assert tiny.changed_by_name(found) == {name: {rows in ("all", name)} for name in ("positive", "negative")}


def test_only_the_chosen_site_is_changed(small, model, vector):
    with families.spying(small, model, positive=small.cond(1), negative=small.cond(2)) as found:
        run(small, tiny.steered(model, vector, sites="1"), steps=1)
    assert {row.site for row in found if row.changed} == {small.sites[1]}


def test_two_clones_do_not_disturb_each_other(small, model, vector):
    def clones():
        return tiny.steered(model, vector), tiny.steered(model, families.vector(model, seed=1), sites="1")

    alone = [run(small, clone) for clone in clones()]
    one, other = clones()
    again = run(small, one), run(small, other), run(small, one)
    assert torch.equal(again[0], alone[0]) and torch.equal(again[1], alone[1]) and torch.equal(again[2], alone[0])
    assert apart(*alone) > 1e-3


def test_a_batch_equals_its_images_made_one_by_one(small, model, vector):
    """Up to float32's rounding, which differs with the size of a batch: a mixed-up row would differ by about 1."""
    steered = tiny.steered(model, vector, rows="positive")
    batch = run(small, steered, images=(0, 1, 2))
    singles = torch.cat([run(small, steered, images=(index,)) for index in range(3)])
    assert (batch - singles).abs().max() < 1e-4 * batch.abs().max()
    assert apart(batch[0], batch[1]) > 0.1


@pytest.mark.parametrize("error", ERRORS)
def test_no_hook_remains_after_an_error_or_an_interrupt_inside_the_model(small, model, vector, error):
    steered, calls = tiny.steered(model, vector), []

    def fail_in_the_second_call(*_):
        calls.append(tiny.hook_count(steered) - 1)  # this one is a hook too
        if len(calls) == 2:
            raise error()

    before = run(small, steered)
    last = model.model.diffusion_model.get_submodule(small.sites[-1].rpartition(".")[0])
    handle = last.register_forward_pre_hook(fail_in_the_second_call)
    try:
        with pytest.raises(error):
            run(small, steered)
    finally:
        handle.remove()
    assert calls == [len(small.sites)] * 2
    assert tiny.hook_count(model) == 0
    assert torch.equal(run(small, steered), before)


def test_a_vector_of_another_width_is_refused_by_the_sites_name(small, model, vector):
    wrong = tiny.vector(model, names=list(small.sites), width=40)
    width = vector.channels(small.sites[0])
    with pytest.raises(MedSteerError, match=f"'{small.sites[0]}' has 40 channels in the vector and {width} in the mod"):
        tiny.steered(model, wrong)


def test_a_site_whose_rows_are_not_the_calls_is_refused(small, model, vector):
    """A patch that folds or adds rows inside the model would have the wrong ones steered."""
    site = model.model.diffusion_model.get_submodule(small.sites[0])
    axis = 1 if small.tokens_first else 0
    handle = site.register_forward_hook(lambda _m, _a, out: torch.cat([out, out], dim=axis))
    try:
        with pytest.raises(MedSteerError, match=rf"'{small.sites[0]}'.* call of 2 rows; \(2, tokens, channels\)"):
            run(small, tiny.steered(model, vector))
    finally:
        handle.remove()


# Refusals


def on_meta(kind, **sizes):
    """A network of this class without memory for its weights."""
    return kind(operations=comfy.ops.disable_weight_init, device="meta", dtype=torch.float32, **sizes)


def sd3():
    return families.made(
        supported.SD3, patch_size=2, out_channels=16, depth=1, input_size=None, adm_in_channels=8,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 64}},
    )()  # fmt: skip


FLUX = {
    "out_channels": 16, "patch_size": 2, "vec_in_dim": 8, "context_in_dim": 16, "hidden_size": 48, "mlp_ratio": 2.0,
    "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 8, 8], "theta": 100, "qkv_bias": True,
    "in_channels": 16,
}  # fmt: skip
HUNYUAN_VIDEO = {
    **FLUX, "patch_size": [1, 2, 2], "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
    "vision_in_dim": None, "meanflow_sum": False, "guidance_embed": False,
}  # fmt: skip
SVD = {
    "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1,
    "num_classes": "sequential", "adm_in_channels": 8, "in_channels": 8, "extra_ff_mix_layer": True,
    "use_spatial_context": True, "merge_strategy": "learned_with_images", "video_kernel_size": [3, 1, 1],
}  # fmt: skip
NO_ATTENTION = {"transformer_depth": [0, 0], "transformer_depth_output": [0] * 4, "transformer_depth_middle": -1}

REFUSED = {
    "OpenAISignatureMMDITWrapper": lambda: sd3().diffusion_model,  # Stable Diffusion 3
    "Flux": lambda: families.made(supported.Flux, **FLUX, guidance_embed=True, txt_ids_dims=[])().diffusion_model,
    "HunyuanVideo": lambda: families.made(supported.HunyuanVideo, **HUNYUAN_VIDEO)().diffusion_model,
    "QwenImageTransformer2DModel": lambda: on_meta(QwenImageTransformer2DModel, num_layers=1),
    "NextDiT": lambda: on_meta(NextDiT, n_layers=1),  # Lumina 2, Z-Image
    "AudioDiffusionTransformer": lambda: on_meta(AudioDiffusionTransformer, depth=1),  # Stable Audio
    "ACEStepTransformer2DModel": lambda: on_meta(ACEStepTransformer2DModel, num_layers=1),
    "HunYuanDiTPlain": lambda: on_meta(HunYuanDiTPlain, depth=2),  # Hunyuan3D: attends to a picture
    "UNetModel": lambda: families.unet(supported.SD15, **NO_ATTENTION)().diffusion_model,
    "UNetModel of Stable Video Diffusion": lambda: families.unet(supported.SVD_img2vid, **SVD)().diffusion_model,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_text_cross_attention_is_refused_by_name_with_what_works(name):
    with pytest.raises(MedSteerError) as refusal:
        find(REFUSED[name]())
    message = str(refusal.value)
    assert message.startswith(f"{name.split()[0]} is not a model that MedSteer can steer")
    assert all(family.name in message for family in FAMILIES)
    assert "\n" not in message


def test_the_lookalikes_are_refused_for_what_they_are_and_not_for_their_names():
    """Hunyuan3D has HunyuanDiT's module names, and Stable Video Diffusion the UNet's."""
    patterns = {family.name: family.site for family in FAMILIES}
    names = [name for name, _ in REFUSED["HunYuanDiTPlain"]().named_modules()]
    assert "blocks.0.attn2.out_proj" in names and patterns["HunyuanDiT"] == r"blocks\.\d+\.attn2\.out_proj"
    names = [name for name, _ in REFUSED["UNetModel of Stable Video Diffusion"]().named_modules()]
    assert set(families.UNET_SITES) < set(names)


def test_a_refused_model_is_refused_by_steering_and_extraction_alike():
    model = comfy.model_patcher.CoreModelPatcher(sd3().eval(), torch.device("cpu"), torch.device("cpu"))
    pixart = tiny.model()
    with pytest.raises(MedSteerError, match="MMDITWrapper is not a model that MedSteer can steer"):
        steer.steer(model, tiny.vector(pixart), "ablate", {}, 0.0, 1.0, "all", "all")
    with pytest.raises(MedSteerError, match="MMDITWrapper is not a model that MedSteer can steer"):
        patch.observed(model, None)
