"""The control that pushes elsewhere: how it is drawn, and what of the vector it keeps."""

import pytest
import torch
from torch.nn import functional as F

from medsteer_core.errors import MedSteerError
from medsteer_core.pictures.summary import describe
from medsteer_core.steering.operators import make_operator
from medsteer_core.vectors.algebra import subtract
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections
from medsteer_core.vectors.random_direction import describe_drawn, drawn, normal_weights, random_direction

STEPS, WIDTH, SITES = 3, 16, ("b.0", "b.1")
FACTS = {"estimator": "mean_difference", "prompts": {"present": {"text": "polyps"}, "absent": {"text": "normal"}}}


def vector(seed=0, rank=1, readers=False, width=WIDTH, **facts):
    """A mean difference of class means drawn by ``seed``; of a higher rank without class means."""
    generator = torch.Generator().manual_seed(seed)

    def site():
        rows = torch.linalg.qr(torch.randn(STEPS, width, rank, generator=generator))[0].mT.contiguous()
        gaps, centres = (
            torch.rand(STEPS, rank, generator=generator) + 0.5,
            torch.randn(STEPS, width, generator=generator),
        )
        middle = torch.einsum("sc,src->sr", centres, rows)
        projections = torch.stack([middle + gaps / 2, middle - gaps / 2], dim=1)
        more = {}
        if readers:
            more = {
                "readers": torch.randn(STEPS, rank, width, generator=generator),
                "offsets": torch.zeros(STEPS, rank),
            }
        return SiteDirections(rows, gaps, centres, projections, torch.ones(STEPS, 2), **more)

    known = FACTS if rank == 1 and not readers else {}
    return PathologyVector({name: site() for name in SITES}, torch.tensor([9.0, 3.0, 1.0]), {**known, **facts})


def activations(seed=5):
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_a_draw_is_a_gaussian_sum_of_the_deviations():
    deviations = torch.randn(STEPS, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([1.0, 0.0, -2.0, 0.5])
    wanted = deviations[:, 0] - 2 * deviations[:, 2] + 0.5 * deviations[:, 3]
    torch.testing.assert_close(drawn(deviations, weights), wanted / wanted.norm(dim=-1, keepdim=True))
    again = torch.randn(4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(normal_weights(4, 7), again)


def test_a_draw_is_repeatable_and_its_own():
    first, again, other = (random_direction(vector(), seed) for seed in (3, 3, 4))
    assert first.content_hash() == again.content_hash() != other.content_hash()
    assert torch.equal(first.sigmas, vector().sigmas) and first.site_names == SITES


def test_isotropic_directions_are_one_draw_for_all_steps_and_favour_no_channel():
    own = vector(width=8)
    rows = torch.stack([random_direction(own, seed).sites["b.0"].directions[:, 0] for seed in range(400)])
    assert torch.equal(rows[:, 0], rows[:, 2])
    shares = rows[:, 0].square().mean(0)
    torch.testing.assert_close(shares, torch.full((8,), 1 / 8), atol=0.03, rtol=0)
    assert rows[:, 0].mean(0).abs().max() < 0.08


@pytest.mark.parametrize("operator", ["add", "affine"])
def test_add_and_affine_push_each_token_as_far_as_with_the_vector(operator):
    own = vector(rank=3, readers=operator == "affine")
    control, a, rule = random_direction(own, 1), activations(), make_operator(operator, strength=1.5)
    pushes = [rule(a, one.at("b.1", 3.0)) - a for one in (own, control)]
    torch.testing.assert_close(pushes[0].norm(dim=-1), pushes[1].norm(dim=-1))
    assert F.cosine_similarity(*pushes, dim=-1).abs().max() < 0.95  # and elsewhere


def test_suppress_takes_away_what_lies_along_the_drawn_direction():
    control, a = random_direction(vector(), 1), activations()
    step = control.at("b.0", 9.0)
    push = make_operator("suppress", strength=1.0, keep_norm=False)(a, step) - a
    wanted = -(a @ step.directions[0]).clamp_min(0)[..., None] * step.directions[0]
    torch.testing.assert_close(push, wanted)


def test_class_means_along_drawn_directions_are_known_for_a_mean_difference():
    own = vector()
    control = random_direction(own, 2)
    site, drawn_site = own.sites["b.0"], control.sites["b.0"]
    present = site.centres + site.gaps / 2 * site.directions[:, 0]
    torch.testing.assert_close(drawn_site.projections[:, 0, 0], (present * drawn_site.directions[:, 0]).sum(-1))
    assert torch.equal(drawn_site.gaps, site.gaps) and not control.unknown
    assert {"projections", "centres"} <= random_direction(vector(rank=2), 2).unknown


def test_a_draw_within_the_class_lies_along_what_the_two_extractions_differ_by():
    first, second = vector(1), vector(2)
    control = random_direction(vector(), 0, subtract(first, second))
    for name in SITES:
        moved = [one.sites[name].directions[:, 0] * one.sites[name].gaps for one in (first, second)]
        wanted = F.normalize(moved[0] - moved[1], dim=-1)
        cosines = (control.sites[name].directions[:, 0] * wanted).sum(-1)
        torch.testing.assert_close(cosines.abs(), torch.ones(STEPS))
        assert (cosines > 0).all() or (cosines < 0).all()  # one sign: else the steps would cancel
    assert "covariance within a class" in describe_drawn(vector(), control)


def test_what_does_not_fit_is_refused():
    with pytest.raises(MedSteerError, match="3 directions a step, and within_class 1; as many or more"):
        random_direction(vector(rank=3), 0, vector(1))
    with pytest.raises(MedSteerError, match="channels"):
        random_direction(vector(), 0, vector(1, width=12))


def test_the_report_says_what_was_drawn_and_how_far_suppress_pushes():
    own = vector()
    control = random_direction(own, 1)
    report = describe_drawn(own, control)
    reach = [
        sum(float(site.projections[:, 0, 0].clamp_min(0).sum()) for site in one.sites.values())
        for one in (own, control)
    ]
    assert f"suppress pushes {reach[1] / reach[0]:.0%} as far" in report
    assert "random direction 1 for (polyps - normal)" in report and "isotropic, rank 1" in report
    assert "random direction 1" in describe(control)  # also after it was saved
    assert "be it more or less" in describe_drawn(vector(rank=2), random_direction(vector(rank=2), 1))
