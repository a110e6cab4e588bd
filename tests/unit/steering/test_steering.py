import dataclasses
import math
from dataclasses import replace

import pytest
import torch

from medsteer_core.errors import MedSteerError
from medsteer_core.steering.operators import Ablate, Add, Affine, Suppress, Switch, ablate, affine, suppress
from medsteer_core.steering.plan import Steering, SteeringPlan
from medsteer_core.steering.prepared import PreparedPlan
from medsteer_core.steering.rows import apply_steering, steer_parts
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections
from medsteer_core.vectors.schedule import SigmaWindow, StrengthCurve

NAMES = ("b.0", "b.1", "b.2")
ALWAYS = SigmaWindow()
CPU = torch.device("cpu")


def make_vector(seed=0, channels=8, steps=3, names=NAMES):
    generator = torch.Generator().manual_seed(seed)

    def site():
        directions = torch.nn.functional.normalize(torch.randn(steps, 1, channels, generator=generator), dim=-1)
        gaps = torch.rand(steps, 1, generator=generator)
        projections = torch.stack([gaps, torch.zeros(steps, 1)], dim=1)
        return SiteDirections(directions, gaps, torch.zeros(steps, channels), projections, torch.ones(steps, 2))

    return PathologyVector({name: site() for name in names}, torch.tensor([16.0, 4.0, 1.0][:steps]), {"seed": seed})


def steering(operator=None, window=ALWAYS, sites=NAMES, rows="all", vector=None):
    return Steering(vector or make_vector(), operator or Suppress(), window, sites, rows)


def activation(rows=4, tokens=5, channels=8, dtype=torch.float32):
    return torch.randn(rows, tokens, channels, generator=torch.Generator().manual_seed(9)).to(dtype)


# One activation


def test_only_the_named_rows_change_and_the_others_are_bit_identical():
    a, step = activation(), make_vector().at("b.0", 4.0)
    steered = apply_steering(a, Ablate(), step, [slice(1, 2), (3, 4)])
    assert torch.equal(steered[[0, 2]], a[[0, 2]])
    torch.testing.assert_close(steered[[1, 3]], ablate(a[[1, 3]], step.directions, False))
    assert not torch.equal(steered[1], a[1])


@pytest.mark.parametrize("rows", [None, [slice(0, 4)], [range(0, 4)], [slice(None)], [(0, 2), (2, 4)]])
def test_every_row_may_be_named_in_any_way(rows):
    a, step = activation(), make_vector().at("b.0", 4.0)
    torch.testing.assert_close(apply_steering(a, Suppress(), step, rows), suppress(a, step.directions, 2.0, True))


def test_no_rows_or_the_identity_give_the_same_object():
    a, step = activation(), make_vector().at("b.0", 4.0)
    assert apply_steering(a, Suppress(), step, []) is a
    assert apply_steering(a, Suppress(), step, [slice(2, 2)]) is a
    assert apply_steering(a, Suppress(0.0), step, None) is a
    assert apply_steering(a, Add(0.0), step, [slice(0, 1)]) is a


def test_the_input_is_never_changed():
    a, step = activation(), make_vector().at("b.0", 4.0)
    before = a.clone()
    for rows in (None, [slice(0, 2)]):
        assert apply_steering(a, Suppress(), step, rows) is not a
    assert torch.equal(a, before)


@pytest.mark.parametrize("rows", [None, [(1, 2), (3, 4)], []])
@pytest.mark.parametrize("weights", [None, torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(0))])
def test_in_place_the_input_becomes_what_a_new_tensor_would_be(rows, weights):
    a, step = activation(), make_vector().at("b.0", 4.0)
    wanted = apply_steering(a, Suppress(1.5), step, rows, weights)
    assert apply_steering(a, Suppress(1.5), step, rows, weights, in_place=True) is a
    torch.testing.assert_close(a, wanted)


