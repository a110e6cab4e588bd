import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medsteer_core.errors import MedSteerError
from medsteer_core.steering.operators import (
    OPERATORS,
    Ablate,
    Add,
    Affine,
    Operator,
    SetPoint,
    Suppress,
    Switch,
    ablate,
    add,
    affine,
    make_operator,
    needs_statistics,
    set_point,
    suppress,
    switch,
)
from medsteer_core.vectors.pathology_vector import StepDirection

X = torch.tensor([[1.0, 0.0, 0.0]])  # one direction, rank 1
XY = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # two, rank 2
A = torch.tensor([[[3.0, 4.0, 0.0], [-3.0, 4.0, 0.0]]])  # one row, two tokens of norm 5: toward and away


def close(actual, wanted, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.tensor(wanted, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def norms(a):
    return torch.linalg.vector_norm(a.double(), dim=-1)


# Hand-computed numbers


def test_suppress_2_reflects_positive_projections_and_leaves_negative_ones():
    close(suppress(A, X, 2.0, keep_norm=True), [[[-3.0, 4.0, 0.0], [-3.0, 4.0, 0.0]]])


def test_suppress_1_removes_positive_projections():
    close(suppress(A, X, 1.0, keep_norm=False), [[[0.0, 4.0, 0.0], [-3.0, 4.0, 0.0]]])


def test_suppress_1_with_the_norm_kept_stretches_what_is_left():
    close(suppress(A, X, 1.0, keep_norm=True), [[[0.0, 5.0, 0.0], [-3.0, 4.0, 0.0]]])


def test_suppress_3_with_the_norm_kept():
    # 3 - 3*3 = -6: (-6, 4) has norm sqrt(52), rescaled to 5
    scale = 5 / math.sqrt(52)
    close(suppress(A, X, 3.0, keep_norm=True), [[[-6 * scale, 4 * scale, 0.0], [-3.0, 4.0, 0.0]]])


def test_suppress_takes_each_direction_of_a_rank_2_vector_by_itself():
    close(suppress(A, XY, 2.0, keep_norm=False), [[[-3.0, -4.0, 0.0], [-3.0, -4.0, 0.0]]])


def test_ablate_removes_both_signs():
    close(ablate(A, X, keep_norm=False), [[[0.0, 4.0, 0.0], [0.0, 4.0, 0.0]]])
    close(ablate(A, X, keep_norm=True), [[[0.0, 5.0, 0.0], [0.0, 5.0, 0.0]]])


def test_add_moves_every_token_by_the_signed_amount():
    close(add(A, X, torch.tensor([2.0]), keep_norm=False), [[[5.0, 4.0, 0.0], [-1.0, 4.0, 0.0]]])
    close(add(A, XY, torch.tensor([-3.0, 1.0]), keep_norm=False), [[[0.0, 5.0, 0.0], [-6.0, 5.0, 0.0]]])


def test_add_with_the_norm_kept_turns_the_token():
    scale = 5 / math.sqrt(41)
    close(add(A[:, :1], X, torch.tensor([2.0]), keep_norm=True), [[[5 * scale, 4 * scale, 0.0]]])


def test_add_measures_its_strength_in_class_gaps():
    step = SimpleNamespace(directions=X, gaps=torch.tensor([4.0]))
    close(Add(0.5, "present")(A, step), [[[5.0, 4.0, 0.0], [-1.0, 4.0, 0.0]]])
    close(Add(0.5, "absent")(A, step), [[[1.0, 4.0, 0.0], [-5.0, 4.0, 0.0]]])


READERS, OFFSETS = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.5, 2.0]]), torch.tensor([-2.0, 1.0])


def test_affine_takes_each_token_what_is_read_from_it():
    # (3, 4, 0) reads 3 + 4 - 2 = 5 along x and 2 + 1 = 3 along y; (-3, 4, 0) reads -1 and 3.
    close(affine(A, XY, READERS, OFFSETS, 1.0, 0.0, keep_norm=False), [[[-2.0, 1.0, 0.0], [-2.0, 1.0, 0.0]]])
    close(affine(A, XY, READERS, OFFSETS, 0.5, 0.0, keep_norm=False), [[[0.5, 2.5, 0.0], [-2.5, 2.5, 0.0]]])
    close(affine(A, XY, READERS, OFFSETS, 2.0, 0.0, keep_norm=False), [[[-7.0, -2.0, 0.0], [-1.0, -2.0, 0.0]]])


