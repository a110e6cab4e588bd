"""Steering is right beside whatever else is in the graph: for each company what holds for a model alone."""

from dataclasses import replace

import comfy.model_management
import comfy.sample
import company
import families
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from comfy_extras.nodes_torch_compile import TorchCompileModel
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.patching import steer
from medsteer_pack.medsteer_core.host.patching.families import FAMILIES
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.host.sampling.counterfactual import CONCEPT, OPEN, PairRequest, sample_pair

import nodes as core

ERRORS = [RuntimeError, comfy.model_management.InterruptProcessingException]
TWO = (0, 1)


@pytest.fixture(scope="module", params=list(company.ALL))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def scene(name):
    """A model with its company. The tests of a company share it, since nothing may ever change it."""
    return company.ALL[name](False)


@pytest.fixture(scope="module")
def exact(name):
    """The same in float64, where the family can: a batch then equals its images up to rounding that is no matter."""
    return company.ALL[name](True)


@pytest.fixture(scope="module")
def vector(scene):
    return families.vector(scene.model)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request):
    yield
    for fixture in {"scene", "exact"} & set(request.fixturenames):
        model = request.getfixturevalue(fixture).model
        assert tiny.hook_count(model) == 0
        assert not tiny.is_steered(model)


def error_of(one, other):
    """The largest difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def pair_of(scene, model, images=TWO, **changes):
    """What Counterfactual Sampler gives for the images that `Scene.run` makes with this model."""
    schedule = sampling.schedule(model, scene.steps, "euler", "normal")
    latent = scene.small.empty(len(images), batch_index=list(images))
    texts = scene.texts["positive"], scene.texts["negative"]
    return sample_pair(model, PairRequest(*texts, latent, 7, scene.cfg, schedule, **changes))


def is_two_runs(scene, pair, model, images=TWO):
    """Whether both halves are those of two separate runs, the factual to the last bit, and differ."""
    assert error_of(pair.counterfactual, pair.factual) > 1e-3
    assert torch.equal(pair.factual, scene.run(scene.model, images))
    return error_of(pair.counterfactual, scene.run(model, images)) < 1e-5


def test_every_family_has_company():
    assert {build(False).small.family for build in company.ALL.values()} == {family.name for family in FAMILIES}


def test_strength_zero_is_bit_identical_to_the_company_alone(scene, vector):
    still = tiny.steered(scene.model, vector, operator="suppress", strength=0.0)
    assert torch.equal(scene.run(still, TWO), scene.run(scene.model, TWO))


@pytest.mark.parametrize("rows", ["all", "positive", "middle", "negative"])
def test_only_the_named_rows_are_changed(scene, vector, rows):
    steered = tiny.steered(scene.model, vector, rows=rows)
    if rows not in ("all", *scene.seen):
        with pytest.raises(MedSteerError, match=f"rows '{rows}'"):
            scene.run(steered, TWO)
        return
    with scene.spying() as found:
        scene.run(steered, TWO)
    assert tiny.changed_by_name(found) == {name: {rows in ("all", name)} for name in scene.seen}


def test_it_changes_the_sample_and_queueing_again_gives_the_same(scene, vector):
    steered = tiny.steered(scene.model, vector)
    plain, changed = scene.run(scene.model, TWO), scene.run(steered, TWO)
    assert torch.isfinite(changed).all() and error_of(changed, plain) > 1e-3
    assert torch.equal(scene.run(scene.model, TWO), plain)
    assert torch.equal(scene.run(steered, TWO), changed)


def test_two_clones_do_not_disturb_each_other(scene, vector):
    def clones():
        other = families.vector(scene.model, seed=1)
        return tiny.steered(scene.model, vector, rows="positive"), tiny.steered(scene.model, other, sites="1")

    alone = [scene.run(clone) for clone in clones()]
    one, other = clones()
    again = scene.run(one), scene.run(other), scene.run(one)
    assert torch.equal(again[0], alone[0]) and torch.equal(again[1], alone[1]) and torch.equal(again[2], alone[0])
    assert error_of(*alone) > 1e-3


@pytest.mark.parametrize("error", ERRORS)
def test_no_hook_remains_after_an_error_or_an_interrupt_inside_the_model(scene, vector, error):
    steered, calls = tiny.steered(scene.model, vector), []

    def fail_in_the_second_call(*_):
        calls.append(tiny.hook_count(steered) - 1)  # this one is a hook too
        if len(calls) == 2:
            raise error()

    before = scene.run(steered)
    last = scene.model.model.diffusion_model.get_submodule(scene.small.sites[-1].rpartition(".")[0])
    handle = last.register_forward_pre_hook(fail_in_the_second_call)
    try:
        with pytest.raises(error):
            scene.run(steered)
    finally:
        handle.remove()
    assert calls == [len(scene.small.sites)] * 2
    assert tiny.hook_count(scene.model) == 0
    assert torch.equal(scene.run(steered), before)


@pytest.mark.parametrize("name", [name for name in company.ALL if name != "Mahiro"], scope="module")
def test_batches_of_two_three_and_five_equal_the_images_one_by_one(exact):
    steered = tiny.steered(exact.model, families.vector(exact.model), rows="positive")
    singles = torch.cat([exact.run(steered, (index,)) for index in range(5)])
    for count in (2, 3, 5):
        assert error_of(exact.run(steered, tuple(range(count))), singles[:count]) < 1e-5
    assert error_of(singles[1], singles[0]) > 0.1


@pytest.mark.parametrize(
    "name", [name for name in company.ALL if name not in (*company.UNPAIRED, *company.CACHES)], scope="module"
)
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_a_pair_equals_two_runs(exact, start):
    exact = replace(exact, steps=4)  # the first is before the later start
    steered = tiny.steered(exact.model, families.vector(exact.model), operator="suppress", strength=2.0, start=start)
    assert is_two_runs(exact, pair_of(exact, steered), steered)


# What is not the same for every company


@pytest.mark.parametrize("company_first", [True, False])
@pytest.mark.parametrize("build", [company.easycache, company.lazycache])
def test_a_cache_skips_model_calls_beside_steering(build, company_first):
    """In both orders of the nodes; the threshold of these scenes is one at which steps are skipped."""
    scene = build(False)
    model = tiny.steered(scene.model, families.vector(scene.model))
    if not company_first:
        add = company.add_easycache if build is company.easycache else company.add_lazycache
        plain = scene.small.model()
        model = add(tiny.steered(plain, families.vector(plain)))
    calls = []
    site = model.model.diffusion_model.get_submodule(scene.small.sites[0])
    handle = site.register_forward_hook(lambda *_: calls.append(1))
    result = scene.run(model)
    handle.remove()
    assert 0 < len(calls) < scene.steps
    assert error_of(result, scene.run(scene.model)) > 1e-3


@pytest.mark.parametrize("lock", [OPEN, CONCEPT])
@pytest.mark.parametrize("name", [name for name in company.ALL if name not in company.UNPAIRED], scope="module")
def test_the_factual_is_that_of_the_company_alone(name, scene, vector, lock):
    """Whatever is on the model, and although the steering's change is observed in that run."""
    if lock == CONCEPT and (name == "areas" or scene.small.empty(1)["samples"].ndim != 4):
        pytest.skip("maps are of whole images")
    steered = tiny.steered(scene.model, vector, operator="suppress", strength=2.0)
    pair = pair_of(scene, steered, lock=lock)
    assert torch.equal(pair.factual, scene.run(scene.model, TWO))
    assert torch.isfinite(pair.counterfactual).all() and error_of(pair.counterfactual, pair.factual) > 1e-3