def test_rows_are_kept_in_place_even_of_an_operator_that_makes_a_new_tensor():
    a, step = activation(), make_vector().at("b.0", 4.0)
    steered = steer_parts(a.clone(), lambda part, _step, _in_place: part + 1, step, [slice(1, 2)], in_place=True)
    torch.testing.assert_close(steered[1], a[1] + 1)
    assert torch.equal(steered[[0, 2, 3]], a[[0, 2, 3]])


@pytest.mark.parametrize("rows", [(0, 5), (-1, 2), (3, 2), slice(0, 4, 2)])
def test_rows_that_the_call_does_not_have_are_an_error(rows):
    with pytest.raises(MedSteerError, match="the model call has rows 0 to 3"):
        apply_steering(activation(), Suppress(), make_vector().at("b.0", 4.0), [rows])


# Plans


def test_a_steering_acts_in_its_window_unless_it_is_the_identity():
    window = SigmaWindow(8.0, 2.0)
    assert [steering(window=window).acts_at(sigma) for sigma in (9.0, 8.0, 4.0, 2.0)] == [False, True, True, False]
    assert not steering(Suppress(0.0), window).acts_at(4.0)


def test_a_plan_grows_and_leaves_the_old_one_alone():
    empty = SteeringPlan()
    one = empty.then(steering())
    two = one.then(steering(Ablate()))
    assert [len(plan.steerings) for plan in (empty, one, two)] == [0, 1, 2]
    assert two.steerings[0] is one.steerings[0]


def test_the_sites_of_a_plan_are_those_that_can_change_in_execution_order():
    plan = SteeringPlan((steering(sites=("b.2",)), steering(sites=("b.0", "b.2")), steering(Suppress(0.0))))
    assert plan.sites == ("b.0", "b.2")
    assert SteeringPlan((steering(Suppress(0.0)),)).sites == ()


def test_a_steering_names_sites_that_its_vector_lacks():
    with pytest.raises(MedSteerError, match=r"no site 'b.9'"):
        steering(sites=("b.0", "b.9"))
    with pytest.raises(MedSteerError, match="at least one site"):
        steering(sites=())
    with pytest.raises(MedSteerError, match="rows is empty"):
        steering(rows="")


def test_vectors_of_different_models_cannot_be_chained():
    with pytest.raises(MedSteerError, match=r"'b.0' has 8 and 6 channels"):
        SteeringPlan((steering(), steering(vector=make_vector(channels=6))))


# A run


def run(plan, sigma=4.0, site="b.0", a=None, rows=None):
    prepared = PreparedPlan(plan)
    prepared.prepare(sigma, torch.float32, CPU)
    return prepared, prepared.apply(site, activation() if a is None else a, rows or {})


def test_a_run_applies_the_vector_of_this_site_and_sigma():
    vector = make_vector()
    for site in NAMES:
        for sigma in (16.0, 7.0, 0.5):
            _, steered = run(SteeringPlan((steering(vector=vector),)), sigma, site)
            wanted = suppress(activation(), vector.at(site, sigma).directions, 2.0, True)
            torch.testing.assert_close(steered, wanted)


def test_steerings_act_in_the_plans_order():
    first, second = steering(Suppress(1.0)), steering(Add(2.0), vector=make_vector(1))
    _, steered = run(SteeringPlan((first, second)))
    wanted = second.operator(first.operator(activation(), first.vector.at("b.0", 4.0)), second.vector.at("b.0", 4.0))
    torch.testing.assert_close(steered, wanted)
    _, other = run(SteeringPlan((second, first)))
    assert not torch.allclose(other, steered)


def test_strength_zero_returns_the_activation_itself():
    a = activation()
    prepared, steered = run(SteeringPlan((steering(Suppress(0.0)), steering(Add(0.0)))), a=a)
    assert steered is a and prepared.touches == [0, 0]


