"""Counterfactuals by another prompt that takes over at the window's start, alone and beside steering."""

from dataclasses import replace

import comfy.sample
import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.patching.levels import window
from medsteer_pack.medsteer_core.host.patching.steer import steer
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.host.sampling.counterfactual import CONCEPT, PREDICTION, PairRequest, sample_pair
from medsteer_pack.medsteer_core.host.sampling.pair_request import IN_MASK
from medsteer_pack.medsteer_core.steering.recipes import RECIPES
from medsteer_pack.medsteer_core.steering.token_map import prediction_map, smoothed
from medsteer_pack.nodes.sampler import CounterfactualSampler

STEPS, START = 8, 0.5


def request(model, *, sampler="euler", batch=2, other=3, cfg=3.0, **changes):
    schedule = sampling.schedule(model, STEPS, sampler, "normal")
    fields = {"counterfactual": tiny.cond(other), "start_percent": START, **changes}
    return PairRequest(tiny.cond(1), tiny.cond(2), tiny.latent(batch=batch), 11, cfg, schedule, **fields)


def separate(model, sampler="euler"):
    return tiny.run(model, tiny.cond(1), tiny.cond(2), steps=STEPS, cfg=3.0, sampler=sampler, seed=11,
                    size=tiny.latent(batch=2))  # fmt: skip


def first_step(model):
    """The first step at which the other prompt is there."""
    sigmas = sampling.schedule(model, STEPS, "euler", "normal").sigmas
    here = window(model, START, 1.0)
    return next(step for step, sigma in enumerate(sigmas) if float(sigma) in here), sigmas


def switched(model, other, sampler="euler"):
    """The same by hand: two samplers, one after the other, with a prompt each."""
    step, sigmas = first_step(model)
    empty, noise = tiny.latent(batch=2)["samples"], comfy.sample.prepare_noise(tiny.latent(batch=2)["samples"], 11)
    method = comfy.samplers.sampler_object(sampler)
    parts = (noise, tiny.cond(1), empty, sigmas[: step + 1]), (torch.zeros_like(noise), other, None, sigmas[step:])
    latents = empty
    for drawn, positive, start, levels in parts:
        latents = comfy.sample.sample_custom(
            model, drawn, 3.0, method, levels, positive, tiny.cond(2), latents if start is None else start, seed=11,
            disable_pbar=True,
        )  # fmt: skip
    return latents


def test_it_is_a_switch_of_the_prompt_at_the_windows_start(pixart):
    pair = sample_pair(pixart, request(pixart))
    assert torch.equal(pair.factual, separate(pixart))
    torch.testing.assert_close(pair.counterfactual, switched(pixart, tiny.cond(3)), rtol=1e-3, atol=1e-3)
    assert (pair.counterfactual - pair.factual).abs().mean() > 1e-2
    assert "the counterfactual prompt from counterfactual_start 0.5 on" in pair.summary


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "lcm", "euler_ancestral"])
def test_with_other_samplers(pixart, sampler):
    pair = sample_pair(pixart, request(pixart, sampler=sampler, lock=PREDICTION, threshold=0.8))
    assert torch.equal(pair.factual, separate(pixart, sampler))
    outside = pair.mask[:, None, ::8, ::8].expand_as(pair.factual) == 0
    assert outside.any() and torch.equal(pair.counterfactual[outside], pair.factual[outside])
    assert (pair.counterfactual - pair.factual)[~outside].abs().mean() > 1e-3
    assert pair.mask_source == PREDICTION and pair.concept_map.amax() == 1.0


def test_it_costs_its_window_and_the_lock_half_a_call_at_a_few_steps(pixart):
    step, _sigmas = first_step(pixart)
    plain = tiny.rows_of(pixart, lambda: separate(pixart))
    share = (STEPS - step) / STEPS
    assert tiny.rows_of(pixart, lambda: sample_pair(pixart, request(pixart))) == plain * (1 + share)
    locked = request(pixart, lock=PREDICTION)
    assert tiny.rows_of(pixart, lambda: sample_pair(pixart, locked)) == plain * (1 + share) + 3 * 2  # 3 calls, 2 images
    assert f"cost: {1 + share + 1.5 / STEPS:.2f} times one image" in sample_pair(pixart, locked).summary


