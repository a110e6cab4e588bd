"""Counterfactuals of real images: nothing at strength 0, the image's bytes outside the mask, an Euler run's algebra."""

from dataclasses import replace
from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_base
import families
import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.host.sampling.image_edit import MODELS_SIZE, OWN_SIZE, edit_images, image_hash
from medsteer_pack.medsteer_core.host.sampling.pair_request import ALL, CONCEPT, IN_MASK, OPEN, PREDICTION, PairRequest
from medsteer_pack.nodes.image import CounterfactualOfImage
from torch.nn import functional as F

STEPS = 8


class SmallVae:
    """An autoencoder of means and repeats: 8 x 8 pixels a latent pixel, four channels."""

    MIX = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.3, 0.3, 0.3]])

    def encode(self, pixels):
        small = F.avg_pool2d(pixels.movedim(-1, 1) - 0.5, 8)
        return torch.einsum("oc,bchw->bohw", self.MIX, small)

    def decode(self, latents):
        pixels = latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3) + 0.5
        return pixels.movedim(1, -1)


def flow_pixart():
    """The tiny PixArt as a flow model."""
    made = tiny.stock_model()
    base = comfy.model_base.PixArt(made.model.model_config, model_type=comfy.model_base.ModelType.FLOW).eval()
    tiny.fill(base.diffusion_model, 0)
    return tiny.allow_any_size(comfy.model_patcher.CoreModelPatcher(base, torch.device("cpu"), torch.device("cpu")))


@pytest.fixture(scope="module")
def models(pixart):
    return {"alpha": pixart, "sigma": tiny.model(pe_interpolation=2), "flow": flow_pixart()}


def request(model, **changes):
    fields = {"counterfactual": tiny.cond(3), "start_percent": 0.4, **changes}
    schedule = sampling.schedule(model, STEPS, "euler", "normal")
    return PairRequest(tiny.cond(1), tiny.cond(2), {}, 0, 3.0, schedule, **fields)


def photo(height=64, width=64, images=1, channels=3):
    """8-bit pixels, as Load Image gives them."""
    drawn = torch.rand(images, height, width, channels, generator=torch.Generator().manual_seed(5))
    return (drawn * 255).round() / 255


