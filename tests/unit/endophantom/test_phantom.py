"""The endoscopy phantoms: deterministic scenes, factorised findings, ground-truth masks."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from medsteer_core.endophantom.anatomy import Anatomy
from medsteer_core.endophantom.findings import HALO
from medsteer_core.endophantom.phantom import CLASSES, FINDINGS, render

EXPECTED_MASKS = {
    "dyed lifted polyps": {"polyp", "dye"},
    "dyed resection margins": {"resection", "dye"},
    "esophagitis": {"streaks"},
    "normal cecum": set(),
    "normal pylorus": set(),
    "normal z-line": set(),
    "polyps": {"polyp"},
    "ulcerative colitis": {"erosions"},
}


def _grown(mask: torch.Tensor, halo: float = HALO) -> torch.Tensor:
    """A boolean mask (n, H, W) grown by ``halo`` half-image units and two pixels."""
    reach = int(halo * mask.shape[-1] / 2) + 2
    return F.max_pool2d(mask[:, None].float(), 2 * reach + 1, 1, reach)[:, 0] > 0


def _mask(rendered, *names: str) -> torch.Tensor:
    return sum(rendered.masks[:, FINDINGS.index(name)] for name in names) > 0


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_its_own_masks_and_no_others(name):
    rendered = render(Anatomy.sample(6, 3), name, 64)
    assert rendered.image.shape == (6, 3, 64, 64) and rendered.masks.shape == (6, len(FINDINGS), 64, 64)
    assert rendered.image.dtype == rendered.masks.dtype == torch.float32
    assert 0.0 <= rendered.image.min() and rendered.image.max() <= 1.0
    assert set(rendered.masks.unique().tolist()) <= {0.0, 1.0}
    present = rendered.masks.amax((2, 3)) > 0
    for channel, finding in enumerate(FINDINGS):
        assert bool(present[:, channel].all() if finding in EXPECTED_MASKS[name] else not present[:, channel].any())


@pytest.mark.parametrize(
    ("finding", "normal", "masks", "halo"),
    [
        ("polyps", "normal cecum", ("polyp",), HALO),
        ("dyed lifted polyps", "normal cecum", ("polyp", "dye"), HALO),
        ("dyed resection margins", "normal cecum", ("resection", "dye"), HALO),
        ("esophagitis", "normal z-line", ("streaks",), HALO),
    ],
)
def test_a_focal_finding_changes_nothing_outside_its_mask(finding, normal, masks, halo):
    anatomy = Anatomy.sample(64, 100)
    with_finding, without = render(anatomy, finding, 64), render(anatomy, normal, 64)
    near = _grown(_mask(with_finding, *masks), halo)
    changed = (with_finding.image != without.image).any(1)
    assert not (changed & ~near).any()
    assert (~near).float().mean() > 0.1
    on_finding = (with_finding.image - without.image).abs().mean(1)[_mask(with_finding, *masks)]
    assert on_finding.mean() > 0.1


def test_the_dyed_polyp_is_the_same_polyp():
    anatomy = Anatomy.sample(12, 5)
    plain, dyed = render(anatomy, "polyps", 96), render(anatomy, "dyed lifted polyps", 96)
    assert torch.equal(_mask(plain, "polyp"), _mask(dyed, "polyp"))
    assert not (_mask(dyed, "polyp") & _mask(dyed, "dye")).any()


def test_dye_is_blue_and_mucosa_is_not():
    anatomy = Anatomy.sample(16, 2)
    dyed, plain = render(anatomy, "dyed lifted polyps", 64), render(anatomy, "normal cecum", 64)
    dye = _mask(dyed, "dye")
    red, _, blue = (dyed.image[:, channel][dye].mean() for channel in range(3))
    assert blue > red + 0.1
    red, _, blue = (plain.image[:, channel][dye].mean() for channel in range(3))
    assert red > blue + 0.1


def test_the_site_is_in_view_and_beside_the_lumen():
    anatomy = Anatomy.sample(500, 1)
    assert anatomy.site_position().norm(dim=1).max() < 0.85
    assert (anatomy.site[:, 2].min() >= 0.18) and (anatomy.site[:, 2].max() <= 0.38)
    area = render(anatomy[:64], "polyps", 64).masks[:, FINDINGS.index("polyp")].mean((1, 2))
    assert area.min() > 0.015


def test_a_scene_does_not_depend_on_how_many_are_sampled():
    few, many = Anatomy.sample(3, 11), Anatomy.sample(50, 11)
    for field in fields(Anatomy):
        assert torch.equal(getattr(few, field.name), getattr(many, field.name)[:3]), field.name
    assert not torch.equal(few.seed, Anatomy.sample(3, 12).seed)
    assert len(Anatomy.sample(30000, 0).seed.unique()) == 30000


def test_factors_are_drawn_independently_of_each_other():
    names = (
        "lumen_centre_x",
        "lumen_centre_y",
        "lumen_radius",
        "fold_count",
        "hue",
        "saturation",
        "vessels",
        "gain",
        "site_size",
        "finding_tint",
        "roll",
        "light_x",
    )
    factors = Anatomy.sample(4000, 0).factors()
    assert all(value.shape == (4000,) for value in factors.values())
    correlation = torch.corrcoef(torch.stack([factors[name] for name in names])) - torch.eye(len(names))
    assert correlation.abs().max() < 0.07


def test_companions_appear_in_about_a_third_of_the_scenes():
    assert abs(float((Anatomy.sample(4000, 0).companion[:, 0] > 0.65).float().mean()) - 0.35) < 0.04


def test_render_is_deterministic_and_does_not_depend_on_the_batch():
    anatomy = Anatomy.sample(6, 4)
    names = ["polyps", "normal cecum", "esophagitis", "normal pylorus", "polyps", "ulcerative colitis"]
    together = render(anatomy, names, 64)
    assert torch.equal(together.image, render(anatomy, names, 64).image)
    for item, name in enumerate(names):
        alone = render(anatomy[item], name, 64)
        assert torch.allclose(alone.image[0], together.image[item], atol=1e-5)
        assert (alone.masks[0] != together.masks[item]).float().mean() < 1e-3


def test_every_size_shows_the_same_scene():
    anatomy = Anatomy.sample(4, 9)
    for name in CLASSES:
        small, large = render(anatomy, name, 64, None).image, render(anatomy, name, 256, None).image
        assert (F.avg_pool2d(large, 4) - small).abs().mean() < 0.02, name


def test_a_wide_image_shows_the_square_one_in_its_middle():
    anatomy = Anatomy.sample(2, 9)
    wide, square = render(anatomy, "polyps", (64, 96), None).image, render(anatomy, "polyps", 64, None).image
    assert wide.shape == (2, 3, 64, 96)
    assert torch.allclose(wide[..., 16:80], square, atol=1e-5)


def test_sensor_noise_is_small_seeded_and_optional():
    anatomy = Anatomy.sample(4, 6)
    clean = render(anatomy, "normal cecum", 64, None).image
    first, second = (render(anatomy, "normal cecum", 64, seed).image for seed in (0, 1))
    inside = (clean > 0.1) & (clean < 0.9)
    assert 0.008 < float((first - clean)[inside].std()) < 0.012
    assert not torch.equal(first, second)
    assert not torch.equal((first - clean)[0], (first - clean)[1])


def test_pylorus_is_paler_and_its_opening_smaller_than_the_cecum_at_64_pixels():
    anatomy = Anatomy.sample(16, 8)
    pylorus, cecum = (render(anatomy, f"normal {name}", 64).image for name in ("pylorus", "cecum"))
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    view = (x * x + y * y).sqrt() < 0.9
    assert (pylorus.mean(1)[:, view] < 0.2).float().mean() < 0.5 * (cecum.mean(1)[:, view] < 0.2).float().mean()
    assert (pylorus[:, 1][:, view].mean(1) > cecum[:, 1][:, view].mean(1)).all()


@pytest.mark.parametrize(
    ("finding", "size", "message"),
    [
        ("polyp", 64, "unknown class 'polyp'"),
        ("polyps", 8, "16 pixels or more"),
        ("polyps", (64, 15), "16 pixels or more"),
        (["polyps"], 64, "1 class names for 2 scenes"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_refused(finding, size, message):
    with pytest.raises(ValueError, match=message):
        render(Anatomy.sample(2, 0), finding, size)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="empty batch"):
        render(Anatomy.sample(2, 0)[:0], "polyps")
    with pytest.raises(ValueError, match="expected 1 or more"):
        Anatomy.sample(0, 0)