def test_affines_focus_is_wieners_gain_on_each_tokens_change():
    """Changes of squared length 9, 1, 0 with mean 10/3: at focus 2 the gains are 9/(9+40/3), 1/(1+40/3) and 0."""
    a = torch.tensor([[[3.0, 0.0], [1.0, 5.0], [0.0, 5.0]]])
    x, none = torch.tensor([[1.0, 0.0]]), torch.zeros(1)
    close(affine(a, x, x, none, 1.0, 0.0, False), [[[0.0, 0.0], [0.0, 5.0], [0.0, 5.0]]])
    first, second = 3 - 3 * 27 / 67, 1 - 3 / 43
    close(affine(a, x, x, none, 1.0, 2.0, False), [[[first, 0.0], [second, 5.0], [0.0, 5.0]]])


def test_affines_focus_weighs_each_row_by_itself_and_survives_rows_without_any_change():
    draw = torch.Generator().manual_seed(0)
    a, none = torch.randn(3, 7, 4, generator=draw), torch.zeros(2)
    a[1] = 0.0
    d = torch.eye(4)[:2]
    together = affine(a, d, d, none, 1.5, 1.0, False)
    singles = torch.cat([affine(row[None], d, d, none, 1.5, 1.0, False) for row in a])
    torch.testing.assert_close(together, singles)
    assert torch.equal(together[1], a[1])


@pytest.mark.parametrize("focus", [-0.1, float("nan"), "much"])
def test_a_focus_that_is_no_number_from_zero_up_is_refused(focus):
    with pytest.raises(MedSteerError, match="affine: focus is"):
        Affine(1.0, focus)


def test_affine_with_the_norm_kept():
    scale = 5 / math.sqrt(5)
    wanted = [[[-2 * scale, scale, 0.0], [-2 * scale, scale, 0.0]]]
    close(affine(A, XY, READERS, OFFSETS, 1.0, 0.0, keep_norm=True), wanted)


def test_affine_with_its_own_directions_as_readers_is_ablation():
    a = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(affine(a, XY, XY, torch.zeros(2), 1.0, 0.0, False), ablate(a, XY, False))


