"""What a run makes of its steering when it starts: another schedule than Steer saw, stages, whose fault a NaN is."""

from dataclasses import replace

import pytest
import tiny
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.patching import calls
from medsteer_pack.medsteer_core.host.patching.levels import on_schedule
from medsteer_pack.medsteer_core.host.patching.patch import plan_of
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.host.sampling.counterfactual import PairRequest, sample_pair

import nodes

POSITIVE, NEGATIVE = tiny.cond(1), tiny.cond(2)


@pytest.fixture
def said(monkeypatch):
    heard = []
    monkeypatch.setattr(calls, "say_on_running_node", heard.append)
    return heard


def rescheduled(model):
    return ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]


@pytest.mark.parametrize("curve", ["constant", "fade in"])
def test_the_window_is_that_of_the_schedule_at_the_run_wherever_the_node_stands_that_changes_it(pixart, curve):
    from medsteer_pack.medsteer_core.host.patching import steer

    def steered(model):
        return steer.steer(model, tiny.vector(pixart), "suppress", {"strength": 2.0}, 0.3, 0.9, "all", "all",
                           curve=curve)[0]  # fmt: skip

    before, after = steered(rescheduled(pixart)), rescheduled(steered(pixart))
    windows = [plan_of(model).steerings[0].window for model in (before, after)]
    assert windows[0] != windows[1], "the schedules do not differ"
    assert on_schedule(plan_of(after), after).steerings[0].window == windows[0]
    results = [tiny.run(model, POSITIVE, NEGATIVE, steps=10) for model in (before, after)]
    assert torch.equal(*results)

    def pair(model):
        schedule = sampling.schedule(model, 10, "euler", "normal")
        return sample_pair(model, PairRequest(POSITIVE, NEGATIVE, tiny.latent(), 7, 4.0, schedule))

    one, other = pair(before), pair(after)
    assert torch.equal(one.counterfactual, other.counterfactual) and not torch.equal(one.factual, one.counterfactual)
    assert one.records == other.records


def staged(model, first, second, cut=5, steps=10):
    """Two of core's advanced samplers, one after the other, each with a model of its own."""
    node, shape = nodes.KSamplerAdvanced(), tiny.latent()
    common = (steps, 4.0, "euler", "normal", POSITIVE, NEGATIVE)
    half = node.sample(first, "enable", 7, *common, shape, 0, cut, "enable")[0]
    return node.sample(second, "disable", 7, *common, half, cut, 10000, "disable")[0]["samples"]


@pytest.mark.parametrize(("window", "unsteered"), [((0.7, 1.0), "first"), ((0.0, 0.2), "second")])
def test_a_stage_that_the_window_does_not_reach_runs_unsteered_and_says_so(pixart, said, window, unsteered):
    steered = tiny.steered(pixart, tiny.vector(pixart), start=window[0], end=window[1])
    models = {"first": [pixart, steered], "second": [steered, pixart]}[unsteered]
    expected = staged(pixart, *models)
    assert said == []
    assert torch.equal(staged(pixart, steered, steered), expected)
    (text,) = said
    assert text.startswith("Not steered in this stage: its noise levels (")
    assert not torch.equal(expected, staged(pixart, pixart, pixart))


def test_what_no_stage_can_reach_is_still_an_error(pixart, said):
    late, early = (tiny.steered(pixart, tiny.vector(pixart), start=a, end=b) for a, b in ((0.5, 0.52), (0.0, 0.1)))
    with pytest.raises(MedSteerError, match="No step of this schedule falls into the steering window"):
        tiny.run(late, POSITIVE, NEGATIVE, steps=4)
    part = nodes.KSampler()
    with pytest.raises(MedSteerError, match="No step of this schedule falls into the steering window"):
        part.sample(early, 7, 4, 4.0, "euler", "normal", POSITIVE, NEGATIVE, tiny.latent(), denoise=0.3)
    assert said == []


def broken(model, after=0):
    """A clone that answers NaN from its call number ``after`` on, as a model in a dtype that it can't do."""
    counted = [0]

    def call(apply_model, arguments):
        counted[0] += 1
        result = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        return result * torch.nan if counted[0] > after else result

    clone = model.clone()
    clone.set_model_unet_function_wrapper(call)
    return clone, counted


def test_a_model_that_gives_nan_by_itself_is_not_the_strengths_fault(pixart):
    model, counted = broken(pixart)
    with pytest.raises(
        MedSteerError, match="model itself gives NaN.*in float32: a black image. The strength is not to"
    ):
        tiny.run(tiny.steered(model, tiny.vector(pixart)), POSITIVE, NEGATIVE, steps=6)
    assert counted[0] == 7, "the second look goes on though its first step told all"
    assert tiny.hook_count(pixart) == 0


def far(model):
    """The model steered so far that nothing finite is left."""
    vector = tiny.vector(model)
    sites = {name: replace(site, gaps=torch.full_like(site.gaps, 1e38)) for name, site in vector.sites.items()}
    return tiny.steered(model, replace(vector, sites=sites), operator="add", strength=1e6)


def test_steering_that_gives_nan_is_the_strengths_fault(pixart):
    with pytest.raises(MedSteerError, match="and without steering it does not. Lower the strength"):
        tiny.run(far(pixart), POSITIVE, NEGATIVE)


def test_a_pair_tells_them_apart_too(pixart):
    schedule = sampling.schedule(pixart, 4, "euler", "normal")
    asked = PairRequest(POSITIVE, NEGATIVE, tiny.latent(), 7, 4.0, schedule)
    with pytest.raises(MedSteerError, match="model itself gives NaN"):
        sample_pair(tiny.steered(broken(pixart)[0], tiny.vector(pixart)), asked)
    with pytest.raises(MedSteerError, match="without steering it does not. Lower the strength"):
        sample_pair(far(pixart), asked)
