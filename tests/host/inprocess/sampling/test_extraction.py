"""Extraction inside ComfyUI: the recorded directions, their provenance, progress and cancelling."""

from dataclasses import replace

import comfy.model_management
import comfy.samplers
import comfy.utils
import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.endophantom.text import IGNORED
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.extraction import sample_watch
from medsteer_pack.medsteer_core.extraction.capture import ActivationSums
from medsteer_pack.medsteer_core.extraction.estimators import mean_difference
from medsteer_pack.medsteer_core.extraction.sample_estimators import ESTIMATORS
from medsteer_pack.medsteer_core.host.patching import patch, steer
from medsteer_pack.medsteer_core.host.patching.fingerprint import fingerprint
from medsteer_pack.medsteer_core.host.sampling import extraction
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.pictures.summary import describe
from medsteer_pack.nodes.prompts import prompt_text

PRESENT, ABSENT, NEGATIVE = tiny.cond(1), tiny.cond(2), tiny.cond(3, tokens=2)
SITES = [f"blocks.{index}.cross_attn.proj" for index in range(tiny.DEPTH)]


def request(model, **changes):
    return tiny.request(model, PRESENT, ABSENT, NEGATIVE, **changes)


def extract(model, **changes):
    return extraction.extract(model, request(model, **changes))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(pixart):
    yield
    assert tiny.hook_count(pixart) == 0


# What is recorded


def naive_means(model, positive, negative, wanted, indices):
    """(site, sigma) -> mean over images and tokens (C,), image by image, of the conditional rows alone."""
    empty, activations = wanted.latent["samples"], {}
    for index in indices:
        noise = sampling.noise_for(empty, wanted.seed, [index])
        with tiny.spying(model, positive=positive, negative=negative) as rows:
            sampling.sample(model, positive, negative, noise, wanted.schedule, wanted.cfg, wanted.seed)
        for row in rows:
            if row.name == "positive":
                activations.setdefault((row.site, row.sigma), []).append(row.raw)
    return {key: torch.stack(found).mean((0, 1)) for key, found in activations.items()}


@pytest.mark.parametrize(("noise", "absent_indices"), [("paired", [0, 1, 2]), ("unpaired", [1, 3, 5])])
@pytest.mark.parametrize("negative", [NEGATIVE, tiny.cond(3)], ids=["separate calls", "one call"])
def test_the_directions_are_those_of_a_plain_computation(pixart, noise, absent_indices, negative):
    wanted = tiny.request(pixart, PRESENT, ABSENT, negative, noise=noise)
    vector = extraction.extract(pixart, wanted)
    present = naive_means(pixart, PRESENT, negative, wanted, [0, 1, 2] if noise == "paired" else [0, 2, 4])
    absent = naive_means(pixart, ABSENT, negative, wanted, absent_indices)
    for step, sigma in enumerate(vector.sigmas.tolist()):
        for site in SITES:
            difference = present[site, sigma] - absent[site, sigma]
            values = vector.sites[site]
            torch.testing.assert_close(values.gaps[step, 0], difference.norm(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values.directions[step, 0], difference / difference.norm(), rtol=0, atol=1e-4)
            centre = (present[site, sigma] + absent[site, sigma]) / 2
            torch.testing.assert_close(values.centres[step], centre, rtol=0, atol=1e-5)


def test_the_vector_has_every_site_in_order_and_every_step_without_the_final_zero(pixart):
    vector = extract(pixart, steps=20, samples=1)
    schedule = sampling.schedule(pixart, 20, "euler", "normal").sigmas
    assert list(vector.site_names) == SITES
    assert vector.steps == 20
    assert vector.sigmas.tolist() == schedule[:-1].tolist() and schedule[-1] == 0


@pytest.mark.parametrize(("sampler", "levels"), [("heun", 4), ("dpmpp_2m", 4), ("dpm_2", 7)])
def test_samplers_that_call_the_model_twice_a_step_record_each_level_once(pixart, sampler, levels):
    assert extract(pixart, sampler=sampler, samples=1).steps == levels


def test_paired_and_unpaired_noise_differ(pixart):
    paired, unpaired = (extract(pixart, noise=noise).sites[SITES[0]].directions for noise in ("paired", "unpaired"))
    assert not torch.allclose(paired, unpaired, atol=1e-3)


def test_the_same_request_gives_the_same_content_hash(pixart):
    assert extract(pixart).content_hash() == extract(pixart).content_hash()
    assert extract(pixart).content_hash() != extract(pixart, seed=6).content_hash()


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_size_of_the_batches_does_not_matter(pixart, monkeypatch, sampler):
    vectors = []
    for size in (1, 3, 4):
        monkeypatch.setattr(sampling, "batch_that_fits", lambda *_args, size=size: size)
        vectors.append(extract(pixart, samples=4, sampler=sampler))
    for other in vectors[1:]:
        for name, site in vectors[0].sites.items():
            cosine = (site.directions * other.sites[name].directions).sum(-1)
            assert cosine.min() > 0.9999
            torch.testing.assert_close(other.sites[name].directions, site.directions, rtol=0, atol=1e-4)
            torch.testing.assert_close(other.sites[name].spreads, site.spreads, rtol=1e-3, atol=1e-4)


def test_batches_shrink_until_they_fit_into_memory(pixart, monkeypatch):
    empty = tiny.latent()["samples"]
    need = {size: pixart.model.memory_required([2 * size, *empty.shape[1:]]) * 1.5 for size in (16, 8)}
    assert sampling.batch_that_fits(pixart, empty, 100) == 16
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: (need[16] + need[8]) / 2)
    assert sampling.batch_that_fits(pixart, empty, 100) == 8
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 0)
    assert sampling.batch_that_fits(pixart, empty, 100) == 1


