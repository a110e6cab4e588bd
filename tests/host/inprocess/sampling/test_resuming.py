"""Extractions that go on: after a cancel, with more samples, with another estimator; and prompts in contexts."""

import re

import comfy.model_management
import comfy.samplers
import comfy.utils
import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.extraction.prompt_contexts import filled
from medsteer_pack.medsteer_core.extraction.sample_store import SampleStore
from medsteer_pack.medsteer_core.host.sampling import contexts, extraction, gathering
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.pictures.summary import describe

PRESENT, ABSENT, NEGATIVE = tiny.cond(1), tiny.cond(2), tiny.cond(3, tokens=2)
SITES = [f"blocks.{index}.cross_attn.proj" for index in range(tiny.DEPTH)]


class Told(list):
    def __call__(self, text):
        self.append(text)


def request(model, store=None, **changes):
    return tiny.request(
        model, changes.pop("present", PRESENT), changes.pop("absent", ABSENT), NEGATIVE, store=store, **changes
    )


def run(model, store=None, **changes):
    """(vector, what was said of the samples)"""
    told = Told()

    def tell(text):
        if "this model was made for" not in text:  # the tiny images' size
            told(text)

    return extraction.extract(model, request(model, store, **changes), tell), told


@pytest.fixture
def store(tmp_path):
    return SampleStore(tmp_path / "samples")


@pytest.fixture
def sampled(monkeypatch):
    """How many images were really sampled."""
    counts = []
    for name in ("sample", "sample_beside"):
        real = getattr(sampling, name)

        def counting(*args, real=real, place=3 if name == "sample" else 4, **options):
            counts.append(len(args[place]))
            return real(*args, **options)

        monkeypatch.setattr(sampling, name, counting)
    return counts


def same(one, other, **tolerance):
    assert one.site_names == other.site_names
    for name in SITES:
        for key, tensor in one.sites[name].tensors().items():
            torch.testing.assert_close(other.sites[name].tensors()[key], tensor, **(tolerance or dict(rtol=0, atol=0)))


KINDS = ["paired", "unpaired", "same state"]


