"""Extraction at the same states, and steering with what it gives, in ComfyUI."""

import comfy.model_management
import comfy.utils
import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.endophantom.bundle import Bundle
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.sampling import extraction
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.pictures.summary import describe
from medsteer_pack.medsteer_core.vectors import file as vector_file

PRESENT, ABSENT, NEGATIVE = tiny.cond(1), tiny.cond(2), tiny.cond(3, tokens=2)
SITES = [f"blocks.{index}.cross_attn.proj" for index in range(tiny.DEPTH)]


def request(model, present=PRESENT, absent=ABSENT, negative=NEGATIVE, **changes):
    return tiny.request(model, present, absent, negative, **{"noise": "same state", "samples": 4, "rank": 4, **changes})


def extract(model, *prompts, **changes):
    return extraction.extract(model, request(model, *prompts, **changes))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(pixart):
    yield
    assert tiny.hook_count(pixart) == 0
    assert "medsteer_observers" not in pixart.model_options.get("transformer_options", {})


@pytest.fixture
def runs(monkeypatch):
    """The latents of every run of an extraction, with the conditioning that it followed and its noise."""
    made, real = [], sampling.sample_beside

    def remembered(model, positive, negative, other, noise, *rest):
        made.append((positive, noise, real(model, positive, negative, other, noise, *rest)))
        return made[-1][-1]

    monkeypatch.setattr(sampling, "sample_beside", remembered)
    return made


# What is recorded


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral"])
@pytest.mark.parametrize("cfg", [3.0, 1.0])
def test_the_other_prompt_does_not_touch_the_trajectory(pixart, runs, sampler, cfg):
    wanted = request(pixart, sampler=sampler, cfg=cfg)
    extraction.extract(pixart, wanted)
    (followed, noise, latents), (other_followed, _, _) = runs
    assert followed is PRESENT and other_followed is ABSENT
    plain = sampling.sample(pixart, PRESENT, NEGATIVE, noise, wanted.schedule, cfg, wanted.seed)
    assert torch.equal(latents, plain)


def test_half_of_the_images_follow_each_prompt_from_noises_of_their_own(pixart, runs):
    facts = extract(pixart, samples=5).provenance
    assert facts["noise_indices"] == {"present": [0, 5, 2], "absent": [1, 5, 2]}
    empty = tiny.latent()["samples"]
    noises = torch.cat([noise for _, noise, _ in runs])
    assert torch.equal(noises, sampling.noise_for(empty, 5, [0, 2, 4, 1, 3]))


def naive_pairs(model, wanted, image):
    """(site, sigma) -> (present, absent) tokens (n, C) of one image's trajectory, each prompt run by itself."""
    noise, states = sampling.noise_for(wanted.latent["samples"], wanted.seed, [image]), []
    followed = PRESENT if image % 2 == 0 else ABSENT

    def remember(_step, _x0, x, _steps):
        states.append(x.clone())

    sampling.sample(model, followed, NEGATIVE, noise, wanted.schedule, wanted.cfg, wanted.seed, remember)
    found = {}
    for x, sigma in zip(states, wanted.schedule.sigmas.tolist(), strict=False):
        sides = []
        for prompt in (PRESENT, ABSENT):
            with tiny.spying(model, prompt=prompt) as rows, torch.no_grad():
                options = {"sigmas": torch.tensor([sigma])}
                context = prompt[0][0]
                model.model.apply_model(x, torch.tensor([sigma]), c_crossattn=context, transformer_options=options)
            sides.append({row.site: row.raw for row in rows})
        found |= {(site, sigma): (sides[0][site], sides[1][site]) for site in SITES}
    return found


def test_the_maps_are_those_of_a_plain_computation(pixart):
    """Class means, and how well the map predicts the difference, from activations recorded one by one."""
    wanted = request(pixart)
    vector = extraction.extract(pixart, wanted)
    images = [naive_pairs(pixart, wanted, image) for image in range(4)]
    for step, sigma in enumerate(wanted.schedule.sigmas[:-1].tolist()):
        for site in SITES:
            present, absent = (torch.cat([image[site, sigma][side] for image in images]) for side in (0, 1))
            values = vector.sites[site]
            torch.testing.assert_close(values.centres[step], (present.mean(0) + absent.mean(0)) / 2, rtol=0, atol=1e-4)
            mean = values.directions[step] @ (present - absent).mean(0)
            torch.testing.assert_close(values.gaps[step], mean, rtol=1e-3, atol=1e-4)
            held = ((present - absent) @ values.directions[step].mT).square().sum()
            best = torch.linalg.svdvals((present - absent).double())[:4].square().sum()
            torch.testing.assert_close(held.double(), best, rtol=1e-4, atol=0)