def test_outside_the_window_and_at_other_sites_nothing_changes():
    a = activation()
    plan = SteeringPlan((steering(window=SigmaWindow(5.0, 3.0), sites=("b.0",)),))
    assert run(plan, 16.0, "b.0", a)[1] is a
    assert run(plan, 3.0, "b.0", a)[1] is a
    assert run(plan, 4.0, "b.1", a)[1] is a
    assert run(plan, 4.0, "b.0", a)[1] is not a


def test_prepare_tells_which_sites_can_change_at_a_sigma():
    plan = SteeringPlan(
        (
            steering(window=SigmaWindow(math.inf, 4.0), sites=("b.2",)),
            steering(window=SigmaWindow(8.0, 0.0), sites=("b.0",)),
        )
    )
    prepared = PreparedPlan(plan)
    assert prepared.prepare(16.0, torch.float32, CPU) == ("b.2",)
    assert prepared.prepare(8.0, torch.float32, CPU) == ("b.0", "b.2")
    assert prepared.prepare(1.0, torch.float32, CPU) == ("b.0",)
    assert PreparedPlan(SteeringPlan()).prepare(1.0, torch.float32, CPU) == ()


@pytest.mark.parametrize("as_function", [False, True])
def test_rows_are_named_and_a_name_without_rows_in_this_call_changes_nothing(as_function):
    where = {"negative": [slice(0, 2)], "positive": [slice(2, 4)]}
    rows = (lambda name: where.get(name, [])) if as_function else where
    a = activation()
    _, steered = run(SteeringPlan((steering(rows="positive"),)), a=a, rows=rows)
    assert torch.equal(steered[:2], a[:2]) and not torch.equal(steered[2:], a[2:])
    prepared, untouched = run(SteeringPlan((steering(rows="middle"),)), a=a, rows=rows)
    assert untouched is a and prepared.touches == [0]


def test_all_rows_are_not_looked_up():
    def never(name):
        raise AssertionError(name)

    a = activation()
    assert not torch.equal(run(SteeringPlan((steering(),)), a=a, rows=never)[1], a)


def test_touches_count_the_sites_and_calls_of_each_steering():
    plan = SteeringPlan(
        (
            steering(),
            steering(sites=("b.1",), rows="positive"),
            steering(window=SigmaWindow(0.9, 0.5)),
            steering(Add(0.0)),
        )
    )
    prepared = PreparedPlan(plan)
    for sigma, rows in ((16.0, {"positive": [slice(0, 4)]}), (16.0, {}), (4.0, {"positive": [slice(2, 4)]})):
        for site in prepared.prepare(sigma, torch.float32, CPU):
            prepared.apply(site, activation(), rows)
    assert prepared.touches == [9, 2, 0, 0]
    assert prepared.untouched() == (plan.steerings[2],)  # the identity is not expected to touch


def test_two_runs_of_one_plan_share_nothing():
    plan = SteeringPlan((steering(),))
    first, _ = run(plan)
    second = PreparedPlan(plan)
    assert first.touches == [1] and second.touches == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_directions_follow_the_activations_dtype_even_if_another_was_prepared(dtype):
    prepared = PreparedPlan(SteeringPlan((steering(),)))
    prepared.prepare(4.0, torch.float32, CPU)
    steered = prepared.apply("b.0", activation(dtype=dtype), {})
    assert steered.dtype == dtype
    wanted = suppress(activation(dtype=dtype).float(), make_vector().at("b.0", 4.0).directions, 2.0, True)
    torch.testing.assert_close(steered.float(), wanted, rtol=0.02, atol=0.05)


