"""EndoPhantom through ComfyUI's own nodes. Mechanics only: how good its images are is another test's matter."""

import comfy.model_management
import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.endophantom.autoencoder import TinyAutoencoder
from medsteer_pack.medsteer_core.endophantom.bundle import Bundle
from medsteer_pack.medsteer_core.endophantom.phantom import Anatomy, render
from medsteer_pack.medsteer_core.endophantom.pixart_twin import PixArtConfig, PixArtTwin
from medsteer_pack.medsteer_core.endophantom.text import IGNORED
from medsteer_pack.medsteer_core.host.loading import embedded
from medsteer_pack.medsteer_core.host.patching.sites import find_sites
from medsteer_pack.medsteer_core.host.sampling import extraction
from medsteer_pack.medsteer_core.host.sampling import runs as sampling

import nodes

POLYPS, NORMAL = "An endoscopic image of polyps", "An endoscopic image of normal cecum"


@pytest.fixture(scope="module")
def model(endophantom):
    return endophantom[0]


@pytest.fixture(scope="module")
def encode(endophantom):
    """What core's CLIP Text Encode gives for a text."""
    return lambda text: nodes.CLIPTextEncode().encode(endophantom[1], text)[0]


def context(conditioning):
    ((tensor, _options),) = conditioning
    return tensor


def sample(model, positive, negative, steps=4, size=64, sampler="euler", batch=1, **fields):
    """Latents by core's KSampler from core's Empty Latent Image, as a workflow has them."""
    latent = {**nodes.EmptyLatentImage().generate(size, size, batch)[0], **fields}
    return nodes.KSampler().sample(model, 7, steps, 4.0, sampler, "normal", positive, negative, latent)[0]


# Text


def by_size(tokens):
    """(tokens, width) in an order that does not depend on the words' order."""
    return tokens[tokens[:, 0].argsort()]


def test_word_order_is_free(model, encode):
    one, other = encode("polyps endoscopic image"), encode("image endoscopic polyps")
    assert not torch.allclose(context(one), context(other), atol=1e-3)
    torch.testing.assert_close(by_size(context(one)[0]), by_size(context(other)[0]), rtol=0, atol=1e-5)
    images = [sample(model, cond, encode(""))["samples"] for cond in (one, other)]
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "text", ["An endoscopic image of some strange polyps!!", "endoscopic IMAGE, polyps", "endoscopic photo polyp"]
)
def test_unknown_words_punctuation_and_synonyms_are_harmless(encode, text):
    assert torch.equal(context(encode(text)), context(encode("endoscopic image polyps")))


def test_the_empty_prompt_and_one_of_unknown_words_are_one_token(encode):
    assert context(encode("")).shape[:2] == (1, 1)
    assert torch.equal(context(encode("xyzzy")), context(encode("")))


def test_different_findings_differ(encode):
    assert (context(encode("polyps")) - context(encode("cecum"))).abs().max() > 0.1


def test_a_words_weight_scales_its_token_and_weight_one_changes_nothing(encode):
    plain, strong = context(encode("image polyps")), context(encode("image (polyps:1.3)"))
    assert torch.equal(context(encode("image (polyps:1.0)")), plain)
    torch.testing.assert_close(strong[:, :2], plain[:, :2], rtol=0, atol=1e-5)
    torch.testing.assert_close(strong[:, 2] - strong[:, 0], 1.3 * (plain[:, 2] - plain[:, 0]), rtol=1e-4, atol=1e-5)


# The model


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (32, 32), (36, 40)])
def test_the_training_twin_equals_comfyuis_pixart(model, height, width):
    bundle = Bundle()
    twin = PixArtTwin(PixArtConfig(**{key: bundle.recipe["generator"][key] for key in embedded.CONFIG_KEYS}))
    twin.load_state_dict(bundle.part("generator"))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, twin.config.in_channels, height, width, generator=generator)
    text = torch.randn(2, 5, twin.config.caption_channels, generator=generator)
    times = torch.tensor([10.0, 700.0])
    expected = model.model.diffusion_model(latents, times, text)
    assert (twin(latents, times, text) - expected).abs().max() < 1e-4
    assert expected.std() > 0.01


def test_a_model_made_anew_is_the_same(model, encode):
    make, arguments = model.cached_patcher_init
    again = make(*arguments, disable_dynamic=True)
    first, second = (sample(m, encode(POLYPS), encode(""), steps=2)["samples"] for m in (model, again))
    assert torch.equal(first, second)


def test_empty_latent_ksampler_and_vae_decode_make_an_image(model, endophantom, encode):
    latents = sample(model, encode(POLYPS), encode(""), steps=3, size=128)
    assert latents["samples"].shape == (1, 16, 16, 16)  # core's node made 4 channels
    (image,) = nodes.VAEDecode().decode(endophantom[2], latents)
    assert image.shape == (1, 128, 128, 3)
    assert 0.0 <= image.min() and image.max() <= 1.0 and image.std() > 0.01


def test_interrupting_leaves_the_model_usable(model, encode):
    comfy.model_management.interrupt_current_processing()
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(model, encode(POLYPS), encode(""))
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert tiny.hook_count(model) == 0
    assert torch.isfinite(sample(model, encode(POLYPS), encode(""), steps=1)["samples"]).all()


# The autoencoder


def test_an_encoded_and_decoded_phantom_is_still_itself(endophantom):
    vae = endophantom[2]
    image = render(Anatomy.sample(4, seed=123), "polyps").image.movedim(1, -1)
    latents = vae.encode(image)
    assert latents.shape == (4, 16, 16, 16)
    error = (vae.decode(latents) - image).square().mean()
    assert -10 * error.log10() > 30.0


