"""Counterfactuals that compute the tokens of their mask alone; the rest stands for itself as the factual left it."""

from dataclasses import replace

import comfy.model_management
import company
import families
import pytest
import tiny
import torch
from comfy_extras.nodes_mahiro import Mahiro
from medsteer_pack.medsteer_core.host.patching.tokens import KeptCall, KeptTokens, token_index
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.host.sampling.counterfactual import CONCEPT, PairRequest, sample_pair
from medsteer_pack.medsteer_core.host.sampling.pair_request import ALL, IN_MASK

CORNER = torch.zeros(1, 8, 8)
CORNER[:, :3, :5] = 1  # latent pixels: tokens of 2 x 2 pixels, 2 x 3 of 4 x 4


def request(model, *, sampler="euler", steps=4, batch=1, computed=IN_MASK, mask=CORNER, cfg=3.0, **changes):
    schedule = sampling.schedule(model, steps, sampler, "normal")
    return PairRequest(
        tiny.cond(1), tiny.cond(2), tiny.latent(batch=batch), 11, cfg, schedule, mask=mask, computed_tokens=computed,
        **changes,
    )  # fmt: skip


def steered(model, **changes):
    return tiny.steered(model, tiny.vector(model), **{"operator": "suppress", "strength": 2.0, "start": 0.3, **changes})


def tokens_seen(model, way):
    """The tokens that every block's MLP was given."""
    seen = []
    handles = [block.mlp.register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape[1]))
               for block in model.model.diffusion_model.blocks]  # fmt: skip
    try:
        way()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def outside(pair):
    return pair.mask[:, None, ::8, ::8].expand_as(pair.factual) == 0


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "euler_cfg_pp"])
def test_only_the_masks_tokens_are_computed_and_the_rest_stays(pixart, sampler):
    model, pairs = steered(pixart), []
    asked = request(model, sampler=sampler)
    seen = tokens_seen(pixart, lambda: pairs.append(sample_pair(model, asked)))
    (pair,) = pairs
    assert set(seen) == {16, 6} and "38% of the tokens computed" in pair.summary
    assert pair.records[0]["made"]["computed"] == {"tokens": 6, "of": 16}
    dense = sample_pair(model, replace(asked, computed_tokens=ALL))
    assert torch.equal(pair.factual, dense.factual) and "computed" not in dense.records[0]["made"]
    assert torch.equal(pair.counterfactual[outside(pair)], pair.factual[outside(pair)])
    inside = ~outside(pair)
    moved = (dense.counterfactual - dense.factual)[inside].norm()
    assert (pair.counterfactual - dense.counterfactual)[inside].norm() < 0.5 * moved


def test_with_one_block_it_is_what_a_full_call_gives():
    """Keys and values of the first block depend on the tokens themselves alone, so nothing is approximated there."""
    model = tiny.model(depth=1)
    turned = steered(model)
    sparse, dense = (sample_pair(turned, request(turned, computed=computed)) for computed in (IN_MASK, ALL))
    torch.testing.assert_close(sparse.counterfactual, dense.counterfactual, rtol=1e-4, atol=1e-4)
    assert (dense.counterfactual - dense.factual).abs().max() > 1e-2


def test_a_white_mask_computes_everything(pixart):
    model = steered(pixart)
    sparse, dense = (
        sample_pair(model, request(model, computed=computed, mask=torch.ones(1, 8, 8))) for computed in (IN_MASK, ALL)
    )
    torch.testing.assert_close(sparse.counterfactual, dense.counterfactual, rtol=1e-4, atol=1e-4)
    assert "100% of the tokens computed" in sparse.summary


def test_all_tokens_is_the_default_of_old_workflows_and_without_a_mask_nothing_is_kept(pixart):
    model = steered(pixart)
    assert PairRequest.computed_tokens == ALL
    free = request(model, mask=None)
    seen = tokens_seen(pixart, lambda: sample_pair(model, free))
    assert set(seen) == {16} and "tokens" not in sample_pair(model, free).summary


