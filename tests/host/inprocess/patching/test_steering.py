"""A steered model inside ComfyUI's samplers: what it changes, and that it leaves nothing behind."""

import dataclasses
import math

import comfy.model_management
import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.patching import levels, patch, steer
from medsteer_pack.medsteer_core.host.sampling import runs as sampling

POSITIVE, NEGATIVE = tiny.cond(1), tiny.cond(2)
SITES = [f"blocks.{index}.cross_attn.proj" for index in range(tiny.DEPTH)]
ZERO = [
    ("suppress", {"strength": 0.0, "keep_norm": True}), ("add", {"strength": 0.0, "toward": "present"}),
    ("set", {"strength": 0.0, "toward": "absent"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def vector(pixart):
    return tiny.vector(pixart)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(pixart):
    yield
    assert tiny.hook_count(pixart) == 0
    assert not tiny.is_steered(pixart)


def run(model, **options):
    return tiny.run(model, POSITIVE, NEGATIVE, **options)


# Strength 0


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize(("operator", "parameters"), ZERO, ids=["suppress", "add", "set"])
def test_strength_zero_is_bit_identical_to_no_node(pixart, vector, sampler, operator, parameters):
    still = tiny.steered(pixart, vector, operator=operator, **parameters)
    assert torch.equal(run(still, sampler=sampler), run(pixart, sampler=sampler))


def test_a_chain_of_two_strength_zero_nodes_is_bit_identical_to_no_node(pixart, vector):
    chained = pixart
    for operator, parameters in ZERO:
        chained = tiny.steered(chained, vector, operator=operator, **parameters)
    assert torch.equal(run(chained), run(pixart))


def test_strength_zero_after_a_steering_is_bit_identical_to_that_steering(pixart, vector):
    steered = tiny.steered(pixart, vector)
    assert torch.equal(run(tiny.steered(steered, vector, operator="suppress", strength=0.0)), run(steered))


# Nothing is left behind


def test_no_hook_remains_after_success(pixart, vector):
    steered = tiny.steered(pixart, vector)
    run(steered)
    assert tiny.hook_count(steered) == 0


@pytest.mark.parametrize("error", [RuntimeError, comfy.model_management.InterruptProcessingException])
def test_no_hook_remains_after_an_error_inside_the_model(pixart, vector, error):
    steered, calls = tiny.steered(pixart, vector), []

    def fail_in_the_third_call(*_):
        calls.append(tiny.hook_count(steered) - 1)  # this one is a hook too
        if len(calls) == 3:
            raise error()

    before, last_block = run(steered), steered.model.diffusion_model.blocks[-1]
    handle = last_block.register_forward_pre_hook(fail_in_the_third_call)
    try:
        with pytest.raises(error):
            run(steered)
    finally:
        handle.remove()
    assert calls == [len(SITES)] * 3
    assert tiny.hook_count(steered) == 0
    assert torch.equal(run(steered), before)


def test_no_hook_remains_after_comfyuis_interrupt(pixart, vector):
    steered = tiny.steered(pixart, vector)
    handle = steered.model.diffusion_model.blocks[1].register_forward_pre_hook(
        lambda *_: comfy.model_management.interrupt_current_processing()
    )
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(steered)
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert tiny.hook_count(steered) == 0


def test_no_hook_remains_after_an_error_of_the_packs_own(pixart, monkeypatch):
    monkeypatch.setattr(patch, "check_fits", lambda *_: None)
    wrong = tiny.steered(pixart, tiny.vector(pixart, width=32))
    with pytest.raises(MedSteerError, match=r"'blocks.0.cross_attn.proj'.*\(2, 16, 48\).*32"):
        run(wrong)
    assert tiny.hook_count(pixart) == 0


def test_a_run_leaves_its_state_in_no_model_options(pixart, vector):
    steered = tiny.steered(pixart, vector)
    before = set(steered.model_options["transformer_options"])
    run(steered)
    assert set(steered.model_options["transformer_options"]) == before


# Models do not disturb each other


def test_unsteered_steered_unsteered_gives_equal_first_and_third(pixart, vector):
    first, steered, third = run(pixart), run(tiny.steered(pixart, vector)), run(pixart)
    assert torch.equal(first, third)
    assert (steered - first).abs().mean() > 0.01


def test_two_steered_clones_do_not_disturb_each_other(pixart, vector):
    alone = [run(tiny.steered(pixart, vector)), run(tiny.steered(pixart, tiny.vector(pixart, seed=1), sites="1"))]
    one, other = tiny.steered(pixart, vector), tiny.steered(pixart, tiny.vector(pixart, seed=1), sites="1")
    assert [torch.equal(run(model), alone[i]) for i, model in [(0, one), (1, other), (0, one)]] == [True] * 3
    assert not torch.allclose(alone[0], alone[1], atol=0.01)


def test_a_clone_steered_further_leaves_the_first_as_it_was(pixart, vector):
    once = tiny.steered(pixart, vector, sites="0")
    twice = tiny.steered(once, vector, sites="2")
    assert [len(patch.plan_of(model).steerings) for model in (pixart, once, twice)] == [0, 1, 2]
    assert changed_sites(once) == {SITES[0]}
    assert changed_sites(twice) == {SITES[0], SITES[2]}


# Batches and samplers


@pytest.mark.parametrize("indices", [[0, 1, 2], [4, 7]])
def test_a_batch_equals_its_images_made_one_by_one(pixart, vector, indices):
    steered = tiny.steered(pixart, vector)
    batch = run(steered, size=tiny.latent(batch=len(indices), batch_index=indices))
    singles = torch.cat([run(steered, size=tiny.latent(batch_index=[index])) for index in indices])
    assert (batch - singles).abs().max() < 1e-5
    assert (batch[0] - batch[1]).abs().mean() > 0.1


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpm_2", "dpmpp_2s_ancestral"])
def test_other_samplers_steer_at_every_call_and_repeat_for_one_seed(pixart, vector, sampler):
    steered = tiny.steered(pixart, vector)
    with tiny.spying(pixart, positive=POSITIVE, negative=NEGATIVE) as rows:
        first = run(steered, sampler=sampler)
    assert {row.changed for row in rows} == {True}
    assert torch.equal(run(steered, sampler=sampler), first)
    assert torch.isfinite(first).all()
    assert (first - run(pixart, sampler=sampler)).abs().mean() > 0.01


def direction_at(vector, site, sigma):
    """(C,) between the recorded steps, linear in log sigma and renormalised, written out once more."""
    known = vector.sigmas.log()
    place = min(max(math.log(sigma), float(known[-1])), float(known[0]))
    above = max(index for index, value in enumerate(known.tolist()) if value >= place)
    below = min(above + 1, len(known) - 1)
    weight = float((known[above] - place) / (known[above] - known[below])) if below > above else 0.0
    first, second = vector.sites[site].directions[[above, below], 0]
    mixed = (1 - weight) * first + weight * second
    return mixed / mixed.norm()


@pytest.mark.parametrize(("sampler", "steps"), [("euler", 20), ("euler", 30), ("heun", 10)])
def test_a_vector_of_another_schedule_steers_by_sigma(pixart, sampler, steps):
    vector = tiny.vector(pixart, steps=20)
    with tiny.spying(pixart, positive=POSITIVE, negative=NEGATIVE) as rows:
        result = run(tiny.steered(pixart, vector), sampler=sampler, steps=steps)
    assert torch.isfinite(result).all()
    between = {row.sigma for row in rows} - set(vector.sigmas.tolist())
    assert len(between) > steps / 2 or steps == 20
    for row in rows:
        direction = direction_at(vector, row.site, row.sigma)
        expected = row.raw - (row.raw @ direction)[:, None] * direction
        torch.testing.assert_close(row.out, expected, rtol=1e-5, atol=1e-5)


# Where and when


def changed_sites(model):
    with tiny.spying(model, positive=POSITIVE, negative=NEGATIVE) as rows:
        run(model)
    return {row.site for row in rows if row.changed}


def changed_levels(model, steps=10):
    with tiny.spying(model, positive=POSITIVE, negative=NEGATIVE) as rows:
        run(model, steps=steps)
    return {row.sigma for row in rows if row.changed}


@pytest.mark.parametrize(("sites", "expected"), [("all", SITES), ("1", SITES[1:2]), ("blocks.[02]*", SITES[::2])])
def test_only_the_chosen_sites_change(pixart, vector, sites, expected):
    assert changed_sites(tiny.steered(pixart, vector, sites=sites)) == set(expected)


def test_a_window_steers_only_the_steps_inside_and_two_halves_make_a_whole(pixart, vector):
    middle = pixart.get_model_object("model_sampling").percent_to_sigma(0.5)
    levels = sampling.schedule(pixart, 10, "euler", "normal").sigmas[:-1].tolist()
    early = changed_levels(tiny.steered(pixart, vector, end=0.5))
    late = changed_levels(tiny.steered(pixart, vector, start=0.5))
    assert early == {level for level in levels if level > middle}
    assert late == {level for level in levels if level <= middle}
    assert early and late and early | late == set(levels)


def test_a_window_without_a_step_is_refused_before_the_model_runs(pixart, vector):
    steered = tiny.steered(pixart, vector, start=0.5, end=0.5)
    with tiny.spying(pixart, positive=POSITIVE, negative=NEGATIVE) as rows:
        with pytest.raises(MedSteerError, match="No step of this schedule falls into the steering window"):
            run(steered)
    assert rows == []


def test_a_window_that_ends_before_it_starts_is_refused(pixart, vector):
    with pytest.raises(MedSteerError, match="start_percent is 0.8 and end_percent is 0.2"):
        tiny.steered(pixart, vector, start=0.8, end=0.2)


# Vectors and strengths that don't fit


def test_a_vector_of_other_sites_is_refused_by_name(pixart):
    foreign = tiny.vector(pixart, names=["layers.0.out", "layers.1.out"])
    with pytest.raises(MedSteerError, match=r"2 sites and the model has 3.*'layers.0.out'"):
        tiny.steered(pixart, foreign)


def test_a_vector_of_a_shallower_model_is_refused_even_for_sites_that_both_have(pixart):
    with pytest.raises(MedSteerError, match=rf"2 sites and the model has 3.*'{SITES[2]}'"):
        tiny.steered(pixart, tiny.vector(pixart, names=SITES[:2]), sites="0")


def test_a_vector_of_another_width_is_refused_by_the_sites_name(pixart):
    with pytest.raises(MedSteerError, match=rf"'{SITES[0]}' has 32 channels in the vector and 48 in the model"):
        tiny.steered(pixart, tiny.vector(pixart, width=32))


def test_a_vector_of_other_weights_steers_with_a_warning(pixart, vector, caplog):
    other = tiny.model(seed=1)
    steered, note = steer.steer(other, vector, "ablate", {}, 0.0, 1.0, "all", "all")
    assert "Warning: the vector was extracted from other weights of this architecture" in note
    assert "other weights" in caplog.text
    assert (run(steered) - run(other)).abs().mean() > 0.01


def test_a_vector_of_the_same_model_steers_without_a_warning(pixart, vector):
    _steered, note = steer.steer(pixart, vector, "ablate", {}, 0.0, 1.0, "0-1", "positive")
    assert note == "ablate at 2 of 3 sites, rows positive"


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_finite_number_is_refused(pixart, vector, strength):
    with pytest.raises(MedSteerError, match=f"strength is {strength}"):
        tiny.steered(pixart, vector, operator="suppress", strength=strength)


def test_latents_that_are_not_finite_are_an_error(pixart, vector):
    sites = {name: dataclasses.replace(site, gaps=1e30 * site.gaps) for name, site in vector.sites.items()}
    steered = tiny.steered(pixart, dataclasses.replace(vector, sites=sites), operator="add", strength=1.0)
    with pytest.raises(
        MedSteerError, match="NaN or infinite latents, and without steering it does not. Lower the strength"
    ):
        run(steered)


# Mask, curve and a second vector


def with_more(model, vector, operator, parameters, *, start=0.0, end=1.0, **more):
    return steer.steer(model, vector, operator, parameters, start, end, "all", "all", **more)[0]


def test_a_white_mask_is_bit_identical_to_none_and_a_half_mask_is_between(pixart, vector):
    suppress = ("suppress", {"strength": 2.0})
    plain, free = run(pixart), run(with_more(pixart, vector, *suppress))
    assert torch.equal(run(with_more(pixart, vector, *suppress, mask=torch.ones(1, 64, 64))), free)
    left = torch.zeros(1, 64, 64)
    left[:, :, :32] = 1
    half = run(with_more(pixart, vector, *suppress, mask=left))
    change = (half - plain).abs().mean(dim=(0, 1, 2))
    assert change[:4].mean() > 1.5 * change[4:].mean()  # self-attention carries some of it over


def test_strength_zero_is_bit_identical_under_a_mask_a_curve_and_switch(pixart, vector):
    plain = run(pixart)
    mask = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    zero = ("suppress", {"strength": 0.0})
    for steered in (
        with_more(pixart, vector, *zero, mask=mask),
        with_more(pixart, vector, *zero, curve="bell"),
        with_more(pixart, vector, "switch", {"strength": 0.0}, target=tiny.vector(pixart, seed=4)),
    ):
        assert torch.equal(run(steered), plain)


def test_a_curve_goes_over_the_window(pixart):
    found = levels.curve(pixart, "fade in", 0.2, 0.8)
    sampling = pixart.get_model_object("model_sampling")
    for percent, gain in ((0.2, 0.0), (0.5, 0.5), (0.8, 1.0)):
        assert found.at(float(sampling.percent_to_sigma(percent))) == pytest.approx(gain, abs=0.02)
    bell = levels.curve(pixart, "bell", 0.0, 1.0)
    assert bell.at(float(sampling.percent_to_sigma(0.5))) == pytest.approx(1.0, abs=0.01)
    assert levels.curve(pixart, "constant", 0.0, 1.0) is None
    with pytest.raises(MedSteerError, match="no strength curve 'step'"):
        levels.curve(pixart, "step", 0.0, 1.0)


def test_a_curve_steers_less_than_the_constant_strength(pixart, vector):
    plain = run(pixart)
    change = [
        (run(with_more(pixart, vector, "suppress", {"strength": 2.0}, curve=curve)) - plain).abs().mean()
        for curve in ("constant", "fade out")
    ]
    assert 0 < change[1] < change[0]


def test_switch_needs_a_target_of_this_model(pixart, vector):
    with pytest.raises(MedSteerError, match="needs a second vector"):
        with_more(pixart, vector, "switch", {"strength": 1.0})
    with pytest.raises(MedSteerError, match="has 32 channels in the vector and 48 in the model"):
        with_more(pixart, vector, "switch", {"strength": 1.0}, target=tiny.vector(pixart, width=32))
    steered = with_more(pixart, vector, "switch", {"strength": 1.0}, target=tiny.vector(pixart, seed=4))
    assert (run(steered) - run(pixart)).abs().mean() > 1e-3


def test_a_target_that_the_operator_does_not_use_is_said(pixart, vector):
    _model, note = steer.steer(
        pixart, vector, "suppress", {"strength": 1.0}, 0.0, 1.0, "all", "all", curve="bell", target=vector,
        mask=torch.ones(1, 8, 8),
    )  # fmt: skip
    assert "strength curve bell, masked (100% of the image)" in note
    assert "Warning: a target is connected, which suppress does not use." in note