def test_memory_does_not_grow_with_the_samples(pixart, monkeypatch):
    made = []

    def remembered():
        made.append(ActivationSums())
        return made[-1]

    monkeypatch.setattr(extraction, "ActivationSums", remembered)
    monkeypatch.setattr(sampling, "batch_that_fits", lambda *_: 2)
    extract(pixart, samples=2)
    extract(pixart, samples=6)
    assert {sums.stored_elements for sums in made} == {4 * len(SITES) * (tiny.WIDTH + 1)}


def test_extraction_leaves_the_model_as_it_was(pixart):
    before = tiny.run(pixart, PRESENT, NEGATIVE)
    extract(pixart)
    assert torch.equal(tiny.run(pixart, PRESENT, NEGATIVE), before)
    assert "medsteer_observers" not in pixart.model_options["transformer_options"]


# Provenance


def test_provenance_says_how_the_vector_was_made(pixart):
    texts = {"present": "polyps", "absent": "normal cecum", "negative": None}
    facts = extract(pixart, noise="unpaired", latent=tiny.latent(8, 16), texts=texts).provenance
    expected = {
        "model": fingerprint(pixart), "seed": 5, "samples": 3, "noise": "unpaired", "latent_shape": [1, 4, 8, 16],
        "noise_indices": {"present": [0, 6, 2], "absent": [1, 6, 2]}, "sampler": "euler", "scheduler": "normal",
        "steps": 4, "cfg": 3.0, "steered": [], "observations": {"present": 3, "absent": 3}, "degenerate": 0,
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    assert {name: facts["prompts"][name]["text"] for name in texts} == texts
    assert [facts["prompts"][name]["shapes"] for name in texts] == [[[1, 4, 16]], [[1, 4, 16]], [[1, 2, 16]]]
    assert len({facts["prompts"][name]["sha256"] for name in texts}) == 3


def test_sampler_and_sigmas_inputs_override_the_names(pixart):
    sigmas = torch.tensor([9.0, 3.0, 1.0, 0.0])
    heun = comfy.samplers.sampler_object("heun")
    schedule = sampling.schedule(pixart, 20, "euler", "normal", sampler=heun, sigmas=sigmas)
    vector = extract(pixart, schedule=schedule)
    facts = vector.provenance
    assert vector.sigmas.tolist() == [9.0, 3.0, 1.0]
    assert (facts["sampler"], facts["scheduler"], facts["steps"]) == ("sample_heun", "sigmas input", 3)


def test_a_steered_models_vector_says_how_it_was_steered(pixart):
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=1.5)
    (operator,) = extract(steered).provenance["steered"]
    assert (operator["name"], operator["strength"]) == ("suppress", 1.5)


def test_a_prompts_text_is_read_from_the_graph():
    graph = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "polyps", "clip": ["9", 1]}},
        "2": {"inputs": {"present": ["1", 0], "absent": ["3", 0], "negative": "none"}},
        "3": {"inputs": {"text": ["4", 0]}},
    }
    assert [prompt_text(graph, "2", name) for name in ("present", "absent", "negative", "more")] == [
        "polyps", None, None, None,
    ]  # fmt: skip
    assert prompt_text(None, None, "present") is None


# Requests that can't be