@pytest.mark.parametrize("lock", ["none", PREDICTION])
def test_the_same_prompt_gives_the_factual_and_computes_nothing(pixart, lock):
    same = request(pixart, other=1, lock=lock)
    pair = sample_pair(pixart, same)
    assert torch.equal(pair.counterfactual, pair.factual) and torch.equal(pair.factual, separate(pixart))
    assert tiny.rows_of(pixart, lambda: sample_pair(pixart, same)) == tiny.rows_of(pixart, lambda: separate(pixart))
    assert "the same prompt" in pair.summary and pair.records[0]["changes_nothing"]


def test_steering_may_act_too(pixart):
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=2.0, start=0.2)
    both = sample_pair(steered, request(steered))
    prompt, steering = sample_pair(pixart, request(pixart)), sample_pair(steered, request(steered, counterfactual=None))
    assert torch.equal(both.factual, prompt.factual)
    for other in (prompt, steering):
        assert (both.counterfactual - other.counterfactual).abs().mean() > 1e-2
    named = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=2.0, start=0.6, rows="positive")
    late = sample_pair(named, request(named))  # after the takeover the other prompt's rows are the positive ones
    assert (late.counterfactual - prompt.counterfactual).abs().mean() > 1e-2
    assert "(suppress, strength 2; the counterfactual prompt" in late.summary
    twice = sample_pair(named, request(named, multiples=(0.5, 1.5)))
    assert "(suppress, strength 1, 3; the counterfactual prompt" in twice.summary


def test_strengths_without_a_steer_are_told(pixart):
    told = sample_pair(pixart, request(pixart, multiples=(2.0,))).summary
    assert "no Steer leads to this model: they do nothing" in told
    assert "no Steer leads" not in sample_pair(pixart, request(pixart)).summary


def test_the_tokens_of_its_mask_will_do(pixart):
    mask = torch.zeros(1, 8, 8)
    mask[:, :4, :4] = 1
    pair = sample_pair(pixart, request(pixart, mask=mask, computed_tokens=IN_MASK))
    assert "25% of the tokens computed" in pair.summary
    changed = (pair.counterfactual - pair.factual).abs().amax(dim=1) > 0
    assert torch.equal(changed, mask.bool().expand(2, 8, 8))


def test_a_model_that_cannot_be_steered_can_have_another_prompt(pixart, monkeypatch):
    from medsteer_pack.medsteer_core.host.patching import sites

    monkeypatch.setattr(sites, "FAMILIES", ())
    pair = sample_pair(pixart, request(pixart, lock=PREDICTION, computed_tokens=IN_MASK))
    assert torch.equal(pair.factual, separate(pixart)) and "can't do with some" in pair.summary


def test_what_does_not_fit_is_refused(pixart):
    with pytest.raises(MedSteerError, match="the model is not steered. Set lock to 'prediction difference'"):
        sample_pair(pixart, request(pixart, lock=CONCEPT))
    steered = tiny.steered(pixart, tiny.vector(pixart))
    with pytest.raises(MedSteerError, match="no counterfactual prompt is connected. Set lock to 'concept map'"):
        sample_pair(steered, request(steered, lock=PREDICTION, counterfactual=None))
    with pytest.raises(MedSteerError, match=r"No step of this schedule comes after counterfactual_start \(1\)"):
        sample_pair(pixart, request(pixart, start_percent=1.0))


def test_the_record_says_which_prompt_and_from_where(pixart):
    asked = replace(request(pixart, batch=1), texts={"positive": "polyps", "counterfactual": "normal cecum"})
    (record,) = sample_pair(pixart, asked).records
    assert record["made"]["prompts"]["counterfactual"]["text"] == "normal cecum"
    assert record["made"]["counterfactual_start"] == START and record["made"]["steering"] == []
    assert not record["changes_nothing"]
    (old,) = sample_pair(tiny.steered(pixart, tiny.vector(pixart)),
                         request(pixart, batch=1, counterfactual=None)).records  # fmt: skip
    assert "counterfactual" not in old["made"]["prompts"] and "counterfactual_start" not in old["made"]