def test_what_is_read_from_new_states_predicts_the_difference_there(pixart):
    """Image 99 was not in the extraction."""
    wanted = request(pixart, samples=8, rank=8)
    vector = extraction.extract(pixart, wanted)
    left = total = 0.0
    for (site, sigma), (present, absent) in naive_pairs(pixart, wanted, 99).items():
        at = vector.at(site, sigma)
        predicted = (present @ at.readers.mT + at.offsets) @ at.directions
        left += float((present - absent - predicted).square().sum())
        total += float((present - absent).square().sum())
    assert 1 - left / total > 0.9
    assert vector.provenance["explained"] > 0.9


def close(one, other, tolerance=1e-3):
    """Whether two vectors' maps take the same from the same activations."""
    a = torch.randn(50, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    for name in SITES:
        for step in range(one.steps):
            taken = [
                (a @ site.readers[step].mT + site.offsets[step]) @ site.directions[step]
                for site in (one.sites[name], other.sites[name])
            ]
            torch.testing.assert_close(taken[0], taken[1], rtol=0, atol=tolerance * float(taken[0].abs().max()))


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_size_of_the_batches_does_not_matter(pixart, monkeypatch, sampler):
    vectors = []
    for size in (1, 3, 4):
        monkeypatch.setattr(sampling, "batch_that_fits", lambda *_args, size=size: size)
        vectors.append(extract(pixart, sampler=sampler))
    close(vectors[0], vectors[1])
    close(vectors[0], vectors[2])


@pytest.mark.parametrize(("sampler", "levels"), [("heun", 4), ("dpm_2", 7)])
def test_samplers_that_call_the_model_twice_a_step_are_paired(pixart, sampler, levels):
    vector = extract(pixart, sampler=sampler)
    assert vector.steps == levels
    assert vector.provenance["explained"] > 0.8  # pairs of different states would be predicted badly


def test_prompts_of_different_lengths_are_paired(pixart):
    """ComfyUI evaluates each in a call of its own, whichever the trajectory follows."""
    long, short = tiny.cond(1, tokens=5), tiny.cond(2, tokens=3)
    vector = extract(pixart, long, short, tiny.cond(3, tokens=2))
    assert vector.provenance["explained"] > 0.8


def test_one_sample_follows_the_present_prompt(pixart, runs):
    vector = extract(pixart, samples=1)
    assert [followed is PRESENT for followed, _, _ in runs] == [True]
    assert vector.provenance["explained"] is None and vector.has_readers
    assert vector.provenance["observations"] == {"present": 1, "absent": 1}


def test_provenance_and_summary_say_how_the_vector_was_made(pixart):
    vector = extract(pixart)
    wanted = {"noise": "same state", "rank": 4, "samples": 4, "estimator": "affine_map", "token_pairs": 4 * 16}
    assert {name: vector.provenance[name] for name in wanted} == wanted
    assert set(vector.provenance["explained_by_site"]) == set(SITES)
    summary = describe(vector)
    assert "4 same state samples, seed 5" in summary and "rank 4" in summary
    assert f"{vector.provenance['explained']:.0%} of the difference predicted at unseen images" in summary


def test_the_same_request_gives_the_same_vector_which_a_file_keeps(pixart, tmp_path):
    vector = extract(pixart)
    back = vector_file.load(vector_file.save(vector, tmp_path / "v.safetensors"))
    assert extract(pixart).content_hash() == vector.content_hash() == back.content_hash()
    outputs = [tiny.run(tiny.steered(pixart, v, operator="affine"), PRESENT, NEGATIVE) for v in (vector, back)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("rank", [0, 49])
def test_a_rank_that_cannot_be_is_refused(pixart, rank):
    with pytest.raises(MedSteerError, match=f"rank is {rank}; "):
        extract(pixart, rank=rank)


def test_identical_prompts_are_refused(pixart):
    with pytest.raises(MedSteerError, match="'present' and 'absent' are the same"):
        extract(pixart, PRESENT, tiny.cond(1))


# Progress and cancelling


def test_progress_counts_samples_times_steps_and_leaves_room_for_the_fit(pixart, monkeypatch):
    seen = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "__init__", lambda bar, total: bar.__dict__.update(current=0, all=total)
    )
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda bar, value, **_: advance(bar, value))

    def advance(bar, value):
        bar.current = value
        seen.append((value, bar.all))

    extract(pixart, samples=3, steps=4)
    assert seen == [(value, 13) for value in (2, 4, 6, 8, 9, 10, 11, 12)]


