"""The factual image and its counterfactuals equal separate runs, the factual to the last bit, at fewer model rows."""

from dataclasses import replace

import comfy.k_diffusion.sampling as k_diffusion
import comfy.sample
import comfy.samplers
import pytest
import tiny
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from medsteer_pack.medsteer_core.endophantom.text import IGNORED
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.patching.patch import plan_of
from medsteer_pack.medsteer_core.host.patching.patch import steered as patch_steered
from medsteer_pack.medsteer_core.host.sampling import counterfactual
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.host.sampling.counterfactual import (
    CONCEPT,
    OPEN,
    PairRequest,
    multiples_of,
    sample_pair,
)
from medsteer_pack.medsteer_core.steering.token_map import (
    TokenChange,
    mask_for_latent,
    threshold_mask,
    to_pixels,
    token_grid,
)
from medsteer_pack.medsteer_core.vectors.schedule import SigmaWindow
from medsteer_pack.nodes.sampler import CounterfactualSampler

DETERMINISTIC = ["euler", "heun", "dpm_2", "lms", "dpmpp_2m", "uni_pc", "ipndm", "deis", "res_multistep", "ddim"]
STOCHASTIC = ["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m_sde",
              "dpmpp_3m_sde", "ddpm", "lcm", "er_sde", "seeds_2", "sa_solver"]  # fmt: skip


@pytest.fixture(scope="module")
def double(pixart):
    """A float64 model: a batch then equals singles up to rounding that does not matter here."""
    model = tiny.model()
    model.model.diffusion_model.double().dtype = torch.float64
    return model


def request(model, *, sampler="euler", steps=4, latent=None, cfg=3.0, **changes):
    schedule = sampling.schedule(model, steps, sampler, "normal")
    return PairRequest(tiny.cond(1), tiny.cond(2), latent or tiny.latent(batch=2), 11, cfg, schedule, **changes)


def separate(model, *, sampler="euler", steps=4, latent=None, cfg=3.0):
    """What KSampler gives with the same inputs."""
    size = latent or tiny.latent(batch=2)
    return tiny.run(model, tiny.cond(1), tiny.cond(2), steps=steps, cfg=cfg, sampler=sampler, seed=11, size=size)


def close(one, other):
    return float((one - other).abs().max()) < 1e-5 * float(other.abs().max())


@pytest.mark.parametrize("sampler", DETERMINISTIC + STOCHASTIC)
def test_it_equals_two_separate_runs(double, sampler):
    steered = tiny.steered(double, tiny.vector(double), operator="suppress", strength=2.0, start=0.3)
    pair = sample_pair(steered, request(steered, sampler=sampler))
    assert torch.equal(pair.factual, separate(double, sampler=sampler))
    assert close(pair.counterfactual, separate(steered, sampler=sampler))
    assert (pair.factual - pair.counterfactual).abs().mean() > 1e-3


def test_in_float32_as_well(pixart):
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=2.0)
    pair = sample_pair(steered, request(steered))
    assert torch.equal(pair.factual, separate(pixart)) and torch.equal(pair.counterfactual, separate(steered))


# dpm_adaptive chooses its steps by what it sees, and ar_video keeps what it has seen in the model.
SHARING = [name for name in sampling.SAMPLERS if name not in ("dpm_adaptive", "ar_video")]


@pytest.mark.parametrize("lock", [OPEN, CONCEPT])
@pytest.mark.parametrize("sampler", SHARING)
def test_the_factual_is_ksamplers_with_every_sampler(pixart, sampler, lock):
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=2.0, start=0.3)
    pair = sample_pair(steered, request(steered, sampler=sampler, lock=lock, threshold=0.8))
    assert torch.equal(pair.factual, separate(pixart, sampler=sampler))
    assert (pair.factual - pair.counterfactual).abs().mean() > 1e-4
    if lock == OPEN:
        assert torch.equal(pair.counterfactual, separate(steered, sampler=sampler))
    else:
        outside = pair.mask[:, None, ::8, ::8].expand_as(pair.factual) == 0
        assert torch.equal(pair.counterfactual[outside], pair.factual[outside])


