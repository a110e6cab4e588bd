"""PixArt at any latent size, and what tells one model from another."""

import comfy.weight_adapter
import pytest
import tiny
import torch
from comfy.ldm.pixart.pixartms import PixArtMS
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.loading.pixart import AnySizePixArtMS, allow_any_size
from medsteer_pack.medsteer_core.host.patching.fingerprint import fingerprint
from medsteer_pack.medsteer_core.host.patching.sites import family_name, find_sites
from torch import nn

VARIANTS = {
    "sigma": {},
    "alpha": {"micro_condition": True, "pred_sigma": True},
    "interpolated": {"pe_interpolation": 2.0},
    "precise": {"pe_precision": 2},
}


def network(**sizes):
    return tiny.model(**sizes).model.diffusion_model


def inputs(height, width, batch=2, tokens=3):
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(batch, tiny.CHANNELS, height, width, generator=generator)
    return latent, torch.tensor([900.0, 30.0][:batch]), torch.randn(batch, tokens, tiny.CAPTION, generator=generator)


# Any size


@torch.no_grad()
def test_stock_pixart_divides_by_zero_at_small_latents():
    stock = tiny.stock_model().model.diffusion_model
    with pytest.raises(ZeroDivisionError):
        stock(*inputs(16, 16))


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (32, 32), (2, 62)])
def test_small_latents_run(height, width):
    latent, *others = inputs(height, width)
    result = network()(latent, *others)
    assert result.shape == latent.shape
    assert torch.isfinite(result).all() and result.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("variant", ["sigma", "alpha", "interpolated"])
@pytest.mark.parametrize(("height", "width"), [(34, 34), (64, 64), (40, 60)])
def test_the_network_for_small_latents_equals_stock_where_stock_runs(variant, height, width):
    small = network(depth=2, **VARIANTS[variant])
    latent, timestep, text = inputs(height, width)
    micro = {}
    if variant == "alpha":
        micro = {"c_size": torch.tensor([[8.0 * height, 8.0 * width]] * 2), "c_ar": torch.tensor([[1.5]] * 2)}
    stock = PixArtMS.forward_orig(small, latent, timestep, text[:, None], **micro)
    assert stock.shape[1] == small.out_channels
    torch.testing.assert_close(small.forward_small(latent, timestep, text[:, None], **micro), stock)


@torch.no_grad()
def test_latents_that_stock_can_run_go_through_stock(monkeypatch):
    stock, small = tiny.stock_model().model.diffusion_model, network()
    monkeypatch.setattr(AnySizePixArtMS, "forward_small", None)
    assert torch.equal(small(*inputs(34, 36)), stock(*inputs(34, 36)))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_small_latents(variant):
    latent, *others = inputs(16, 24)
    result = network(**VARIANTS[variant])(latent, *others)
    assert result.shape == latent.shape and torch.isfinite(result).all()


def test_allowing_any_size_changes_no_weight_and_no_key():
    stock = tiny.stock_model()
    before = {key: value.clone() for key, value in stock.model.state_dict().items()}
    after = allow_any_size(stock).model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert type(stock.model.diffusion_model) is AnySizePixArtMS


def test_a_clone_runs_small_latents_too(pixart):
    assert torch.isfinite(tiny.run(pixart.clone(), tiny.cond(1), tiny.cond(2), steps=2)).all()


# Sites


def test_the_sites_are_the_cross_attentions_projections_in_order():
    sites = find_sites(network(depth=12))
    assert list(sites) == [f"blocks.{index}.cross_attn.proj" for index in range(12)]
    assert {site.out_features for site in sites.values()} == {tiny.WIDTH}
    assert family_name(network()) == "PixArt (alpha, Sigma)"


def test_a_model_without_known_sites_is_refused_by_name():
    with pytest.raises(MedSteerError, match="Sequential is not a model that MedSteer can steer.*PixArt"):
        find_sites(nn.Sequential(nn.Linear(2, 2)))


# Identity


def test_the_fingerprint_stays_through_cloning_and_sampling():
    model = tiny.model()
    before = fingerprint(model)
    assert before["patches"] == "" and before["architecture"] == "PixArtMS"
    tiny.run(model, tiny.cond(1), tiny.cond(2), steps=1)
    assert fingerprint(model) == fingerprint(model.clone()) == fingerprint(tiny.model()) == before


def test_other_weights_have_another_fingerprint():
    assert fingerprint(tiny.model(seed=1))["weights"] != fingerprint(tiny.model())["weights"]


KEY = "diffusion_model.blocks.0.attn.proj.weight"


def difference(scale):
    return ("diff", (torch.full((tiny.WIDTH, tiny.WIDTH), scale),))


def lora(scale):
    down, up = torch.full((2, tiny.WIDTH), scale), torch.ones(tiny.WIDTH, 2)
    return comfy.weight_adapter.LoRAAdapter(set(), (up, down, 2.0, None, None, None))


@pytest.mark.parametrize("patch", [difference, lora])
def test_a_lora_shows_in_the_fingerprint_and_the_weights_below_it_stay(patch):
    plain = tiny.model()
    patched, stronger, other = plain.clone(), plain.clone(), plain.clone()
    assert patched.add_patches({KEY: patch(0.01)}) == [KEY]
    stronger.add_patches({KEY: patch(0.01)}, 0.5)
    other.add_patches({KEY: patch(0.02)})
    prints = [fingerprint(model) for model in (plain, patched, stronger, other)]
    assert len({each["weights"] for each in prints}) == 1
    assert len({each["patches"] for each in prints}) == 4 and prints[0]["patches"] == ""
    tiny.run(patched, tiny.cond(1), tiny.cond(2), steps=1)  # now the patch is in the weights
    assert fingerprint(patched) == prints[1]