@pytest.mark.parametrize("lock", [OPEN, CONCEPT])
@pytest.mark.parametrize("build", [company.mahiro, company.lazycache, company.controlnet, company.compiled])
def test_strength_zero_gives_the_factual_beside_company(build, lock):
    scene = build(False)
    still = tiny.steered(scene.model, families.vector(scene.model), operator="suppress", strength=0.0)
    pair = pair_of(scene, still, lock=lock)
    assert torch.equal(pair.counterfactual, pair.factual)
    assert torch.equal(pair.factual, scene.run(scene.model, TWO))


def test_weights_of_eight_bits_and_offloaded_ones_are_what_the_scenes_say():
    eight = company.fp8(False).model.model
    assert eight.get_dtype() == torch.float8_e4m3fn and eight.get_dtype_inference() == torch.float32
    scene, offloaded = company.low_vram(False), []
    network = scene.model.model
    handle = network.diffusion_model.register_forward_pre_hook(
        lambda *_: offloaded.append(network.model_lowvram and network.lowvram_patch_counter > 0)
    )
    scene.run(scene.model)
    handle.remove()
    assert offloaded and all(offloaded)


def test_the_compile_node_marks_its_models_as_the_scene_does():
    model = TorchCompileModel.execute(tiny.model(), "inductor").result[0]
    scene = company.compiled(False)
    marks = [list(each.wrappers[WrappersMP.APPLY_MODEL]) for each in (model, scene.model)]
    assert marks[0] == marks[1] == [COMPILE_KEY]


def mask_left(model, vector):
    mask = torch.zeros(1, 32, 48)
    mask[..., :24] = 1
    return steer.steer(model, vector, "ablate", {}, 0.0, 1.0, "all", "all", mask=mask)[0]


def test_a_mask_on_steer_and_an_area_are_refused_together():
    """A call for an area would take the mask of the whole image for its own."""
    scene = company.areas(False)
    with pytest.raises(MedSteerError, match="mask on Steer covers the whole image"):
        scene.run(mask_left(scene.model, families.vector(scene.model)))
    assert tiny.hook_count(scene.model) == 0