FORMS = {
    "plain": photo(), "batch": photo(images=3), "wide": photo(40, 96), "no whole latent pixels": photo(45, 67),
    "alpha": photo(channels=4), "grey": photo(channels=1),
    "16 bit": (photo() * 257 * 255).round() / 65535,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["alpha", "sigma", "flow"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["prompt", "steering"])
def test_strength_0_gives_the_very_bytes_back(models, kind, form, way):
    model, image = models[kind], FORMS[form]
    if way == "steering":
        model = tiny.steered(model, tiny.vector(model), operator="suppress", strength=2.0, start=0.4)
        pair = edit_images(model, SmallVae(), image, request(model, counterfactual=None, multiples=(0.0,)), OWN_SIZE)
    else:
        pair = edit_images(model, SmallVae(), image, request(model, counterfactual=tiny.cond(1)), OWN_SIZE)
    assert torch.equal(pair.counterfactual, image)
    assert torch.equal(pair.pair.counterfactual, pair.pair.factual)
    assert all(record["changes_nothing"] for record in pair.records)


@pytest.mark.parametrize("kind", ["alpha", "sigma", "flow"])
@pytest.mark.parametrize("lock", ["mask", PREDICTION, CONCEPT])
@pytest.mark.parametrize("tokens", [ALL, IN_MASK])
def test_outside_the_mask_are_the_images_bytes(models, kind, lock, tokens):
    model, image = models[kind], photo(128, 192, images=2)
    changes = {"computed_tokens": tokens, "threshold": 0.9, "dilation": 0}
    if lock == "mask":
        changes |= {"mask": torch.zeros(1, 128, 192)}
        changes["mask"][:, 17:35, 22:59] = 1  # no whole latent pixels
    else:
        changes["lock"] = lock
    if lock == CONCEPT:
        model = tiny.steered(model, tiny.vector(model), operator="suppress", strength=2.0, start=0.4)
        changes["counterfactual"] = None
    pair = edit_images(model, SmallVae(), image, request(model, **changes), OWN_SIZE)
    outside = pair.mask[..., None] == 0
    assert 0.1 < float(outside.float().mean()) < 1
    if lock == "mask":
        assert torch.equal(pair.mask, changes["mask"].expand(2, -1, -1))
    assert torch.equal(torch.where(outside, pair.counterfactual, 0), torch.where(outside, image, 0))
    assert not torch.equal(pair.counterfactual, image)
    latents = pair.pair.mask[:, None, ::8, ::8] == 0
    assert torch.equal(pair.pair.counterfactual[latents.expand_as(pair.pair.factual)],
                       pair.pair.factual[latents.expand_as(pair.pair.factual)])  # fmt: skip


@pytest.mark.parametrize("kind", ["alpha", "flow"])
def test_the_edit_is_what_two_euler_runs_from_one_state_differ_in(models, kind):
    """The image's state at the first level, run down twice by hand along the image's own states."""
    model, image = models[kind], photo()
    asked = request(model)
    pair = edit_images(model, SmallVae(), image, asked, OWN_SIZE)
    latents = SmallVae().encode(image)
    sigmas = asked.schedule.sigmas
    begin = next(
        i for i, s in enumerate(sigmas) if float(model.get_model_object("model_sampling").percent_to_sigma(0.4)) >= s
    )

    def denoised(state, sigma, positive, cfg):
        """The model's answer at a state, by a one-step sampler that only looks."""
        seen = []

        def look(model_wrap, x, levels, extra_args=None, callback=None, disable=None, **_):
            seen.append(model_wrap(state, sigma * torch.ones(1), **extra_args))
            return x

        sampler = comfy.samplers.KSAMPLER(look)
        comfy.sample.sample_custom(model, torch.zeros_like(latents), cfg, sampler, sigmas[begin:], positive,
                                   tiny.cond(2), latents, disable_pbar=True)  # fmt: skip
        return seen[0]

    state, states = latents, {}
    for low, high in zip(sigmas.flip(0), sigmas.flip(0)[1:], strict=False):
        if high > sigmas[begin]:
            break
        state = state + (high - low) / high * (state - denoised(state, high, tiny.cond(1), 1.0))
        states[float(high)] = state
    edit = torch.zeros_like(latents)
    for sigma, after in zip(sigmas[begin:-1], sigmas[begin + 1 :], strict=True):
        own = states[float(sigma)]
        apart = denoised(own + edit, sigma, tiny.cond(3), 3.0) - denoised(own, sigma, tiny.cond(1), 3.0)
        edit = after / sigma * edit + (1 - after / sigma) * apart
    torch.testing.assert_close(pair.pair.counterfactual, latents + edit, rtol=1e-3, atol=1e-4)
    assert float(edit.abs().mean()) > 1e-3


def test_the_model_sees_its_own_size_and_the_change_comes_back_to_the_images(endophantom):
    model, clip, vae = endophantom
    from medsteer_pack.medsteer_core.endophantom.phantom import Anatomy, render

    big = render(Anatomy.sample(1, 4), "polyps", (200, 300)).image.movedim(1, -1)
    image = (big * 255).round() / 255

    def said(text):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    asked = PairRequest(
        said("An endoscopic image of polyps"), said(""), {}, 0, 4.0, sampling.schedule(model, 10, "euler", "normal"),
        counterfactual=said("An endoscopic image of normal cecum"), lock=PREDICTION,
    )  # fmt: skip
    pair = edit_images(model, vae, image, asked, MODELS_SIZE)
    assert pair.counterfactual.shape == image.shape and pair.pair.counterfactual.shape[-2:] == (16, 16)
    outside = pair.mask[..., None] == 0
    assert torch.equal(torch.where(outside, pair.counterfactual, 0), torch.where(outside, image, 0))
    assert float((pair.counterfactual - image).detach().abs().max()) > 0.1
    assert "seen by the model at 128 x 128" in pair.summary and "made for" not in pair.summary
    made = pair.records[0]["made"]
    assert made["image"] == image_hash(image[0].movedim(-1, 0)) and made["factual"] == "real image"


def test_several_strengths_share_the_images_own_run(models):
    model = models["alpha"]
    steered = tiny.steered(model, tiny.vector(model), operator="suppress", strength=2.0, start=0.4)
    image = photo(images=2)
    many = edit_images(steered, SmallVae(), image, request(model, counterfactual=None, multiples=(0.5, 1.0)), OWN_SIZE)
    alone = edit_images(steered, SmallVae(), image, request(model, counterfactual=None), OWN_SIZE)
    assert torch.equal(many.counterfactual[2:], alone.counterfactual)
    assert len(many.records) == 4 and many.records[0]["group_id"] != many.records[1]["group_id"]
    assert many.records[0]["group_id"] == many.records[2]["group_id"]


def test_what_cannot_be_is_refused_before_a_step(models):
    model, image = models["alpha"], photo()

    class OtherVae(SmallVae):
        def encode(self, pixels):
            return torch.zeros(len(pixels), 16, 8, 8)

    for given, error in (
        (dict(vae=OtherVae()), "Connect the VAE that belongs to the model"),
        (dict(image=photo(4, 64)), "at least 8 x 8"),
        (dict(image=photo() * 255), "outside 0..1"),
        (dict(size="huge"), "one of the model's, the image's"),
        (dict(changes=dict(mask=torch.ones(1, 8, 8))), "the image's size, was expected"),
        (dict(changes=dict(counterfactual=None)), "not steered, so there is no counterfactual"),
    ):
        with pytest.raises(MedSteerError, match=error):
            edit_images(model, given.get("vae", SmallVae()), given.get("image", image),
                        request(model, **given.get("changes", {})), given.get("size", OWN_SIZE))  # fmt: skip


def test_video_models_are_refused():
    small = families.ALL["wan_t2v"]
    model = small.model()

    class VideoVae:
        def encode(self, pixels):
            return torch.zeros(1, 16, 1, 4, 6)

    asked = replace(request(model), positive=small.cond(1), negative=small.cond(2), counterfactual=small.cond(3))
    with pytest.raises(MedSteerError, match="Video models can't edit images"):
        edit_images(model, VideoVae(), photo(), asked, OWN_SIZE)


def test_the_node_gives_what_the_core_gives_and_says_what_it_did(pixart, monkeypatch):
    monkeypatch.setattr(CounterfactualOfImage, "hidden", SimpleNamespace(prompt=None, unique_id=None), raising=False)
    out = CounterfactualOfImage.execute(
        photo(), pixart, SmallVae(), tiny.cond(1), tiny.cond(2), STEPS, 3.0, "normal", "1", OPEN, 0.2, 1, 0, 0.4,
        OWN_SIZE, ALL, counterfactual=tiny.cond(3),
    )  # fmt: skip
    assert torch.equal(out.args[0], photo())
    assert torch.equal(out.args[1], edit_images(pixart, SmallVae(), photo(), request(pixart), OWN_SIZE).counterfactual)
    assert "of a real image" in out.args[5] and "cost: " in out.args[5]


def test_a_record_names_the_image_and_its_group_by_hashes_and_nothing_of_noise(pixart):
    def records(image, group=""):
        return edit_images(pixart, SmallVae(), image, request(pixart, multiples=(0.5, 1.0)), OWN_SIZE, group).records

    images = photo(images=2)
    plain, grouped, lines = records(images), records(images, "patient 7"), records(images, "one\ntwo")
    assert len({record["group_id"] for record in plain}) == 2 and len({r["group_id"] for r in grouped}) == 1
    assert len({record["group_id"] for record in lines}) == 2
    assert "patient" not in str(grouped)
    for record in plain:
        assert not {"seed", "batch_index", "noise", "starting_latent"} & set(record["made"])
        assert record["made"]["factual"] == "real image" and len(record["made"]["image"]) == 16
    alone = records(images[1:])  # the same whatever the batch holds
    assert alone[0]["made"]["image"] == plain[1]["made"]["image"]
    with pytest.raises(MedSteerError, match="3 lines for 2 images"):
        records(images, "a\nb\nc")