def test_affine_at_strength_zero_is_the_same_object():
    step = SimpleNamespace(directions=XY, gaps=torch.ones(2), readers=READERS, offsets=OFFSETS)
    assert Affine(0.0).is_identity and Affine(0.0)(A, step) is A and Affine(0.0, 2.0, True)(A, step) is A
    assert affine(A, XY, READERS, OFFSETS, 0.0, 0.0, keep_norm=True) is A
    assert Affine() == Affine(1.0, 0.0, False) and not Affine().is_identity
    assert torch.equal(Affine(1.5, 0.5, True)(A, step), affine(A, XY, READERS, OFFSETS, 1.5, 0.5, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_affine_reads_to_within_half_precision_where_the_offset_cancels_most(dtype):
    """A long common part of the activations, which the offset takes away again, as in a real network."""
    generator = torch.Generator().manual_seed(0)
    common = 4 * torch.randn(192, generator=generator)
    a = (common + torch.randn(1, 256, 192, generator=generator)).to(dtype)
    d = torch.linalg.qr(torch.randn(192, 8, generator=generator)).Q.mT
    readers = torch.randn(8, 192, generator=generator) / 14
    offsets = -readers @ common
    wanted = affine(a.double(), d.double(), readers.double(), offsets.double(), 1.0, 0.0, False) - a.double()
    given = affine(a, *(t.to(dtype) for t in (d, readers, offsets)), 1.0, 0.0, False)
    assert given.dtype == dtype
    error = (given.double() - a.double() - wanted).norm() / wanted.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_affine_without_readers_says_how_to_extract():
    step = SimpleNamespace(directions=X, gaps=torch.ones(1), readers=None, offsets=None)
    with pytest.raises(MedSteerError, match="'affine' needs a vector that was extracted with noise 'same state'"):
        Affine()(A, step)


# Set


def means_step(d=X, means=((8.0,), (-2.0,)), dtype=torch.float32):
    """A step whose classes have these mean projections, [present, absent]."""
    means = torch.tensor(means, dtype=dtype)
    return StepDirection(d.to(dtype), means[0] - means[1], means)


def test_set_moves_every_projection_to_the_means_by_the_strength():
    close(set_point(A, X, torch.tensor([-2.0]), 1.0, False), [[[-2.0, 4.0, 0.0], [-2.0, 4.0, 0.0]]])
    close(set_point(A, X, torch.tensor([-2.0]), 0.5, False), [[[0.5, 4.0, 0.0], [-2.5, 4.0, 0.0]]])
    close(set_point(A, X, torch.tensor([-2.0]), 1.5, False), [[[-4.5, 4.0, 0.0], [-1.5, 4.0, 0.0]]])


def test_set_sets_each_direction_of_a_rank_2_vector_to_its_own_mean():
    close(set_point(A, XY, torch.tensor([1.0, 7.0]), 1.0, False), [[[1.0, 7.0, 0.0], [1.0, 7.0, 0.0]]])


def test_set_with_the_norm_kept():
    # (3, 4) becomes (0, 4), rescaled to 5; (-3, 4) the same
    close(set_point(A, X, torch.tensor([0.0]), 1.0, True), [[[0.0, 5.0, 0.0], [0.0, 5.0, 0.0]]])


def test_set_goes_to_the_class_that_is_asked_for():
    """Strength 0 is where the token is, 1 the class's mean, 1.5 half the way beyond."""
    close(SetPoint(1.0)(A, means_step()), [[[-2.0, 4.0, 0.0], [-2.0, 4.0, 0.0]]])
    close(SetPoint(1.0, "present")(A, means_step()), [[[8.0, 4.0, 0.0], [8.0, 4.0, 0.0]]])
    close(SetPoint(1.5, "present")(A, means_step()), [[[10.5, 4.0, 0.0], [13.5, 4.0, 0.0]]])
    assert SetPoint() == SetPoint(1.0, "absent", False)


def test_set_to_the_absent_mean_is_what_add_does_to_a_token_at_the_present_mean():
    token = torch.tensor([[[8.0, 1.0, 2.0]]])
    torch.testing.assert_close(SetPoint(0.7)(token, means_step()), Add(0.7, "absent")(token, means_step()))


def test_set_at_strength_zero_is_the_same_object():
    assert SetPoint(0.0).is_identity and SetPoint(0.0, "present", True)(A, means_step()) is A
    assert set_point(A, X, torch.ones(1), 0.0, True) is A
    assert not SetPoint(1e-9).is_identity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_set_stays_accurate_where_the_mean_and_the_projection_cancel(dtype):
    generator = torch.Generator().manual_seed(0)
    d = torch.nn.functional.normalize(torch.randn(1, 192, generator=generator), dim=-1)
    a = 40 * d[None] + 0.5 * torch.randn(1, 64, 192, generator=generator)
    step = means_step(d, ((44.0,), (40.0,)), dtype)
    given = SetPoint(1.0)(a.to(dtype), step)
    assert given.dtype == dtype
    assert ((given.double() @ d[0].double()) - 40).abs().max() < 40 * torch.finfo(dtype).eps * 2


# Switch


def test_switch_moves_what_suppress_takes_to_the_target():
    # (3, 4, 0): 3 off x and 3 onto y, then half and twice as much; (-3, 4, 0) points away and stays.
    away, y = [-3.0, 4.0, 0.0], XY[1:]
    close(switch(A, X, y, 1.0, False), [[[0.0, 7.0, 0.0], away]])
    close(switch(A, X, y, 0.5, False), [[[1.5, 5.5, 0.0], away]])
    close(switch(A, X, y, 2.0, False), [[[-3.0, 10.0, 0.0], away]])


def test_switch_to_a_target_that_is_not_orthogonal_and_with_the_norm_kept():
    slanted = torch.tensor([[0.6, 0.0, 0.8]])
    close(switch(A, X, slanted, 1.0, False), [[[1.8, 4.0, 2.4], [-3.0, 4.0, 0.0]]])
    scale = 5 / math.sqrt(1.8**2 + 16 + 2.4**2)
    close(switch(A, X, slanted, 1.0, True), [[[1.8 * scale, 4 * scale, 2.4 * scale], [-3.0, 4.0, 0.0]]])


def test_switch_pairs_the_directions_of_rank_2_one_to_one():
    targets = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    # (3, 4, 0): 3 from x to z and 4 from y to x; (-3, 4, 0): only 4 from y to x.
    close(switch(A, XY, targets, 1.0, False), [[[4.0, 0.0, 3.0], [1.0, 0.0, 0.0]]])


def test_switch_to_its_own_direction_changes_nothing():
    torch.testing.assert_close(switch(A, X, X, 1.7, False), A)


def test_switch_reads_the_target_from_the_step():
    step = StepDirection(X, torch.ones(1), torch.zeros(2, 1), target=XY[1:])
    assert torch.equal(Switch(1.5, True)(A, step), switch(A, X, XY[1:], 1.5, True))
    assert Switch(0.0).is_identity and Switch(0.0, True)(A, step) is A and switch(A, X, X, 0.0, True) is A
    assert Switch() == Switch(1.0, False)
    moved = step.cast(torch.device("cpu"), torch.float16)
    assert moved.target.dtype == torch.float16 and Switch()(A.half(), moved).dtype == torch.float16


def test_switch_without_a_second_vector_says_so():
    with pytest.raises(MedSteerError, match=r"'switch' needs a second vector.*Connect one to the input 'target'"):
        Switch()(A, means_step())


def test_switch_between_ranks_or_widths_is_refused():
    step = StepDirection(X, torch.ones(1), torch.zeros(2, 1), target=XY)
    with pytest.raises(
        MedSteerError, match="2 directions of 3 channels a step, and the source vector 1 directions of 3"
    ):
        Switch()(A, step)


def test_the_operators_say_what_they_need_of_a_vector():
    def needing(what):
        return {name for name, kind in OPERATORS.items() if getattr(kind, f"needs_{what}")}

    assert needing("gaps") == {"add"} and needing("class_means") == {"set"}
    assert needing("target") == {"switch"} and needing("readers") == {"affine"}
    assert "'set' counts in units of the two classes' means" in str(needs_statistics("set"))


def test_the_operators_chosen_by_name_do_what_the_functions_do():
    step = SimpleNamespace(directions=X, gaps=torch.tensor([4.0]))
    assert torch.equal(Suppress(1.5, True)(A, step), suppress(A, X, 1.5, True))
    assert torch.equal(Ablate(True)(A, step), ablate(A, X, True))


# Edges


def test_strength_zero_is_the_same_object():
    step = SimpleNamespace(directions=X, gaps=torch.tensor([4.0]))
    for operator in (Suppress(0.0, True), Suppress(0.0, False), Add(0.0), Add(0.0, "absent", True)):
        assert operator.is_identity and operator(A, step) is A
    assert suppress(A, X, 0.0, keep_norm=True) is A
    assert not any(operator.is_identity for operator in (Suppress(), Ablate(), Add(), Suppress(1e-9)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_zero_token_stays_zero_and_never_becomes_nan(dtype):
    zero, d = torch.zeros(1, 2, 3, dtype=dtype), X.to(dtype)
    for steered in (suppress(zero, d, 1.0, True), suppress(zero, d, 3.0, True), ablate(zero, d, True)):
        assert torch.equal(steered, zero)


def test_a_token_wholly_along_the_direction_is_not_blown_up_from_rounding():
    d = torch.nn.functional.normalize(torch.arange(1.0, 65.0), dim=0)[None]
    steered = ablate(7.3 * d[None], d, keep_norm=True)
    assert norms(steered).max() < 1e-4


def test_a_float16_norm_beyond_float16_does_not_overflow():
    a = torch.full((1, 1, 4096), 2000.0, dtype=torch.float16)  # norm 128000 > 65504
    d = torch.nn.functional.normalize((torch.arange(4096) < 800).float(), dim=0)[None].to(torch.float16)
    assert norms(suppress(a, d, 1.0, keep_norm=False)).item() == pytest.approx(
        128000 * math.sqrt(1 - 800 / 4096), rel=2e-3
    )
    steered = suppress(a, d, 1.0, keep_norm=True)
    assert torch.isfinite(steered).all()
    assert norms(steered).item() == pytest.approx(128000, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype):
    step = SimpleNamespace(directions=X.to(dtype), gaps=torch.ones(1, dtype=dtype))
    for operator in (Suppress(1.5), Ablate(True), Add(1.0, keep_norm=True)):
        assert operator(A.to(dtype), step).dtype == dtype
    for operator in (SetPoint(1.5), SetPoint(1.0, keep_norm=True)):
        assert operator(A.to(dtype), means_step(dtype=dtype)).dtype == dtype


def test_the_input_is_never_changed_in_place():
    before = A.clone()
    step = SimpleNamespace(directions=X, gaps=torch.ones(1))
    for operator in (Suppress(), Suppress(1.0), Ablate(True), Add(1.0, keep_norm=True)):
        operator(A, step)
    step = StepDirection(X, torch.ones(1), torch.ones(2, 1), target=XY[1:])
    for operator in (SetPoint(), SetPoint(1.0, keep_norm=True), Switch(), Switch(2.0, True)):
        operator(A, step)
    assert torch.equal(A, before)


def test_a_transposed_activation_is_steered_like_its_copy():
    a = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    assert not a.is_contiguous()
    torch.testing.assert_close(suppress(a, X, 1.5, True), suppress(a.contiguous(), X, 1.5, True))


def test_gradients_flow_through_norm_keeping_even_at_zero_tokens():
    a = torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    suppress(a, X, 1.0, True).sum().backward()
    assert torch.isfinite(a.grad).all() and a.grad.abs().sum() > 0


# Properties


@st.composite
def cases(draw):
    """An activation (2, 5, 8) and orthonormal directions (R, 8), R from 1 to 3, in float64."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rank = draw(st.integers(1, 3))
    d = torch.linalg.qr(torch.randn(8, rank, generator=generator, dtype=torch.float64)).Q.T
    scale = 10.0 ** draw(st.integers(-3, 3))
    return torch.randn(2, 5, 8, generator=generator, dtype=torch.float64) * scale, d


@settings(deadline=None)
@given(cases(), st.floats(-4, 4))
def test_keep_norm_keeps_every_tokens_norm(case, strength):
    a, d = case
    units = strength * a.new_ones(len(d))
    for steered in (suppress(a, d, strength, True), ablate(a, d, True), add(a, d, units, True),
                    set_point(a, d, units, 0.5, True), switch(a, d, d.flip(-1), strength, True)):  # fmt: skip
        torch.testing.assert_close(norms(steered), norms(a), rtol=1e-9, atol=0)


@settings(deadline=None)
@given(cases())
def test_suppress_2_keeps_the_norm_without_rescaling(case):
    a, d = case
    torch.testing.assert_close(norms(suppress(a, d, 2.0, False)), norms(a), rtol=1e-12, atol=0)
    assert torch.equal(suppress(a, d, 2.0, True), suppress(a, d, 2.0, False))


@settings(deadline=None)
@given(cases(), st.floats(-4, 4))
def test_suppress_scales_positive_projections_and_nothing_else(case, strength):
    a, d = case
    before, after = a @ d.T, suppress(a, d, strength, False) @ d.T
    torch.testing.assert_close(after, before - strength * before.clamp_min(0), rtol=1e-9, atol=1e-9 * norms(a).max())
    rest_before, rest_after = a - before @ d, suppress(a, d, strength, False) - after @ d
    torch.testing.assert_close(rest_after, rest_before, rtol=1e-9, atol=1e-9 * norms(a).max().item())


@settings(deadline=None)
@given(cases(), st.floats(-4, 4))
def test_set_takes_the_share_strength_of_the_way_and_leaves_the_rest(case, strength):
    a, d = case
    means, scale = torch.linspace(-1, 2, len(d), dtype=a.dtype), norms(a).max().item() + 2
    steered = set_point(a, d, means, strength, False)
    before, after = a @ d.T, steered @ d.T
    torch.testing.assert_close(after, before + strength * (means - before), rtol=1e-9, atol=1e-9 * scale)
    torch.testing.assert_close(steered - after @ d, a - before @ d, rtol=1e-9, atol=1e-9 * scale)


@settings(deadline=None)
@given(cases(), st.floats(-4, 4))
def test_switch_is_suppress_and_as_much_added_along_the_target(case, strength):
    a, d = case
    target = torch.linalg.qr(torch.cat([d, d.flip(-1)]).T).Q.T[-len(d) :]
    wanted = suppress(a, d, strength, False) + strength * (a @ d.T).clamp_min(0) @ target
    torch.testing.assert_close(
        switch(a, d, target, strength, False), wanted, rtol=1e-9, atol=1e-9 * norms(a).max().item()
    )


@settings(deadline=None)
@given(cases())
def test_ablating_twice_is_ablating_once(case):
    a, d = case
    once = ablate(a, d, False)
    torch.testing.assert_close(ablate(once, d, False), once, rtol=0, atol=1e-12 * norms(a).max().item())
    assert (once @ d.T).abs().max() < 1e-12 * norms(a).max()


@settings(deadline=None)
@given(cases(), st.floats(0.01, 4))
def test_tokens_that_point_away_are_bit_identical_without_norm_keeping(case, strength):
    a, d = case
    away = (a @ d.T < 0).all(-1)
    assume(away.any())
    assert torch.equal(suppress(a, d, strength, False)[away], a[away])


# By name


@pytest.mark.parametrize(
    "operator",
    [
        Suppress(),
        Suppress(2.5, False),
        Ablate(True),
        Add(-1.5, "absent", True),
        SetPoint(1.5, "present", True),
        Switch(0.5, True),
    ],
)
def test_an_operator_comes_back_from_its_dict(operator):
    assert Operator.from_dict(operator.to_dict()) == operator


def test_the_default_operator_is_medsteers_preset():
    assert Suppress().to_dict() == {"name": "suppress", "strength": 2.0, "keep_norm": True}


def test_operators_are_made_by_name():
    assert set(OPERATORS) == {"suppress", "ablate", "add", "set", "switch", "affine"}
    assert make_operator("add", strength=3, toward="absent") == Add(3.0, "absent", False)


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, "much", None])
@pytest.mark.parametrize("kind", [Suppress, Add, SetPoint, Switch, Affine])
def test_a_strength_that_is_no_finite_number_is_an_error(kind, strength):
    with pytest.raises(MedSteerError, match=f"{kind.name}: strength is .*; a finite number was expected"):
        kind(strength)


def test_unknown_names_parameters_and_goals_are_errors():
    with pytest.raises(MedSteerError, match="no operator 'remove'; choose one of suppress, ablate, add"):
        make_operator("remove")
    with pytest.raises(MedSteerError, match="no operator None"):
        Operator.from_dict({"strength": 1.0})
    with pytest.raises(MedSteerError, match="'ablate' has no parameter strength; it has keep_norm"):
        make_operator("ablate", strength=1.0)
    with pytest.raises(MedSteerError, match="'present' or 'absent'"):
        Add(1.0, "sideways")
    with pytest.raises(MedSteerError, match="set: toward is 'sideways'; 'present' or 'absent' was expected"):
        SetPoint(1.0, "sideways")


# In place


IN_PLACE = [
    Suppress(2.0), Suppress(1.5), Suppress(1.0, False), Ablate(), Ablate(True), Add(0.5), Add(0.5, "absent", True),
    SetPoint(0.5), SetPoint(1.0, "present", True), Switch(1.0), Switch(1.5, True), Affine(1.5), Affine(1.5, 1.0, True),
]  # fmt: skip


def full_step(dtype):
    generator = torch.Generator().manual_seed(4)
    d, target = (torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q.mT.contiguous() for _ in range(2))
    readers, offsets = torch.randn(2, 16, generator=generator), torch.randn(2, generator=generator)
    step = StepDirection(d, torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0], [-1.0, 0.5]]), readers, offsets, target)
    return step.cast(torch.device("cpu"), dtype)


@pytest.mark.parametrize("operator", IN_PLACE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_in_place_changes_the_activation_itself_into_what_a_new_one_would_be(operator, dtype):
    a = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(5)).to(dtype)
    before, step = a.clone(), full_step(dtype)
    wanted = operator(a, step)
    assert torch.equal(a, before)  # out of place the activation stays what it was
    assert operator(a, step, in_place=True) is a
    torch.testing.assert_close(a, wanted)
    assert not torch.equal(a, before)


@pytest.mark.parametrize("operator", [one for one in IN_PLACE if not isinstance(one, Add)], ids=str)
def test_in_place_refuses_an_activation_of_which_it_would_change_a_copy(operator):
    a = torch.randn(5, 3, 16).transpose(0, 1)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        operator(a, full_step(torch.float32), in_place=True)


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_is_lost_alone(lost):
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(2, 6, 8, generator=generator)
    d = torch.nn.functional.normalize(torch.randn(1, 8, generator=generator), dim=-1)
    spoilt = a.clone()
    spoilt[0, 2] = lost
    steered = affine(spoilt, d, 2 * d, torch.ones(1), 1.5, 1.0, False)
    without = affine(a[:, [0, 1, 3, 4, 5]], d, 2 * d, torch.ones(1), 1.5, 1.0, False)
    torch.testing.assert_close(steered[0, [0, 1, 3, 4, 5]], without[0])  # as if it were not there
    torch.testing.assert_close(steered[1], affine(a, d, 2 * d, torch.ones(1), 1.5, 1.0, False)[1])
    assert not steered[0, 2].isfinite().any()
