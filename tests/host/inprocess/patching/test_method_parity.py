"""The method itself, against an implementation of its rules that shares no line with the pack.

The reference below works on diffusers' PixArtTransformer2DModel and is written from the method's rules alone: hooks on
the output projection of every block's text cross-attention, steps counted as they come, Euler's method written out. The
pack does the same in ComfyUI with the same weights. Both extract a vector of their own and steer with it.
"""

import pickle
from functools import partial

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from medsteer_pack.medsteer_core.checkpoints.pixart_sigmas import pixart_sigmas
from medsteer_pack.medsteer_core.host.loading.pixart import allow_any_size
from medsteer_pack.medsteer_core.host.sampling import extraction
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.nodes.steer import Steer
from medsteer_pack.nodes.vectors import ImportPathologyVector

diffusers = pytest.importorskip("diffusers")

DEPTH, HEADS, HEAD_WIDTH, CAPTION, STEPS, SEEDS, CFG, SEED = 28, 3, 16, 12, 7, 3, 4.5, 11
WIDTH = HEADS * HEAD_WIDTH
TOLERANCE = 1e-4  # both compute in float32; what was seen is 1e-6
RULES = {  # as the papers give them: strength, blocks, whether the rows without the prompt are steered too, norm kept
    "MedSteer (paper)": (2.0, range(28), True, True),
    "PolypSteer": (2.5, range(8, 16), False, False),
}


# The reference


def schedule():
    """Timesteps (S,) and sigmas (S + 1,) of the published scheduler."""
    timesteps = np.linspace(0, 999, STEPS + 1).round()[::-1][:-1]
    abar = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))[timesteps.astype(int)]
    return torch.tensor(timesteps.copy()), [*np.sqrt((1 - abar) / abar), 0.0]