def test_cores_load_vae_lists_the_autoencoder_and_gives_the_same_one(endophantom):
    embedded.register_vae()  # what the pack does when ComfyUI loads it
    assert "endophantom_vae.safetensors" in nodes.VAELoader.vae_list(nodes.VAELoader)
    (loaded,) = nodes.VAELoader().load_vae("endophantom_vae.safetensors")
    image = render(Anatomy.sample(2, seed=9), "polyps").image.movedim(1, -1)
    latents = endophantom[2].encode(image)
    assert torch.equal(loaded.encode(image), latents)
    assert torch.equal(loaded.decode(latents), endophantom[2].decode(latents))


@torch.no_grad()
def test_the_training_twin_equals_comfyuis_taesd(endophantom):
    state = Bundle().autoencoder()
    twin = TinyAutoencoder(state["taesd_decoder.1.weight"].shape[1])
    twin.load_state_dict(state)
    image = render(Anatomy.sample(2, seed=11), "esophagitis").image
    latents = twin.encode(image * 2 - 1)
    torch.testing.assert_close(endophantom[2].encode(image.movedim(1, -1)), latents, rtol=0, atol=1e-5)
    decoded = (twin.decode(latents).movedim(1, -1) + 1) / 2
    torch.testing.assert_close(endophantom[2].decode(latents), decoded.clamp(0, 1), rtol=0, atol=1e-5)


def test_the_previews_colours_follow_the_image(model, endophantom):
    """ComfyUI's latent previews are a linear map of the latents to the image's mean colours."""
    image = render(Anatomy.sample(2, seed=5), "polyps", noise_seed=None).image
    latents = endophantom[2].encode(image.movedim(1, -1))
    form = model.model.latent_format
    colours = torch.einsum("nchw,cr->nrhw", latents, torch.tensor(form.latent_rgb_factors))
    colours = colours + torch.tensor(form.latent_rgb_factors_bias)[:, None, None]
    means = torch.nn.functional.avg_pool2d(image * 2 - 1, 8)
    assert (colours - means).square().mean().sqrt() < 0.1


# Steering it


@pytest.fixture(scope="module")
def vector(model, encode):
    schedule = sampling.schedule(model, 4, "euler", "normal")
    latent = nodes.EmptyLatentImage().generate(64, 64, 1)[0]
    return extraction.extract(
        model,
        extraction.Request(encode(POLYPS), encode(NORMAL), encode(""), latent, 2, 1000, 4.0, "paired", schedule),
    )


def test_its_vector_has_the_models_channels_and_blocks(model, vector):
    recipe = Bundle().recipe["generator"]
    assert list(vector.site_names) == [f"blocks.{index}.cross_attn.proj" for index in range(recipe["depth"])]
    assert list(vector.site_names) == list(find_sites(model.model.diffusion_model))
    assert {vector.channels(name) for name in vector.site_names} == {recipe["hidden_size"]}
    assert vector.provenance["latent_shape"] == [1, 16, 8, 8]


def test_strength_zero_is_bit_identical_and_strength_two_is_not(model, vector, encode):
    plain, zero, two = (
        sample(steered, encode(POLYPS), encode(""))["samples"]
        for steered in (
            model,
            tiny.steered(model, vector, operator="suppress", strength=0.0),
            tiny.steered(model, vector, operator="suppress", strength=2.0),
        )
    )
    assert torch.equal(zero, plain)
    assert (two - plain).abs().mean() > 1e-3
    assert torch.equal(sample(model, encode(POLYPS), encode(""))["samples"], plain)


def test_a_steered_batch_of_three_equals_three_singles(model, vector, encode):
    """In float64. In float32 a batch rounds otherwise than singles; few steps raise that to 1e-5, unsteered too."""
    make, arguments = model.cached_patcher_init
    double = make(*arguments, disable_dynamic=True)
    double.model.diffusion_model.double().dtype = torch.float64
    steered = tiny.steered(double, vector, operator="suppress", strength=2.0)
    texts = encode(POLYPS), encode("")
    batch = sample(steered, *texts, batch=3, batch_index=[0, 1, 2])["samples"]
    singles = torch.cat([sample(steered, *texts, batch_index=[index])["samples"] for index in range(3)])
    assert (batch - singles).abs().max() < 1e-6 * batch.abs().max()
    assert (batch - sample(double, *texts, batch=3, batch_index=[0, 1, 2])["samples"]).abs().mean() > 1e-3


@pytest.mark.parametrize(
    ("prompt", "known", "unknown"),
    [
        ("Barrett oesophagus with bleeding", "", ("barrett", "oesophagus", "bleeding")),
        ("An endoscopic image of polips", "endoscopic image", ("polips",)),
        ("(polyps:1.3) without dye", "(polyps:1.3) dye", ("without",)),
        ("dyed-lifted-foo polyps", "dyed lifted polyps", ("foo",)),
        ("An endoscopic image of the polyps", "endoscopic image polyps", ()),
    ],
)
def test_words_that_it_does_not_know_stand_beside_the_prompts_context(encode, prompt, known, unknown):
    ((found, facts),), ((expected, plain),) = encode(prompt), encode(known)
    assert torch.equal(found, expected) and torch.equal(facts["pooled_output"], plain["pooled_output"])
    assert facts.get(IGNORED, ()) == unknown and IGNORED not in plain


def test_the_node_that_encodes_says_it(encode, monkeypatch, caplog):
    said = []
    monkeypatch.setattr(embedded, "say_on_running_node", said.append)
    encode("polips")
    assert said == ["Ignored: polips (polyps?)"]
    assert "EndoPhantom does not know 'polips' (did you mean 'polyps'?) and ignores that. It knows: endo" in caplog.text