def test_masks_on_steer_are_one_or_one_for_each_image():
    """Two masks for one image would go to the negative rows and to the positive ones, one each."""
    scene = company.start(company.PIXART, False)
    masks, vector = torch.zeros(2, 4, 6), families.vector(scene.model)
    masks[0, :, :3] = masks[1, :, 3:] = 1

    def masked(mask):
        return steer.steer(scene.model, vector, "ablate", {}, 0.0, 1.0, "all", "all", mask=mask)[0]

    both = scene.run(masked(masks), TWO)
    for index in TWO:
        alone = scene.run(masked(masks[index : index + 1]), (index,))
        assert error_of(both[index : index + 1], alone) < 1e-4
    for images in ((0,), (0, 1, 2)):
        with pytest.raises(MedSteerError, match=f"Steer has 2 masks, and this run makes {len(images)} images"):
            scene.run(masked(masks), images)
    assert tiny.hook_count(scene.model) == 0


def test_a_mask_on_steer_stands_beside_a_masked_conditioning():
    scene = company.start("hunyuan_dit", False)
    mask = torch.zeros(1, 4, 6)
    mask[..., 3:] = 1
    positive = core.ConditioningSetMask().append(scene.small.cond(3), mask, "default", 1.0)[0]
    scene = replace(scene, texts={**scene.texts, "positive": scene.texts["positive"] + positive})
    result = scene.run(mask_left(scene.model, families.vector(scene.model)))
    assert error_of(result, scene.run(scene.model)) > 1e-3


def test_the_concept_map_is_of_the_whole_image_beside_areas():
    scene = company.areas(False)
    steered = tiny.steered(scene.model, families.vector(scene.model), operator="suppress", strength=2.0)
    with pytest.raises(MedSteerError, match="There is no concept map"):
        pair_of(scene, steered, lock=CONCEPT)
    whole = replace(scene, texts={**scene.texts, "positive": scene.texts["positive"] + scene.small.cond(4)})
    pair = pair_of(whole, steered)
    assert pair.concept_map.shape == (2, 32, 48) and pair.concept_map.amax() == 1.0


def batched(texts):
    """One conditioning with a text for each image."""
    return [[torch.cat([text for ((text, _options),) in texts]), {}]]


@pytest.mark.parametrize("prompts", [2, 3, 4])
def test_a_batch_of_prompts_goes_to_the_same_images_of_both_halves(prompts):
    """Two prompts for three images: the third has the first prompt again, in the counterfactuals too."""
    scene = company.start("sd15", True, steps=4)
    scene = replace(
        scene, texts={**scene.texts, "positive": batched([scene.small.cond(10 + i) for i in range(prompts)])}
    )
    steered = tiny.steered(scene.model, families.vector(scene.model), operator="suppress", strength=2.0, start=0.3)
    assert is_two_runs(scene, pair_of(scene, steered, (0, 1, 2)), steered, (0, 1, 2))


def test_masks_of_each_image_go_to_the_same_images_of_both_halves():
    scene = company.start("sd15", True)
    masks = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    more = core.ConditioningSetMask().append(scene.small.cond(3), masks, "default", 1.0)[0]
    scene = replace(scene, texts={**scene.texts, "positive": scene.texts["positive"] + more})
    steered = tiny.steered(scene.model, families.vector(scene.model), operator="suppress", strength=2.0)
    for images in ((0, 1), (0, 1, 2)):
        assert is_two_runs(scene, pair_of(scene, steered, images), steered, images)


def test_the_images_of_a_controlnet_go_to_the_same_images_of_both_halves():
    scene = company.with_control(company.start("sd15", True, steps=4), hints=2)
    steered = tiny.steered(scene.model, families.vector(scene.model), operator="suppress", strength=2.0, start=0.3)
    for images in (TWO, (0, 1, 2)):
        assert is_two_runs(scene, pair_of(scene, steered, images), steered, images)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_inpainting_masks_go_to_the_same_images_of_both_halves(count):
    scene = company.start("sd15", True, steps=4)
    steered = tiny.steered(scene.model, families.vector(scene.model), operator="suppress", strength=2.0)
    noise_mask = torch.rand(count, 32, 48, generator=torch.Generator().manual_seed(0)).round()
    schedule = sampling.schedule(steered, scene.steps, "euler", "normal")
    latent = {"samples": families.random(30, 2, 4, 4, 6), "noise_mask": noise_mask, "batch_index": [0, 1]}
    texts = scene.texts["positive"], scene.texts["negative"]
    pair = sample_pair(steered, PairRequest(*texts, latent, 7, 3.0, schedule))
    noise = sampling.noise_for(latent["samples"], 7, TWO)
    for model, found in ((scene.model, pair.factual), (steered, pair.counterfactual)):
        alone = comfy.sample.sample(
            model, noise, scene.steps, 3.0, "euler", "normal", *texts, latent["samples"], noise_mask=noise_mask,
            seed=7, disable_pbar=True,
        )  # fmt: skip
        assert error_of(found, alone) < 1e-5
        assert found is not pair.factual or torch.equal(found, alone)