def with_readers(vector):
    generator = torch.Generator().manual_seed(5)

    def more(site):
        readers, offsets = (torch.randn(t.shape, generator=generator) for t in (site.directions, site.gaps))
        return dataclasses.replace(site, readers=readers, offsets=offsets)

    return PathologyVector({name: more(site) for name, site in vector.sites.items()}, vector.sigmas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_readers_travel_with_the_directions_beside_a_vector_that_has_none(dtype):
    vector = with_readers(make_vector(1))
    plan = SteeringPlan((steering(Ablate()), steering(Affine(1.5), vector=vector), steering(Add(0.5))))
    prepared, a = PreparedPlan(plan), activation(dtype=dtype)
    prepared.prepare(4.0, dtype, CPU)
    for site in NAMES:
        plain, at = make_vector().at(site, 4.0).cast(CPU, dtype), vector.at(site, 4.0).cast(CPU, dtype)
        wanted = affine(ablate(a, plain.directions, False), at.directions, at.readers, at.offsets, 1.5, 0.0, False)
        wanted = wanted + 0.5 * plain.gaps @ plain.directions
        torch.testing.assert_close(prepared.apply(site, a, {}), wanted, rtol=1e-6, atol=1e-6)
    assert prepared.untouched() == ()


def test_affine_wants_a_vector_with_readers():
    with pytest.raises(MedSteerError, match="noise to 'same state' in Extract Pathology Vector"):
        steering(Affine())


def test_directions_are_looked_up_once_for_each_sigma_and_only_the_last_are_held(monkeypatch):
    lookups = []
    original = PathologyVector.at_sites

    def counted(self, sites, sigma):
        lookups.extend((site, sigma) for site in sites)
        return original(self, sites, sigma)

    monkeypatch.setattr(PathologyVector, "at_sites", counted)
    prepared = PreparedPlan(SteeringPlan((steering(),)))
    held = set()
    for sigma in (16.0, 16.0, 9.0, 4.0, 4.0):
        for dtype in (torch.float32, torch.bfloat16):
            prepared.prepare(sigma, dtype, CPU)
            for site in NAMES:
                prepared.apply(site, activation(dtype=dtype), {})
        held.add(sum(len(steps) for steps in prepared._step.cast.values()))
    assert len(lookups) == 3 * len(NAMES)
    assert held == {2 * len(NAMES)}


def test_an_activation_of_another_width_is_refused_by_the_sites_name():
    with pytest.raises(MedSteerError, match=r"Site 'b.0' .* shape \(4, 5, 6\); the vector wants \(rows, tokens, 8\)"):
        run(SteeringPlan((steering(),)), a=activation(channels=6))


def test_a_batch_equals_its_rows_one_by_one():
    a = activation()
    plan = SteeringPlan((steering(Suppress(1.5)), steering(Add(0.5), vector=make_vector(1))))
    together = run(plan, a=a)[1]
    alone = torch.cat([run(plan, a=a[i : i + 1])[1] for i in range(len(a))])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


# Curves, masks and a second vector


def test_a_curve_multiplies_the_strength_at_each_noise_level():
    curve = StrengthCurve((10.0, 1.0), (0.0, 1.0))
    one = replace(steering(operator=Suppress(2.0, False)), curve=curve)
    assert one.operator_at(10.0**0.5).strength == pytest.approx(1.0)
    assert one.operator_at(1.0).strength == 2.0
    assert not one.acts_at(10.0) and one.acts_at(9.0)
    a = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    prepared = PreparedPlan(SteeringPlan((one,)))
    (site, *_) = prepared.prepare(10.0**0.5, a.dtype, a.device)
    half = PreparedPlan(SteeringPlan((replace(one, curve=None, operator=Suppress(1.0, False)),)))
    half.prepare(10.0**0.5, a.dtype, a.device)
    torch.testing.assert_close(prepared.apply(site, a, {}), half.apply(site, a, {}))


def test_an_operator_without_a_strength_takes_no_curve():
    with pytest.raises(MedSteerError, match="ablate has no strength"):
        replace(steering(operator=Ablate()), curve=StrengthCurve((1.0,), (0.5,)))


def test_a_mask_steers_what_it_covers_of_each_token():
    mask = torch.zeros(1, 8, 8)
    mask[:, :4, :4] = 1.0  # the first of 2 x 2 tokens
    mask[:, :4, 4:6] = 1.0  # half of the second
    one = replace(steering(operator=Ablate()), mask=mask)
    a = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    prepared, free = (PreparedPlan(SteeringPlan((s,))) for s in (one, replace(one, mask=None)))
    (site, *_) = prepared.prepare(5.0, a.dtype, a.device)
    free.prepare(5.0, a.dtype, a.device)
    masked, whole = prepared.apply(site, a, {}, size=(8, 8)), free.apply(site, a, {})
    assert torch.equal(masked[:, 0], whole[:, 0]) and torch.equal(masked[:, 2:], a[:, 2:])
    torch.testing.assert_close(masked[:, 1], (a[:, 1] + whole[:, 1]) / 2)


def test_each_image_of_a_batch_has_its_own_mask_in_every_conditionings_rows():
    masks = torch.stack([torch.ones(4, 4), torch.zeros(4, 4)])
    one = replace(steering(operator=Ablate()), mask=masks)
    a = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(2))  # two conditionings of two images
    prepared = PreparedPlan(SteeringPlan((one,)))
    (site, *_) = prepared.prepare(5.0, a.dtype, a.device)
    result = prepared.apply(site, a, {}, size=(4, 4))
    assert [torch.equal(result[row], a[row]) for row in range(4)] == [False, True, False, True]