@pytest.mark.parametrize("lock", [CONCEPT])
def test_the_lock_by_a_map_works_too(pixart, lock):
    model = steered(pixart)
    pair = sample_pair(model, request(model, mask=None, lock=lock, threshold=0.9, dilation=0, batch=2))
    assert "of the tokens computed" in pair.summary
    assert torch.equal(pair.counterfactual[outside(pair)], pair.factual[outside(pair)])


def test_images_of_a_batch_have_masks_of_their_own(pixart):
    model = steered(pixart)
    masks = torch.zeros(2, 8, 8)
    masks[0, :2, :2], masks[1, 4:, 4:] = 1, 1
    pair = sample_pair(model, request(model, mask=masks, batch=2))
    assert "25% of the tokens computed" in pair.summary  # of the larger mask
    for image in range(2):
        changed = (pair.counterfactual - pair.factual)[image].abs().amax(dim=0) > 0
        assert torch.equal(changed, masks[image].bool())


def test_guidance_sees_a_whole_image(pixart):
    """Mahiro compares whole predictions: where nothing was computed they are the factual's, with and without prompt."""
    heard = []

    def listen(args):
        heard.append((float(args["sigma"].max()), args["cond_denoised"].clone(), args["uncond_denoised"].clone()))
        return args["denoised"]

    model = pixart.clone()
    model.set_model_sampler_post_cfg_function(listen)
    turned = steered(model)
    aligned = torch.zeros(1, 8, 8)
    aligned[:, :4, :6] = 1  # whole tokens
    pair = sample_pair(turned, request(turned, mask=aligned))
    factual, own = heard[:4], heard[4:]
    assert own
    for sigma, *parts in own:
        expected = next(values for level, *values in factual if level == sigma)
        for part, whole in zip(parts, expected, strict=True):
            torch.testing.assert_close(part[outside(pair)], whole[outside(pair)], rtol=1e-5, atol=1e-5)
    mahiro = steered(Mahiro.execute(pixart).result[0])
    assert torch.isfinite(sample_pair(mahiro, request(mahiro)).counterfactual).all()


def low_vram(double):
    return company.offloaded(company.load_peft_lora(double))


@pytest.mark.parametrize("build", [company.load_peft_lora, company.lazycache, company.mahiro, low_vram])
def test_it_goes_with_company(build):
    scene = build(False)
    model = tiny.steered(scene.model, families.vector(scene.model), operator="suppress", strength=2.0)
    schedule = sampling.schedule(model, scene.steps, "euler", "normal")
    latent = scene.small.empty(2, batch_index=[0, 1])
    height, width = latent["samples"].shape[-2:]
    mask = torch.zeros(1, height, width)
    mask[:, : height // 2] = 1
    texts = scene.texts["positive"], scene.texts["negative"]
    pair = sample_pair(model, PairRequest(*texts, latent, 7, scene.cfg, schedule, mask=mask, computed_tokens=IN_MASK))
    assert torch.equal(pair.factual, scene.run(scene.model, (0, 1)))
    assert "50% of the tokens computed" in pair.summary
    assert (pair.counterfactual - pair.factual).abs().max() > 1e-3


def test_what_cannot_do_with_some_tokens_computes_all_and_says_so(pixart):
    scene = company.start("sd15", False)
    model = tiny.steered(scene.model, families.vector(scene.model), operator="suppress", strength=2.0)
    schedule = sampling.schedule(model, scene.steps, "euler", "normal")
    latent = scene.small.empty(1)
    mask = torch.zeros(1, *latent["samples"].shape[-2:])
    mask[:, :2] = 1
    texts = scene.texts["positive"], scene.texts["negative"]
    asked = PairRequest(*texts, latent, 7, scene.cfg, schedule, mask=mask, computed_tokens=IN_MASK)
    pair = sample_pair(model, asked)
    assert "all tokens computed: this model can't do with some" in pair.summary
    assert torch.equal(pair.counterfactual, sample_pair(model, replace(asked, computed_tokens=ALL)).counterfactual)


def test_over_the_memory_limit_all_tokens_are_computed(pixart):
    model = steered(pixart)
    asked = request(model, kept_gigabytes=1e-6)
    pair = sample_pair(model, asked)
    assert "all tokens computed: keeping them takes" in pair.summary and "0.00 are allowed" in pair.summary
    assert torch.equal(pair.counterfactual, sample_pair(model, replace(asked, computed_tokens=ALL)).counterfactual)


def test_a_mask_on_steer_wants_all_tokens(pixart):
    vector = tiny.vector(pixart)
    from medsteer_pack.medsteer_core.host.patching import steer

    model = steer.steer(pixart, vector, "suppress", {"strength": 2.0}, 0.3, 1.0, "all", "all", mask=CORNER)[0]
    assert "all tokens computed: Steer has a mask" in sample_pair(model, request(model)).summary


@pytest.mark.parametrize("where", ["factual", "counterfactual"])
@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), comfy.model_management.InterruptProcessingException(), torch.OutOfMemoryError()]
)
def test_nothing_is_left_behind_after_an_error(pixart, monkeypatch, where, error):
    model, network = steered(pixart), pixart.model.diffusion_model
    expected = sample_pair(model, request(model)).counterfactual
    calls, last = [], network.blocks[-1].mlp.forward

    def broken(tokens):
        calls.append(tokens.shape[1])
        if tokens.shape[1] < 16 or (where == "factual" and len(calls) == 3):
            raise error
        return last(tokens)

    with monkeypatch.context() as patched:
        patched.setattr(network.blocks[-1].mlp, "forward", broken)
        with pytest.raises(type(error)):
            sample_pair(model, request(model))
    assert tiny.hook_count(pixart) == 0
    assert not any("forward" in block.attn.__dict__ for block in network.blocks)
    assert torch.equal(sample_pair(model, request(model)).counterfactual, expected)