def test_the_node_takes_a_prompt_in_the_place_of_steering(pixart):
    result = CounterfactualSampler.PREPARE_CLASS_CLONE(None).execute(
        model=pixart, positive=tiny.cond(1), negative=tiny.cond(2), latent_image=tiny.latent(), seed=3, steps=STEPS,
        cfg=3.0, sampler_name="euler", scheduler="normal", strengths="1", lock=PREDICTION, lock_threshold=0.3,
        lock_dilation=1, counterfactual=tiny.cond(3), counterfactual_start=START, computed_tokens=IN_MASK,
    ).result  # fmt: skip
    assert not torch.equal(result[0]["samples"], result[1]["samples"])
    assert "mask_source: prediction difference" in result[4] and "tokens computed" in result[4]


def test_a_prediction_map_is_relative_and_ends_at_one():
    zero, one = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    one[0, :, 0, 1] = 2.0
    one[0, :, 1, 1] = 1.0
    assert prediction_map([(zero, one), (zero, 10 * one)])[0].tolist() == [[0.0, 1.0], [0.0, 0.5]]
    assert not prediction_map([(zero, zero)]).any()


def test_a_smoothed_map_is_rounder_and_ends_at_one():
    maps = torch.zeros(1, 5, 5)
    maps[0, 2, 2] = 1.0
    once = smoothed(maps, 1)
    assert once[0, 2].tolist() == [0.0, 0.5, 1.0, 0.5, 0.0] and once[0, 1, 1] == 0.25
    assert smoothed(maps, 0) is maps and not smoothed(torch.zeros(1, 3, 3), 2).any()
    with pytest.raises(MedSteerError, match="lock_smoothing is -1"):
        smoothed(maps, -1)


def test_a_smoothed_lock_says_so_in_its_record(pixart):
    pair = sample_pair(pixart, request(pixart, batch=1, lock=PREDICTION, smoothing=2, threshold=0.5))
    assert pair.records[0]["made"]["lock"]["smoothing"] == 2
    outside = pair.mask[:, None, ::8, ::8].expand_as(pair.factual) == 0
    assert torch.equal(pair.counterfactual[outside], pair.factual[outside])


def test_the_automatic_lock_is_the_concept_map_where_the_model_is_steered(pixart):
    steered = tiny.steered(pixart, tiny.vector(pixart))
    for model, expected in ((steered, CONCEPT), (pixart, PREDICTION)):
        pair, named = (sample_pair(model, request(model, lock=lock)) for lock in ("automatic", expected))
        assert pair.mask_source == expected and torch.equal(pair.counterfactual, named.counterfactual)
        assert [record["made"]["lock"] for record in pair.records] == [
            record["made"]["lock"] for record in named.records
        ]
    with pytest.raises(MedSteerError, match="The model is not steered, so there is no counterfactual"):
        sample_pair(pixart, request(pixart, lock="automatic", counterfactual=None))


def test_the_summary_warns_of_inputs_that_are_not_the_recipes_and_of_another_one_at_steer(pixart):
    focal = RECIPES["remove focal"].sampler
    as_it_says = request(pixart, recipe="remove focal", lock=focal["lock"], threshold=focal["lock_threshold"],
                         dilation=focal["lock_dilation"], start_percent=focal["counterfactual_start"])  # fmt: skip
    assert "recipe says" not in sample_pair(pixart, as_it_says).summary
    said = sample_pair(pixart, replace(as_it_says, lock="none")).summary
    assert "recipe says 'remove focal', but lock is none, the recipe's automatic. The inputs count." in said
    added, note = steer(
        pixart, tiny.vector(pixart), "suppress", {"strength": 1.0}, 0.0, 1.0, "all", "all", recipe="add"
    )
    assert "Warning: recipe says 'add', but" in note and "operator is suppress, the recipe's affine" in note
    assert "'remove focal' here and 'add' at Steer. Choose the same in both" in sample_pair(added, as_it_says).summary