@pytest.mark.parametrize("noise", ["paired", "unpaired"])
def test_identical_prompts_are_refused(pixart, noise):
    same = tiny.request(pixart, PRESENT, tiny.cond(1), NEGATIVE, noise=noise)
    with tiny.spying(pixart, positive=PRESENT, negative=NEGATIVE) as rows:
        with pytest.raises(MedSteerError, match="'present' and 'absent' are the same.*two different prompts"):
            extraction.extract(pixart, same)
    assert rows == []


def test_prompts_of_one_text_and_different_areas_are_not_identical(pixart):
    absent = [[PRESENT[0][0], {"area": (4, 8, 0, 0), "strength": 0.5}]]
    vector = extraction.extract(pixart, tiny.request(pixart, PRESENT, absent, NEGATIVE, samples=1))
    assert vector.steps == 4


def test_of_a_batch_of_latents_the_shape_counts(pixart):
    one, three = (extract(pixart, latent=tiny.latent(batch=batch)) for batch in (1, 3))
    assert one.content_hash() == three.content_hash()


def test_words_that_the_model_does_not_know_are_told_of(pixart):
    heard = []
    present = [[PRESENT[0][0], {IGNORED: ("polips", "bleeding")}]]
    extraction.extract(pixart, tiny.request(pixart, present, ABSENT, NEGATIVE, samples=1), heard.append)
    said = "\n".join(heard)
    assert "does not know 'polips' (did you mean 'polyps'?), 'bleeding' and ignores that" in said
    same = [[PRESENT[0][0], {}]]
    with pytest.raises(MedSteerError, match="are the same to the model.*does not know 'polips'"):
        extraction.extract(pixart, tiny.request(pixart, present, same, NEGATIVE))


def test_an_unknown_noise_is_refused(pixart):
    with pytest.raises(MedSteerError, match="noise is 'white'; 'paired', 'unpaired' or 'same state'"):
        extract(pixart, noise="white")


@pytest.mark.parametrize("sigmas", [torch.tensor([]), torch.tensor([1.0])])
def test_sigmas_without_a_step_are_refused(pixart, sigmas):
    with pytest.raises(MedSteerError, match=f"sigmas has {len(sigmas)} value"):
        sampling.schedule(pixart, 4, "euler", "normal", sigmas=sigmas)


# Estimators and how well they separate unseen samples