@pytest.mark.parametrize(
    ("mask", "message"),
    [(torch.zeros(1, 4, 4), "black everywhere"), (torch.full((1, 4, 4), 1.5), "outside 0 to 1"),
     (torch.full((1, 4, 4), torch.nan), "outside 0 to 1"), (torch.ones(4, 4), "has shape")],
)  # fmt: skip
def test_masks_that_mean_nothing_are_refused(mask, message):
    with pytest.raises(MedSteerError, match=message):
        replace(steering(), mask=mask)


def test_a_mask_on_video_latents_is_refused():
    one = replace(steering(operator=Ablate()), mask=torch.ones(1, 4, 4))
    prepared = PreparedPlan(SteeringPlan((one,)))
    (site, *_) = prepared.prepare(5.0, torch.float32, torch.device("cpu"))
    with pytest.raises(MedSteerError, match="image models only"):
        prepared.apply(site, torch.randn(1, 4, 8), {}, size=(2, 4, 4))


def test_switch_takes_the_second_vectors_directions():
    source, target = make_vector(), make_vector(seed=9)
    with pytest.raises(MedSteerError, match="needs a second vector"):
        steering(vector=source, operator=Switch(1.0))
    one = replace(steering(vector=source, operator=Suppress()), operator=Switch(1.5), target=target)
    a = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(3))
    prepared = PreparedPlan(SteeringPlan((one,)))
    (site, *_) = prepared.prepare(5.0, a.dtype, a.device)
    d, t = (vector.at(site, 5.0).directions[0] for vector in (source, target))
    expected = a + 1.5 * (a @ d).clamp_min(0)[..., None] * (t - d)
    torch.testing.assert_close(prepared.apply(site, a, {}), expected)


def test_a_vector_that_the_models_dtype_cannot_hold_is_refused_by_the_dtypes_name():
    vector = make_vector()
    sites = {name: replace(site, gaps=site.gaps * 0 + 7e4) for name, site in vector.sites.items()}
    far = SteeringPlan((steering(Add(1.0), vector=replace(vector, sites=sites)),))
    with pytest.raises(MedSteerError, match="values up to 7e[+]04, and float16, in which .* ends at 65,504"):
        PreparedPlan(far).prepare(4.0, torch.float16, CPU)
    for dtype in (torch.bfloat16, torch.float32):
        assert PreparedPlan(far).prepare(4.0, dtype, CPU) == NAMES