def test_noise_that_a_sampler_draws_without_a_seed_of_its_own_is_the_same_in_both(pixart):
    """Churn draws from torch's own random numbers, which a run begins with where KSampler begins."""
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=0.5, start=0.3)
    churned = comfy.samplers.ksampler("euler", {"s_churn": 0.5, "s_noise": 1.0})
    asked = request(steered)
    pair = sample_pair(steered, replace(asked, schedule=replace(asked.schedule, sampler=churned)))
    assert not torch.equal(pair.factual, separate(pixart))
    again = sample_pair(steered, replace(asked, schedule=replace(asked.schedule, sampler=churned)))
    assert torch.equal(pair.factual, again.factual) and torch.equal(pair.counterfactual, again.counterfactual)
    with torch.random.fork_rng():
        noise = Noise_RandomNoise(11).generate_noise({"samples": asked.latent["samples"]})
        alone = comfy.sample.sample_custom(
            pixart, noise, 3.0, churned, asked.schedule.sigmas, tiny.cond(1), tiny.cond(2), asked.latent["samples"],
            seed=11, disable_pbar=True,
        )  # fmt: skip
    assert torch.equal(pair.factual, alone)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_sde"])
def test_strength_zero_under_a_lock_is_bit_identical_too(pixart, sampler):
    """There is no concept map, since nothing would change; so nothing may."""
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=0.0)
    pair = sample_pair(steered, request(steered, sampler=sampler, lock=CONCEPT))
    plain = sample_pair(steered, request(steered, sampler=sampler))
    assert torch.equal(pair.factual, pair.counterfactual) and torch.equal(pair.factual, plain.factual)
    assert pair.mask_source == CONCEPT and not pair.mask.any() and not pair.concept_map.any()


def test_strength_zero_is_bit_identical_to_the_factual(pixart):
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=0.0)
    pair = sample_pair(steered, request(steered))
    assert torch.equal(pair.counterfactual, pair.factual)
    assert torch.equal(pair.factual, separate(pixart))
    assert float(pair.concept_map.abs().max()) == 0.0


def test_several_strengths_share_one_factual(double):
    vector = tiny.vector(double)
    steered = tiny.steered(double, vector, operator="suppress", strength=2.0)
    pair = sample_pair(steered, request(steered, multiples=(0.0, 0.5, 1.5)))
    assert pair.factual.shape[0] == 2 and pair.counterfactual.shape[0] == 6
    none, half, more = pair.counterfactual.chunk(3)
    assert close(none, pair.factual)
    for strength, part in ((1.0, half), (3.0, more)):
        assert close(part, separate(tiny.steered(double, vector, operator="suppress", strength=strength)))


def test_chained_steerings_and_named_rows(double):
    first = tiny.steered(double, tiny.vector(double), operator="suppress", strength=2.0, rows="positive")
    steered = tiny.steered(first, tiny.vector(double, seed=3), operator="add", strength=0.5, rows="negative")
    pair = sample_pair(steered, request(steered))
    assert close(pair.factual, separate(double)) and close(pair.counterfactual, separate(steered))


@pytest.mark.parametrize(("steps_before", "share"), [(0, 1.0), (5, 0.75), (8, 0.6)])
def test_a_counterfactual_costs_what_its_window_costs(pixart, steps_before, share):
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=2.0)
    sigmas = sampling.schedule(pixart, 10, "euler", "normal").sigmas
    steering = replace(plan_of(steered).steerings[0], window=SigmaWindow(float(sigmas[steps_before]), 0.0), span=None)
    steered = patch_steered(pixart, steering)
    two_runs = 2 * tiny.rows_of(pixart, lambda: separate(pixart, steps=10))
    for lock in (OPEN, CONCEPT):  # the map comes with the factual, at no extra run
        asked = request(steered, steps=10, lock=lock)
        assert tiny.rows_of(pixart, lambda asked=asked: sample_pair(steered, asked)) == share * two_runs
        assert f"cost: {2 * share:.2f} times one image" in sample_pair(steered, asked).summary
    many = request(steered, steps=10, multiples=(0.5, 1.0, 1.5))
    rows = (1 + 3 * (2 * share - 1)) * two_runs / 2
    assert tiny.rows_of(pixart, lambda: sample_pair(steered, many)) == pytest.approx(rows)


def test_the_model_is_left_as_it_was_after_success_error_and_interrupt(pixart, monkeypatch):
    before = separate(pixart)
    steered = tiny.steered(pixart, tiny.vector(pixart))
    first = sample_pair(steered, request(steered))
    for error in (RuntimeError("broken"), comfy.model_management.InterruptProcessingException()):

        def broken(*_args, error=error, **_kwargs):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(pixart.model.diffusion_model.blocks[1], "forward", broken)
            with pytest.raises(type(error)):
                sample_pair(steered, request(steered))
        assert tiny.hook_count(pixart) == 0
    assert torch.equal(separate(pixart), before)
    assert torch.equal(sample_pair(steered, request(steered)).counterfactual, first.counterfactual)