@pytest.mark.parametrize("noise", KINDS)
def test_a_store_changes_nothing_and_the_second_time_nothing_is_sampled(pixart, store, sampled, noise):
    plain, _ = run(pixart, noise=noise, samples=5)
    sampled.clear()
    first, told = run(pixart, store, noise=noise, samples=5)
    assert told == [] and sum(sampled) == (5 if noise == "same state" else 10)
    sampled.clear()
    again, told = run(pixart, store, noise=noise, samples=5)
    assert sampled == [] and told and all("5 of 5 samples were there" in text for text in told)
    same(plain, first)
    same(plain, again)
    assert plain.short_hash() == first.short_hash() == again.short_hash()


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_more_samples_add_to_those_that_are_there(pixart, store, sampled, monkeypatch, noise, sampler):
    monkeypatch.setattr(sampling, "batch_that_fits", lambda *_: 2)
    run(pixart, store, noise=noise, samples=4, sampler=sampler)
    sampled.clear()
    more, told = run(pixart, store, noise=noise, samples=10, sampler=sampler)
    assert sum(sampled) == (6 if noise == "same state" else 12) and all("4 of 10" in text for text in told)
    whole, _ = run(pixart, noise=noise, samples=10, sampler=sampler)
    # The directions of a regression are orthogonal axes, of which close ones may turn into each other.
    same(whole, more, rtol=1e-3, atol=1e-4) if noise != "same state" else torch.testing.assert_close(
        whole.sites[SITES[0]].centres, more.sites[SITES[0]].centres, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("after", [1, 7, 13, 21])
def test_a_cancelled_extraction_goes_on_to_the_same_bits(pixart, store, sampled, monkeypatch, noise, after):
    """At any model call, in the middle of a batch too: what was whole is kept, what was not leaves nothing."""
    monkeypatch.setattr(sampling, "batch_that_fits", lambda *_: 2)
    whole, _ = run(pixart, noise=noise, samples=6)
    real, calls = comfy.samplers.calc_cond_batch, []

    def cancelled(*args):
        calls.append(1)
        if len(calls) == after:
            raise comfy.model_management.InterruptProcessingException()
        return real(*args)

    said = []
    with monkeypatch.context() as patched:
        patched.setattr(comfy.samplers, "calc_cond_batch", cancelled)
        patched.setattr(gathering, "say_on_running_node", said.append)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(pixart, store, noise=noise, samples=6)
    (told,) = said
    kept, going_on = int(re.search(r": (\d) of 6 samples are kept", told)[1]), "the next run goes on from them" in told
    assert going_on == (kept > 0) and (kept > 0 or after <= 7 or noise != "same state")
    sampled.clear()
    resumed, _ = run(pixart, store, noise=noise, samples=6)
    full = 6 if noise == "same state" else 12
    assert sum(sampled) < full if after > 8 else sum(sampled) <= full
    same(whole, resumed)
    assert tiny.hook_count(pixart) == 0


@pytest.mark.parametrize("noise", KINDS)
def test_the_first_run_is_a_small_one_so_that_an_early_cancel_has_kept_something(pixart, store, sampled, monkeypatch,
                                                                                noise):  # fmt: skip
    whole, _ = run(pixart, noise=noise, samples=10)
    assert sampled == ([2, 3, 2, 3] if noise == "same state" else [2, 8, 2, 8])
    sampled.clear()
    name = "sample_beside" if noise == "same state" else "sample"
    real = getattr(sampling, name)

    def cancelled(*args, **options):
        if len(sampled) == 1:
            raise comfy.model_management.InterruptProcessingException()
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(sampling, name, cancelled)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(pixart, store, noise=noise, samples=10)
    assert sampled == [2]
    resumed, told = run(pixart, store, noise=noise, samples=10)
    assert "2 of 10 samples were there from before" in told[0] and sum(sampled) == (10 if noise == "same state" else 20)
    same(whole, resumed)


def test_another_estimator_takes_the_same_samples(pixart, store, sampled):
    run(pixart, store, samples=6)
    sampled.clear()
    for name in extraction.ESTIMATOR_NAMES:
        vector, _ = run(pixart, store, samples=6, estimator=name)
        same(run(pixart, samples=6, estimator=name)[0], vector)
    assert sum(sampled) == 12 * len(extraction.ESTIMATOR_NAMES)  # those without a store


def test_an_estimator_that_needs_every_sample_does_not_go_on_from_means(pixart, store, sampled):
    run(pixart, store, samples=3)  # too few for a report: no record is kept
    sampled.clear()
    vector, told = run(pixart, store, samples=3, estimator="lda")
    assert sum(sampled) == 6 and told == []
    same(run(pixart, samples=3, estimator="lda")[0], vector)


def test_fewer_samples_than_there_are_are_sampled_and_leave_what_is_there(pixart, store, sampled):
    run(pixart, store, samples=6)
    sampled.clear()
    fewer, told = run(pixart, store, samples=4)
    assert sum(sampled) == 8 and told == []
    same(run(pixart, samples=4)[0], fewer)
    sampled.clear()
    run(pixart, store, samples=6)
    assert sampled == []


CHANGES = {
    "prompt": lambda m: (m, {"present": tiny.cond(8), "absent": tiny.cond(9)}),
    "seed": lambda m: (m, {"seed": 6}),
    "cfg": lambda m: (m, {"cfg": 2.0}),
    "steps": lambda m: (m, {"steps": 3}),
    "sampler": lambda m: (m, {"sampler": "dpmpp_2m"}),
    "size": lambda m: (m, {"latent": tiny.latent(8, 16)}),
    "weights": lambda m: (tiny.model(seed=77), {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_request_samples_anew(pixart, store, sampled, change):
    run(pixart, store, samples=4)
    model, changes = CHANGES[change](pixart)
    sampled.clear()
    _, told = run(model, store, samples=4, **changes)
    assert sum(sampled) == 8 and told == []


def test_a_patched_model_is_not_kept_and_says_why(pixart, store, sampled):
    patched = pixart.clone()
    patched.set_model_attn2_patch(lambda q, k, v, extra: (q, k, v))
    for _ in range(2):
        sampled.clear()
        _, told = run(patched, store, samples=4)
        assert sum(sampled) == 8 and len(told) == 2 and all("the model is patched" in text for text in told)
    vector = extraction.extract(pixart, request(pixart))
    steered = tiny.steered(pixart, vector)
    assert "the model is patched" in run(steered, store, samples=4)[1][0]
    assert not store.folder.exists()


def test_an_object_in_a_prompt_is_not_kept(pixart, store):
    odd = [[PRESENT[0][0], {**PRESENT[0][1], "control_hint": object()}]]
    told = run(pixart, store, samples=4, present=odd)[1]
    assert len(told) == 1 and told[0].startswith("present") and "object" in told[0]


# Contexts


def in_contexts(*seeds):
    return [
        [entry[0], {**entry[1], contexts.MARK: index, contexts.TEXT: f"text {seed}"}]
        for index, seed in enumerate(seeds)
        for entry in tiny.cond(seed)
    ]


@pytest.mark.parametrize("noise", ["paired", "unpaired"])
def test_contexts_are_averaged_in_turns(pixart, noise):
    """The class mean is that of images of every context; image i of both prompts has the same one."""
    present, absent = in_contexts(1, 4, 6), in_contexts(2, 5, 7)
    vector, _ = run(pixart, present=present, absent=absent, samples=6, noise=noise)
    wanted = request(pixart, samples=6, noise=noise)
    stride = 1 if noise == "paired" else 2
    means = {}
    for side, seeds, first in (("present", (1, 4, 6), 0), ("absent", (2, 5, 7), stride - 1)):
        for place in range(6):
            noises = sampling.noise_for(wanted.latent["samples"], wanted.seed, [first + stride * place])
            prompt = tiny.cond(seeds[place % 3])
            with tiny.spying(pixart, positive=prompt, negative=NEGATIVE) as rows:
                sampling.sample(pixart, prompt, NEGATIVE, noises, wanted.schedule, wanted.cfg, wanted.seed)
            for row in rows:
                if row.name == "positive":
                    means.setdefault((side, row.site, row.sigma), []).append(row.raw.mean(0))
    for step, sigma in enumerate(vector.sigmas.tolist()):
        for site in SITES:
            mine = [torch.stack(means[side, site, sigma]).mean(0) for side in ("present", "absent")]
            torch.testing.assert_close(
                vector.sites[site].gaps[step, 0], (mine[0] - mine[1]).norm(), rtol=1e-4, atol=1e-5
            )
    assert vector.provenance["prompts"]["present"]["contexts"] == ["text 1", "text 4", "text 6"]


def test_contexts_work_with_noise_same_state_and_go_on(pixart, store, sampled):
    changes = dict(present=in_contexts(1, 4), absent=in_contexts(2, 5), noise="same state")
    run(pixart, store, samples=4, **changes)
    sampled.clear()
    more, told = run(pixart, store, samples=8, **changes)
    assert sum(sampled) == 4 and "4 of 8" in told[0]
    whole, _ = run(pixart, samples=8, **changes)
    torch.testing.assert_close(whole.sites[SITES[0]].centres, more.sites[SITES[0]].centres, rtol=1e-4, atol=1e-5)


def test_one_context_is_the_prompt_itself(pixart):
    marked = run(pixart, present=in_contexts(1), absent=in_contexts(2), samples=4)[0]
    plain = run(pixart, present=tiny.cond(1), absent=tiny.cond(2), samples=4)[0]
    same(plain, marked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"present": in_contexts(1, 4, 6), "absent": in_contexts(2, 5)}, "3 contexts and 'absent' in 2"),
        ({"present": in_contexts(1, 4, 6), "absent": in_contexts(2, 5, 7), "samples": 2}, "2 for 3 contexts"),
        ({"present": in_contexts(1, 1), "absent": in_contexts(1, 1)}, "are the same"),
    ],
)
def test_contexts_that_do_not_fit_are_refused(pixart, changes, message):
    with pytest.raises(MedSteerError, match=message):
        run(pixart, **changes)


def test_each_template_is_encoded_by_itself_and_extract_averages_over_them(endophantom):
    model, clip, _ = endophantom
    templates = "An image of {concept}\n{concept} endoscopic"
    result = [contexts.encode_contexts(clip, filled(templates, concept)) for concept in ("polyps", "normal cecum")]
    for conditioning, concept in zip(result, ("polyps", "normal cecum"), strict=True):
        texts = [f"An image of {concept}", f"{concept} endoscopic"]
        assert contexts.context_texts(conditioning) == texts
        for part, text in zip(contexts.contexts_of(conditioning), texts, strict=True):
            plain = clip.encode_from_tokens_scheduled(clip.tokenize(text))
            assert len(part) == 1 and torch.equal(part[0][0], plain[0][0])
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    wanted = tiny.request(model, *result, empty, latent=tiny.latent(16, 16), samples=4, steps=2)
    vector = extraction.extract(model, wanted)
    assert "2 contexts of the prompts" in describe(vector)
    assert describe(vector).startswith("An image of polyps - An image of normal cecum")


def test_two_different_contexts_in_a_sampler_are_what_comfyui_makes_of_two_prompts(pixart):
    assert torch.equal(
        tiny.run(pixart, in_contexts(1, 4), NEGATIVE), tiny.run(pixart, tiny.cond(1) + tiny.cond(4), NEGATIVE)
    )