@pytest.mark.parametrize("noise", ["paired", "unpaired"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_mean_difference_is_bit_for_bit_that_of_running_means_alone(pixart, monkeypatch, noise, sampler):
    monkeypatch.setattr(sampling, "batch_that_fits", lambda *_: 2)
    wanted, statistics = request(pixart, samples=5, noise=noise, sampler=sampler), []
    for prompt, first in ((PRESENT, 0), (ABSENT, 0 if noise == "paired" else 1)):
        sums = ActivationSums()
        watched = patch.observed(pixart, sums)
        images = range(10)[first :: 1 if noise == "paired" else 2][:5]
        for part in (images[:2], images[2:4], images[4:]):
            start = sampling.noise_for(wanted.latent["samples"], wanted.seed, part)
            sampling.sample(watched, prompt, NEGATIVE, start, wanted.schedule, wanted.cfg, wanted.seed + part[0])
        statistics.append(sums.statistics())
    alone, vector = mean_difference(*statistics, {}), extraction.extract(pixart, wanted)
    assert vector.provenance["estimator"] == "mean_difference"
    for name, site in alone.sites.items():
        for key, tensor in site.tensors().items():
            assert torch.equal(tensor, vector.sites[name].tensors()[key]), key


@pytest.mark.parametrize("estimator", extraction.ESTIMATOR_NAMES)
def test_each_estimators_vector_separates_the_prompts_and_steers(pixart, estimator):
    vector = extract(pixart, estimator=estimator, samples=6, seed=9)
    paper, facts = extract(pixart, samples=6, seed=9), vector.provenance
    assert facts["estimator"] == estimator.replace(" ", "_") and vector.rank == 1
    assert facts["separability"]["samples"] == 6 and list(vector.sites) == SITES
    for name in SITES:
        assert all(value > 0.9 for value in facts["separability"]["auroc"][name])
        assert (vector.sites[name].projections[:, 0] > vector.sites[name].projections[:, 1]).all()
        assert (vector.sites[name].directions * paper.sites[name].directions).sum(-1).min() > 0.2  # to present
    plain = tiny.run(pixart, PRESENT, NEGATIVE)
    one = tiny.steered(pixart, vector, operator="suppress", strength=2.0)
    assert not torch.allclose(tiny.run(one, PRESENT, NEGATIVE), plain, atol=1e-3)
    assert torch.equal(
        tiny.run(tiny.steered(pixart, vector, operator="suppress", strength=0.0), PRESENT, NEGATIVE), plain
    )


def test_the_combo_has_the_estimators_and_the_papers_is_the_default(pixart):
    assert [name.replace(" ", "_") for name in extraction.ESTIMATOR_NAMES] == list(ESTIMATORS)
    assert request(pixart).estimator == "mean difference" == extraction.ESTIMATOR_NAMES[0]


def test_paired_difference_points_along_the_mean_difference(pixart):
    plain, paired = (extract(pixart, samples=4, estimator=name) for name in ("mean difference", "paired difference"))
    for name in SITES:
        torch.testing.assert_close(paired.sites[name].directions, plain.sites[name].directions, rtol=0, atol=1e-4)
    assert set(paired.provenance["pair_spread"]) == set(SITES)


def test_leace_with_affine_makes_the_two_prompts_means_meet(pixart):
    """Tried where it was fitted, on the states of unsteered runs: the first step of the samples themselves."""
    vector = extract(pixart, estimator="leace", samples=8)
    wanted, start = request(pixart, samples=8), float(vector.sigmas[0])
    noise = sampling.noise_for(wanted.latent["samples"], wanted.seed, range(8))
    erase = tiny.steered(pixart, vector, operator="affine", strength=1.0, rows="positive", sites="0")
    means = {}
    for model in (pixart, erase):
        for prompt in (PRESENT, ABSENT):
            with tiny.spying(model, positive=prompt, negative=NEGATIVE) as rows:
                sampling.sample(model, prompt, NEGATIVE, noise, wanted.schedule, wanted.cfg, wanted.seed)
            # The first site: those behind it see what it changed.
            first = [row.out for row in rows if (row.name, row.site, row.sigma) == ("positive", SITES[0], start)]
            means[model is erase, prompt is PRESENT] = torch.stack(first).mean((0, 1))
    before, after = ((means[steered, True] - means[steered, False]).norm() for steered in (False, True))
    assert before > 0.1 and after < 1e-3 * before


def test_no_difference_to_speak_of_is_chance_and_a_real_one_is_not(pixart):
    """Prompts that differ by a thousandth, of different noise: what differs between the samples is the noise."""
    near = [[PRESENT[0][0] + 1e-3 * torch.randn(PRESENT[0][0].shape, generator=torch.Generator().manual_seed(1)), {}]]
    found = {}
    for name, absent in (("same", near), ("other", ABSENT)):
        wanted = tiny.request(pixart, PRESENT, absent, NEGATIVE, samples=24, noise="unpaired", steps=2)
        report = extraction.extract(pixart, wanted).provenance["separability"]
        found[name] = [torch.tensor(list(report[measure].values())) for measure in ("auroc", "stability")]
    assert abs(float(found["same"][0].mean()) - 0.5) < 0.15 and found["other"][0].min() > 0.99
    assert found["same"][1].mean() < 0.8 and found["other"][1].min() > 0.95


def test_a_prompt_of_several_areas_is_reported_too(pixart):
    areas = [[PRESENT[0][0], {"area": (8, 4, 0, x), "strength": 1.0}] for x in (0, 4)]
    vector = extraction.extract(pixart, tiny.request(pixart, areas, ABSENT, NEGATIVE, samples=4))
    assert list(vector.provenance["separability"]["auroc"]) == SITES


def test_the_summary_reports_separability_and_stability(pixart):
    text = describe(extract(pixart, samples=4))
    assert "separability at unseen samples: AUROC 1.000 on average" in text and "stability: |cos| " in text


def test_fewer_than_four_samples_are_said_to_be_too_few_and_change_nothing(pixart):
    vector = extract(pixart, samples=3)
    assert "separability" not in vector.provenance
    assert "no separability report: 3 samples a prompt, and 4 or more are needed" in describe(vector)


def test_samples_that_do_not_fit_leave_the_running_means_and_the_summary_says_so(pixart, monkeypatch):
    whole = extract(pixart, samples=4)
    monkeypatch.setattr(
        sample_watch.SampleWatch.__init__, "__defaults__", (False, True, 4 * 4 * 3 * tiny.WIDTH * 4 - 1)
    )
    vector = extract(pixart, samples=4)
    for name in SITES:
        assert torch.equal(vector.sites[name].directions, whole.sites[name].directions)
    assert "no separability report: The activations of 4 samples take 0.0 GB" in describe(vector)
    with pytest.raises(MedSteerError, match="Set fewer samples or steps, or the estimator mean difference"):
        extract(pixart, samples=4, estimator="lda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "pca"}, "estimator is 'pca'; one of mean difference, paired difference, principal component"),
        ({"estimator": "paired difference", "noise": "unpaired"}, "compares pairs .* Set noise to 'paired'"),
        ({"estimator": "principal component", "noise": "unpaired"}, "compares pairs .* Set noise to 'paired'"),
        ({"estimator": "lda", "noise": "same state"}, "'lda' does not go with noise 'same state'"),
        ({"estimator": "leace", "samples": 1}, "samples is 1; 2 or more were expected"),
    ],
)
def test_an_estimator_that_can_not_be_fed_is_refused_before_anything_is_sampled(pixart, changes, message):
    with tiny.spying(pixart, positive=PRESENT, negative=NEGATIVE) as rows:
        with pytest.raises(MedSteerError, match=message):
            extract(pixart, **changes)
    assert rows == []


# Sites chosen by the report


def with_auroc(vector, *means):
    report = {"auroc": dict(zip(SITES, ([mean] * vector.steps for mean in means), strict=True))}
    return replace(vector, provenance={**vector.provenance, "separability": report})


def test_auto_steers_the_sites_that_separate_and_the_note_says_how_many(pixart):
    vector = with_auroc(extract(pixart), 0.95, 0.5, 0.9)
    model, note = steer.steer(pixart, vector, "ablate", {}, 0.0, 1.0, "auto", "all")
    assert "ablate at 2 of 3 sites, rows all; auto took those with an AUROC of 0.9 or more at unseen samples" in note
    with tiny.spying(model, positive=PRESENT, negative=NEGATIVE) as rows:
        tiny.run(model, PRESENT, NEGATIVE)
    assert {row.site for row in rows if row.changed} == {SITES[0], SITES[2]}


def test_auto_is_what_the_extraction_found(pixart):
    vector = extract(pixart, samples=4)
    (steering,) = patch.plan_of(tiny.steered(pixart, vector, sites="auto")).steerings
    assert steering.sites == tuple(SITES)


def test_auto_wants_a_vector_with_the_report(pixart):
    for vector in (extract(pixart, samples=3), tiny.vector(pixart)):
        with pytest.raises(MedSteerError, match="sites is 'auto', but .* Extract it anew with at least 4 samples"):
            tiny.steered(pixart, vector, sites="auto")


# Progress and cancelling


@pytest.fixture
def progress_hook():
    """Set the hook that ComfyUI's server shows progress with; put back afterwards."""
    before = comfy.utils.PROGRESS_BAR_HOOK
    yield comfy.utils.set_progress_bar_global_hook
    comfy.utils.set_progress_bar_global_hook(before)
    comfy.model_management.interrupt_current_processing(False)


def test_one_progress_bar_counts_samples_times_steps_of_both_prompts(pixart, monkeypatch, progress_hook):
    made, seen, kind = [], [], comfy.utils.ProgressBar
    monkeypatch.setattr(comfy.utils, "ProgressBar", lambda total, *a, **k: made.append(kind(total, *a, **k)) or made[0])
    monkeypatch.setattr(sampling, "batch_that_fits", lambda *_: 2)
    progress_hook(lambda value, total, *_args, **_kwargs: seen.append((value, total)))
    extract(pixart, samples=3, steps=4)
    assert [(bar.current, bar.total) for bar in made] == [(24, 26)]  # the fit is still to come
    assert seen == sorted(seen) and {total for _, total in seen} == {26}


def test_cancelling_in_the_middle_stops_at_once_and_leaves_no_hooks(pixart, monkeypatch, progress_hook):
    seen = []

    def like_the_server(value, *_args, **_kwargs):
        seen.append(value)
        if value >= 12:
            comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    # Without a preview ComfyUI passes on only some updates.
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda bar, value, **_: advance(bar, value))

    def advance(bar, value):
        bar.current = value
        like_the_server(value)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        extract(pixart, samples=3, steps=4)
    assert seen == [3, 6, 9, 12]
    assert tiny.hook_count(pixart) == 0


def test_cancelling_before_a_run_stops_it(pixart, progress_hook):
    comfy.model_management.interrupt_current_processing()
    with tiny.spying(pixart, positive=PRESENT, negative=NEGATIVE) as rows:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            extract(pixart)
    assert rows == []


def test_the_largest_seed_of_the_node_works_with_a_stochastic_sampler(pixart):
    vector = extract(pixart, seed=2**64 - 1, sampler="euler_ancestral", noise=extraction.UNPAIRED)
    assert vector.steps == 4 and vector.provenance["seed"] == 2**64 - 1