# Structure lock


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral", "dpmpp_2m_sde"])
def test_latents_outside_the_mask_are_bit_identical(pixart, sampler):
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=2.0)
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:5, 3:6] = 1
    pair = sample_pair(steered, request(steered, sampler=sampler, mask=mask))
    inside = mask.bool()[:, None].expand_as(pair.factual)
    assert torch.equal(pair.counterfactual[~inside], pair.factual[~inside])
    assert (pair.counterfactual - pair.factual)[inside].abs().mean() > 1e-3
    assert torch.equal(pair.mask, mask.expand(2, 8, 8).repeat_interleave(8, 1).repeat_interleave(8, 2))
    assert "mask_source: user, 14%" in pair.summary


def test_a_mask_that_is_white_locks_nothing(pixart):
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=2.0)
    free, white = (sample_pair(steered, request(steered, mask=mask)) for mask in (None, torch.ones(1, 64, 64)))
    assert torch.equal(free.counterfactual, white.counterfactual)


def test_the_concept_map_locks_where_little_would_change(pixart):
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=2.0)
    pair = sample_pair(steered, request(steered, lock=CONCEPT, threshold=0.8, dilation=0))
    small = pair.mask[:, ::8, ::8].bool()
    assert 0.0 < small.float().mean() < 0.9
    outside = ~small[:, None].expand_as(pair.factual)
    assert torch.equal(pair.counterfactual[outside], pair.factual[outside])
    assert pair.mask_source == CONCEPT and pair.concept_map.amax() == 1.0
    assert torch.equal(small, threshold_mask(pair.concept_map[:, ::8, ::8], 0.8, 0))


def test_the_concept_map_is_the_factuals_own(pixart):
    """The map of a pair is that of the factual alone, whatever strength its counterfactual has."""
    maps = [
        sample_pair(steered, request(steered, multiples=(multiple,))).concept_map
        for steered in [tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=2.0)]
        for multiple in (0.5, 1.0)
    ]
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-4, atol=1e-5)


# Refusals


def test_a_model_without_steering_is_refused(pixart):
    with pytest.raises(MedSteerError, match="not steered.*Connect a Steer node"):
        sample_pair(pixart, request(pixart))


def test_a_sampler_that_chooses_its_steps_is_refused_where_something_would_be_shared(pixart):
    late = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=3.0, start=0.1)
    with pytest.raises(MedSteerError, match="chooses its steps by what it sees"):
        sample_pair(late, request(late, sampler="dpm_adaptive", mask=torch.eye(8)[None]))
    whole = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=3.0)
    pair = sample_pair(whole, request(whole, sampler="dpm_adaptive"))
    assert torch.equal(pair.factual, separate(pixart, sampler="dpm_adaptive"))
    assert torch.equal(pair.counterfactual, separate(whole, sampler="dpm_adaptive"))


def test_a_sampler_that_keeps_what_it_saw_in_the_model_is_refused(pixart):
    steered = tiny.steered(pixart, tiny.vector(pixart))
    with pytest.raises(MedSteerError, match="ar_video keeps what it has seen"):
        sample_pair(steered, request(steered, sampler="ar_video"))


def test_a_run_that_does_not_do_the_same_twice_is_found(pixart):
    """A sampler whose noise comes from nowhere: the counterfactual would begin elsewhere than the factual."""
    steered = tiny.steered(pixart, tiny.vector(pixart), start=0.5)
    draws = iter(range(100))

    def restless(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return k_diffusion.sample_euler(model, x + next(draws), sigmas, extra_args, callback, disable)

    asked = request(steered)
    with pytest.raises(MedSteerError, match="does not do the same twice"):
        schedule = replace(asked.schedule, sampler=comfy.samplers.KSAMPLER(restless))
        sample_pair(steered, replace(asked, schedule=schedule))


@pytest.mark.parametrize("text", ["", " , ", "one", "1;2", "nan", "1, inf"])
def test_strengths_that_are_no_numbers_are_refused(text):
    with pytest.raises(MedSteerError, match="numbers such as"):
        multiples_of(text)


def test_strengths_are_numbers_separated_by_commas():
    assert multiples_of("0.5, 1 ,-2,") == (0.5, 1.0, -2.0)
    assert multiples_of("0.5,1,1.5") == (0.5, 1.0, 1.5) and multiples_of("1,2,3") == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("text", ["1,5", " 0,5 ", "-1,5"])
def test_what_may_be_a_decimal_comma_is_refused(text):
    with pytest.raises(MedSteerError, match=r"one number or two. Write a decimal point \(1.5\)"):
        multiples_of(text)
    assert "one number or two" in CounterfactualSampler.validate_inputs(strengths=text)
    assert CounterfactualSampler.validate_inputs(strengths="1, 5") is True
    assert CounterfactualSampler.validate_inputs(strengths=None) is True  # linked


def test_words_that_the_model_ignores_are_told_of_in_the_summary(pixart):
    steered = tiny.steered(pixart, tiny.vector(pixart))
    positive = [[tiny.cond(1)[0][0], {IGNORED: ("polips",)}]]
    said = sample_pair(steered, replace(request(steered), positive=positive)).summary
    assert "Warning: EndoPhantom does not know 'polips' (did you mean 'polyps'?)" in said
    assert "does not know" not in sample_pair(steered, request(steered)).summary


def test_ablate_has_no_strength_to_multiply(pixart):
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="ablate")
    assert sample_pair(steered, request(steered)).counterfactual.shape[0] == 2
    with pytest.raises(MedSteerError, match="ablate has no strength"):
        sample_pair(steered, request(steered, multiples=(0.5,)))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8)])