def sample_reference(network, noise, cond, uncond):
    """The guided prediction of the clean latent at every step, then the final latent: (S + 1, batch, C, h, w)."""
    timesteps, sigmas = schedule()
    x, predictions = noise * (1 + sigmas[0] ** 2) ** 0.5, []
    for timestep, sigma, after in zip(timesteps, sigmas, sigmas[1:], strict=False):
        noises = []
        for text in (cond, uncond):  # the call with the prompt first
            out = network(
                x / (1 + sigma**2) ** 0.5, encoder_hidden_states=text.expand(len(x), -1, -1),
                timestep=timestep.expand(len(x)), added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample  # fmt: skip
            noises.append(out[:, :4])
        noise_at = noises[1] + CFG * (noises[0] - noises[1])
        predictions.append(x - sigma * noise_at)
        x = x + (after - sigma) * noise_at
    return torch.stack([*predictions, x])


def hooked(network, visit, run):
    """run() while visit(block, call, output) sees, and may replace, every cross-attention's projected output."""
    calls, handles = [0] * DEPTH, []

    def hook(block, _module, _inputs, output):
        calls[block] += 1
        return visit(block, calls[block] - 1, output)

    for block, module in enumerate(network.transformer_blocks):
        handles.append(module.attn2.to_out[0].register_forward_hook(partial(hook, block)))
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


def extract_reference(network, present, absent, uncond, noises):
    """Unit directions (S, blocks, C): means over image tokens and images of the calls with the prompt."""
    means = []
    for text, noise in zip((present, absent), noises, strict=True):
        found = torch.zeros(STEPS, DEPTH, WIDTH, dtype=torch.float64)

        def visit(block, call, output, found=found):
            if call % 2 == 0:
                found[call // 2, block] = output.double().mean(dim=(0, 1))

        hooked(network, visit, partial(sample_reference, network, noise, text, uncond))
        means.append(found)
    difference = means[0] - means[1]
    return (difference / difference.norm(dim=-1, keepdim=True)).float()


def steer_reference(network, directions, preset, noise, cond, uncond):
    strength, blocks, both, keep_norm = RULES[preset]

    def visit(block, call, a):
        if block in blocks and (both or call % 2 == 0):
            d = directions[call // 2, block]
            steered = a - strength * (a @ d).clamp(min=0)[..., None] * d
            return steered * (a.norm(dim=-1) / steered.norm(dim=-1))[..., None] if keep_norm else steered

    return hooked(network, visit, partial(sample_reference, network, noise, cond, uncond))


# Both models


@pytest.fixture(scope="module")
def transformer():
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_WIDTH, in_channels=4, out_channels=8, num_layers=DEPTH,
        cross_attention_dim=WIDTH, caption_channels=CAPTION, sample_size=64, patch_size=2,
        use_additional_conditions=False,
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # weights under which every layer matters and nothing explodes
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return network


@pytest.fixture(scope="module")
def model(transformer):
    """The same weights as ComfyUI's PixArt-alpha, which predicts noise on a schedule of linear betas."""
    config = comfy.supported_models.PixArtAlpha(
        {"in_channels": 4, "hidden_size": WIDTH, "depth": DEPTH, "num_heads": HEADS, "caption_channels": CAPTION,
         "micro_condition": False, "pred_sigma": True}
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    config.latent_format = comfy.latent_formats.LatentFormat()
    made = comfy.model_base.PixArt(config).eval()
    left = made.diffusion_model.load_state_dict(comfy_weights(transformer.state_dict()), strict=False)
    assert (left.missing_keys, left.unexpected_keys) == (["y_embedder.y_embedding"], [])  # the former is for training
    return allow_any_size(comfy.model_patcher.CoreModelPatcher(made, torch.device("cpu"), torch.device("cpu")))


def comfy_weights(state):
    """diffusers' weights under ComfyUI's names, by ComfyUI's own table."""
    table, result = comfy.utils.pixart_to_diffusers({"depth": DEPTH, "hidden_size": WIDTH}), {}
    assert {key for key in state if key not in table} <= {"pos_embed.pos_embed"}
    for key, value in state.items():
        if isinstance(table.get(key), tuple):
            name, (_, start, length) = table[key]
            parts = 3 if ".qkv." in name else 2
            whole = result.setdefault(name, torch.zeros(parts * WIDTH, *value.shape[1:]))
            whole[start : start + length] = value
        elif key in table:
            result[table[key]] = value
    return result


def text(seed, tokens=4):
    return torch.randn(1, tokens, CAPTION, generator=torch.Generator().manual_seed(seed))


def noise(seed, images):
    latent = torch.zeros(1, 4, 16, 16)
    return torch.cat([comfy.sample.prepare_noise(latent, seed, [image]) for image in images])


PRESENT, ABSENT, UNCOND = text(1), text(2), text(3)


def plan(model):
    return sampling.schedule(model, STEPS, "euler", "normal", sigmas=pixart_sigmas(STEPS))


def predictions(model, start, cond, uncond):
    """The same from the pack, by ComfyUI's own sampler."""
    seen = []
    arguments = ([[cond, {}]], [[uncond, {}]], start, plan(model), CFG, 0)
    final = sampling.sample(model, *arguments, callback=lambda _step, x0, _x, _steps: seen.append(x0.clone()))
    return torch.stack([*seen, final])


def run_node(node, *arguments, **more):
    """The first output of a node that ComfyUI would run."""
    return node.PREPARE_CLASS_CLONE(None).execute(*arguments, **more).result[0]


def worst(ours, reference):
    """Max relative error: the largest difference of a step over the largest value of that step, over all steps."""
    dims = tuple(range(1, ours.ndim))
    return float(((ours - reference).abs().amax(dims) / reference.abs().amax(dims)).max())


@pytest.fixture(scope="module")
def both_vectors(model, transformer):
    """noise mode -> (the reference's directions (S, blocks, C), the pack's vector)."""

    @torch.no_grad()
    def make(mode, present, absent):
        noises = noise(SEED, present), noise(SEED, absent)
        reference = extract_reference(transformer, PRESENT, ABSENT, UNCOND, noises)
        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        request = extraction.Request(
            [[PRESENT, {}]], [[ABSENT, {}]], [[UNCOND, {}]], latent, SEEDS, SEED, CFG, mode, plan(model)
        )
        return reference, extraction.extract(model, request)

    unpaired = range(0, 2 * SEEDS, 2), range(1, 2 * SEEDS, 2)
    return {"unpaired": make("unpaired", *unpaired), "paired": make("paired", range(SEEDS), range(SEEDS))}


MODES = {"MedSteer (paper)": "unpaired", "PolypSteer": "paired"}  # how each method extracts


# Parity


@torch.no_grad()
def test_both_models_predict_the_same_without_steering(model, transformer):
    start = noise(2, range(2))
    for uncond in (UNCOND, text(5, tokens=7)):
        reference = sample_reference(transformer, start, PRESENT, uncond)
        assert worst(predictions(model, start, PRESENT, uncond), reference) < TOLERANCE


@pytest.mark.parametrize("mode", ["unpaired", "paired"])
def test_the_vectors_are_the_same_at_every_step_and_block(both_vectors, mode):
    reference, vector = both_vectors[mode]
    assert vector.site_names == tuple(f"blocks.{block}.cross_attn.proj" for block in range(DEPTH))
    ours = torch.stack([site.directions[:, 0] for site in vector.sites.values()], dim=1)
    cosines = torch.nn.functional.cosine_similarity(ours.double(), reference.double(), dim=-1)
    assert cosines.shape == (STEPS, DEPTH) and float(cosines.min()) > 0.9999
    # and the steps do differ, so that a shift by one would be seen
    shifted = torch.nn.functional.cosine_similarity(ours[1:], reference[:-1], dim=-1)
    assert float(shifted.min()) < 0.9999


@pytest.mark.parametrize("tokens", [4, 7], ids=["prompts of one length", "prompts of two lengths"])
@pytest.mark.parametrize("preset", RULES)
@torch.no_grad()
def test_steered_predictions_are_the_same_over_the_whole_trajectory(model, transformer, both_vectors, preset, tokens):
    start, uncond = noise(2, range(2)), text(3, tokens)
    directions, vector = both_vectors[MODES[preset]]
    reference = steer_reference(transformer, directions, preset, start, PRESENT, uncond)
    steered = run_node(Steer, model, vector, 0.0, 1.0, "all", "all", preset=preset)
    ours = predictions(steered, start, PRESENT, uncond)
    assert worst(ours, reference) < TOLERANCE
    assert worst(ours, predictions(model, start, PRESENT, uncond)) > 0.05  # steering is no small thing here
    (other,) = set(RULES) - {preset}
    assert (
        worst(ours, steer_reference(transformer, directions, other, start, PRESENT, uncond)) > 0.05
    )  # nor is the preset


@pytest.mark.parametrize("preset", RULES)
@torch.no_grad()
def test_the_references_own_pickle_steers_as_the_reference_does(
    model, transformer, both_vectors, preset, tmp_path, monkeypatch
):
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    directions, _ = both_vectors[MODES[preset]]
    steps = {step: {"blocks": list(blocks.numpy())} for step, blocks in enumerate(directions)}
    (tmp_path / "field.pickle").write_bytes(pickle.dumps(steps))
    schedule = "PixArt-alpha DPM-Solver++ (diffusers)"
    vector = run_node(ImportPathologyVector, "input/field.pickle", model, schedule, STEPS)
    start = noise(2, range(2))
    reference = steer_reference(transformer, directions, preset, start, PRESENT, UNCOND)
    steered = run_node(Steer, model, vector, 0.0, 1.0, "all", "all", preset=preset)
    assert worst(predictions(steered, start, PRESENT, UNCOND), reference) < TOLERANCE