def test_cancelling_in_the_middle_leaves_no_hooks(pixart, monkeypatch):
    def cancel(*_args, **_kwargs):
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        extract(pixart)
    assert tiny.hook_count(pixart) == 0


# Steering


ONE, OTHER = tiny.cond(1, tokens=1), tiny.cond(2, tokens=1)


def test_where_the_difference_is_exactly_affine_strength_1_gives_the_absent_prompts_image(pixart):
    """A prompt of one token adds the same to every token, whatever the state: a map of rank 1 says it all."""
    vector = extract(pixart, ONE, OTHER, rank=1, steps=6)
    steered = tiny.steered(pixart, vector, operator="affine", rows="positive")
    absent = tiny.run(pixart, OTHER, NEGATIVE)
    torch.testing.assert_close(tiny.run(steered, ONE, NEGATIVE), absent, rtol=0, atol=1e-4 * float(absent.abs().max()))
    assert (tiny.run(pixart, ONE, NEGATIVE) - absent).norm() > 0.05 * absent.norm()


def test_strength_1_moves_the_image_most_of_the_way_to_the_absent_prompts(pixart):
    vector = extract(pixart, samples=8, rank=8, steps=6)
    absent, factual = (tiny.run(pixart, prompt, NEGATIVE) for prompt in (ABSENT, PRESENT))
    steered = tiny.run(tiny.steered(pixart, vector, operator="affine", rows="positive"), PRESENT, NEGATIVE)
    assert (steered - absent).norm() < 0.4 * (factual - absent).norm()


def test_strength_zero_is_bit_identical(pixart):
    steered = tiny.steered(pixart, extract(pixart), operator="affine", strength=0.0)
    assert torch.equal(tiny.run(steered, PRESENT, NEGATIVE), tiny.run(pixart, PRESENT, NEGATIVE))


def test_the_other_operators_work_with_such_a_vector(pixart):
    vector, factual = extract(pixart), tiny.run(pixart, PRESENT, NEGATIVE)
    for operator in ("suppress", "ablate", "add"):
        image = tiny.run(tiny.steered(pixart, vector, operator=operator), PRESENT, NEGATIVE)
        assert image.isfinite().all() and not torch.equal(image, factual)


def test_vectors_with_and_without_readers_can_be_chained(pixart):
    steered = tiny.steered(pixart, tiny.vector(pixart), operator="ablate")
    both = tiny.steered(steered, extract(pixart), operator="affine")
    images = [tiny.run(model, PRESENT, NEGATIVE) for model in (pixart, steered, both)]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


def test_a_vector_without_readers_is_refused_before_anything_runs(pixart):
    with pytest.raises(MedSteerError, match="'affine' needs a vector that was extracted with noise 'same state'"):
        tiny.steered(pixart, tiny.vector(pixart), operator="affine")


def test_on_endophantom_it_flips_a_diffuse_finding_that_suppression_does_not(endophantom):
    """Ulcerative colitis to normal cecum, four images, judged by the bundle's classifier."""
    model, clip, vae = endophantom
    texts = ("An endoscopic image of ulcerative colitis", "An endoscopic image of normal cecum", "")
    present, absent, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts)
    schedule = sampling.schedule(model, 20, "euler", "normal")
    latent = {"samples": torch.zeros(1, 4, 16, 16), "downscale_ratio_spacial": 8}

    def vector(noise):
        wanted = extraction.Request(present, absent, negative, latent, 4, 1000, 4.0, noise, schedule)
        return extraction.extract(model, wanted)

    noise = sampling.noise_for(sampling.empty_latent(model, latent), 20000, range(4))
    judges = Bundle().judges()

    def healthy(noise_mode, operator, strength):
        options = {"operator": operator, "strength": strength, "start": 0.5, "rows": "positive"}
        steered = tiny.steered(model, vector(noise_mode), keep_norm=False, **options)
        latents = sampling.sample(steered, present, negative, noise, schedule, 4.0, 0)
        labels = judges(vae.decode(latents)[..., :3].movedim(-1, 1)).labels
        return sum(label == "normal cecum" for label in labels)

    assert healthy("same state", "affine", 1.5) >= 3
    assert healthy("paired", "suppress", 2.0) == 0