def test_a_mask_of_another_shape_is_refused(pixart, shape):
    steered = tiny.steered(pixart, tiny.vector(pixart))
    with pytest.raises(MedSteerError, match="The mask has shape"):
        sample_pair(steered, request(steered, mask=torch.ones(shape)))


# Maps and masks


def test_tokens_lie_on_the_latents_grid():
    assert token_grid(16, 8, 8) == (4, 4)
    assert token_grid(64, 8, 8) == (8, 8)
    assert token_grid(15, 5, 9) == (3, 5)  # padded to 6 x 10
    with pytest.raises(MedSteerError, match="image models only"):
        token_grid(17, 8, 8)
    values = torch.arange(6.0)[None]
    assert to_pixels(values, 4, 6)[0].tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2


def test_the_change_of_a_token_is_relative_and_its_map_ends_at_one():
    changes = TokenChange()
    before = torch.ones(1, 4, 9)
    after = before.clone()
    after[0, 1] += 1.0
    after[0, 2] += 0.5
    changes.observe(before, after)
    assert changes.maps(2, 2)[0].tolist() == [[0.0, 1.0], [0.5, 0.0]]


def test_a_masks_pixels_count_when_any_part_of_them_is_covered():
    mask = torch.zeros(1, 64, 64)
    mask[0, 9, 17] = 1  # one pixel of 8 x 8
    small = mask_for_latent(mask, 2, 8, 8)
    assert small.sum() == 2 and bool(small[1, 1, 2])


def test_growing_a_mask_adds_a_border():
    maps = torch.zeros(1, 7, 7)
    maps[0, 3, 3] = 1
    assert threshold_mask(maps, 0.5, 0).sum() == 1
    assert threshold_mask(maps, 0.5, 1).sum() == 9
    with pytest.raises(MedSteerError, match="mask_threshold"):
        threshold_mask(maps, -0.1, 0)


def test_the_node_gives_latents_masks_and_words(pixart):
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=2.0)
    result = CounterfactualSampler.PREPARE_CLASS_CLONE(None).execute(
        model=steered, positive=tiny.cond(1), negative=tiny.cond(2), latent_image=tiny.latent(), seed=3, steps=4,
        cfg=3.0, sampler_name="euler", scheduler="normal", strengths="1", lock=counterfactual.OPEN,
        lock_threshold=0.3, lock_dilation=1,
    ).result  # fmt: skip
    factual, other, concept_map, mask, summary, (record,) = result
    assert record["made"]["seed"] == 3 and record["made"]["steering"][0]["operator"] == "suppress"
    assert factual["samples"].shape == other["samples"].shape == (1, 4, 8, 8)
    assert concept_map.shape == mask.shape == (1, 64, 64) and "mask_source: none" in summary


def test_a_counterfactual_that_is_the_factual_is_handed_on_with_a_word(pixart):
    """A node that answers every call alike undoes whatever is steered."""
    steered = tiny.steered(pixart, tiny.vector(pixart))
    same = steered.clone()
    same.set_model_unet_function_wrapper(lambda apply_model, arguments: (
        apply_model(arguments["input"], arguments["timestep"], **arguments["c"]) * 0 + arguments["input"] * 0.5
    ))  # fmt: skip
    said = sample_pair(same, request(same)).summary
    assert "2 of 2 counterfactuals are the factual image to the last bit (number 1, 2), although" in said
    still = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=0.0)
    for model in (steered, still):
        assert "to the last bit" not in sample_pair(model, request(model)).summary