def test_focus_counts_the_tokens_that_are_not_there_as_unchanged():
    from medsteer_pack.medsteer_core.steering.operators import make_operator

    operator = make_operator("affine", strength=2.0, focus=1.5)
    assert operator.among(0.25).focus == pytest.approx(0.75) and operator.among(1.0).focus == 1.5
    assert operator.to_dict()["focus"] == 1.5


def test_tokens_of_a_mask():
    mask = torch.zeros(1, 5, 6, dtype=torch.bool)
    mask[0, 4, 2] = True  # in the last row of tokens, which sticks out of the latent
    index, tokens = token_index(mask, 2, 0)
    assert tokens == 9 and index.tolist() == [[7]]
    assert token_index(mask, 2, 1)[0].tolist() == [[3, 4, 5, 6, 7, 8]]
    assert token_index(torch.zeros(1, 4, 4, dtype=torch.bool), 2, 0)[0].shape == (1, 1)


def test_what_is_kept_is_counted_and_let_go_of():
    def call():
        return KeptCall(("positive",), [torch.zeros(1, 4, 10)], torch.zeros(1, 4, 5))

    kept = KeptTokens(limit=10_000, calls=2)
    kept.add((1.0, 0), call())
    assert kept.size == 240 and (1.0, 0) in kept
    assert kept.chunk((1.0, 0), "positive", 0, 0).shape == (1, 4, 10)
    assert kept.chunk((1.0, 0), "positive", 1, 0) is None and kept.chunk((2.0, 0), "positive", 0, None) is None
    small = KeptTokens(limit=400, calls=2)  # the first call shows that two would not fit
    small.add((1.0, 0), call())
    assert small.left_out and small.size == 0 and (1.0, 0) not in small


def test_what_does_not_fit_onto_the_device_goes_to_the_spare_one():
    def call():
        return KeptCall(("positive",), [torch.zeros(1, 4, 10)], torch.zeros(1, 4, 5))

    spare = torch.device("meta")  # a device that tells where its tensors are, and holds nothing
    kept = KeptTokens(limit=500, calls=2, spare=(spare, 600))
    kept.add((1.0, 0), call())
    assert kept.chunk((1.0, 0), "positive", 0, 0).device.type == "cpu"  # it fits where it is
    roomy = KeptTokens(limit=100, calls=2, spare=(spare, 600))
    for sigma in (1.0, 0.5):
        roomy.add((sigma, 0), call())
        assert roomy.chunk((sigma, 0), "positive", 0, None).device == spare
    roomy.add((0.2, 0), call())  # more calls than were expected, and more than the spare device may hold
    assert roomy.left_out and (1.0, 0) not in roomy
