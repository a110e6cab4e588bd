"""Nodes between ComfyUI and the model that hand its rows on in another order and number, as those that tile do.

They leave the names of the rows as they were, so that a row is told by its text here, or the call is refused.
"""

import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.patching.rows import names_by_text, ranges_of
from medsteer_pack.medsteer_core.host.sampling import extraction
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.host.sampling.counterfactual import CONCEPT, OPEN, PREDICTION, PairRequest, sample_pair
from medsteer_pack.medsteer_core.host.sampling.pair_request import IN_MASK

SIDE = 16
TEXTS = {"positive": tiny.cond(1), "negative": tiny.cond(2)}


def tiled(model, across=2, by_conditioning=False):
    """A clone whose calls are cut into ``across`` x ``across`` tiles that are put together as rows: tile by tile with
    all conditionings in each, or one conditioning's tiles after the other's."""
    step = SIDE // across

    def order(rows, tiles):
        places = torch.arange(tiles * rows).view(tiles, rows)
        return places.T.flatten() if by_conditioning else places.flatten()

    def call(apply_model, arguments):
        x, names = arguments["input"], arguments["cond_or_uncond"]
        places = [(y, z) for y in range(0, SIDE, step) for z in range(0, SIDE, step)]
        turned = order(len(x), len(places))
        tiles = torch.cat([x[..., y : y + step, z : z + step] for y, z in places])[turned]
        given = {key: value for key, value in arguments["c"].items() if key != "c_crossattn"}
        text = arguments["c"]["c_crossattn"].repeat(len(places), 1, 1)[turned]
        times = arguments["timestep"].repeat(len(places))[turned]
        made = apply_model(tiles, times, c_crossattn=text, **given)[turned.argsort()].unflatten(0, (len(places), -1))
        result = torch.empty_like(x)
        for place, (y, z) in enumerate(places):
            result[..., y : y + step, z : z + step] = made[place]
        assert arguments["c"]["transformer_options"]["cond_or_uncond"] == names
        return result

    clone = model.clone()
    clone.set_model_unet_function_wrapper(call)
    return clone


def one_by_one(model):
    """A clone that gives the model each conditioning's rows in a call of their own, and lets their names stand."""

    def call(apply_model, arguments):
        count = len(arguments["cond_or_uncond"])
        rest = {key: value for key, value in arguments["c"].items() if key != "c_crossattn"}
        parts = zip(*(arguments[key].chunk(count) for key in ("input", "timestep")),
                    arguments["c"]["c_crossattn"].chunk(count), strict=True)  # fmt: skip
        return torch.cat([apply_model(x, t, c_crossattn=text, **rest) for x, t, text in parts])

    clone = model.clone()
    clone.set_model_unet_function_wrapper(call)
    return clone


WAYS = {
    "tile by tile": tiled,
    "conditioning by conditioning": lambda model: tiled(model, by_conditioning=True),
    "one by one": one_by_one,
}


def run(model, texts=TEXTS, batch=1):
    return tiny.run(model, texts["positive"], texts["negative"], steps=4, cfg=3.0,
                    size=tiny.latent(SIDE, SIDE, batch=batch))  # fmt: skip


def pair(model, lock=OPEN, **changes):
    schedule = sampling.schedule(model, 4, "euler", "normal")
    asked = PairRequest(TEXTS["positive"], TEXTS["negative"], tiny.latent(SIDE, SIDE), 7, 3.0, schedule, lock=lock,
                        computed_tokens=IN_MASK, **changes)  # fmt: skip
    return sample_pair(model, asked)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("rows", ["all", "positive", "negative"])
def test_the_chosen_rows_are_steered_and_no_others(pixart, rows, way, batch):
    steered = tiny.steered(way(pixart), tiny.vector(pixart), rows=rows)
    with tiny.spying(steered, **TEXTS) as found:
        run(steered, batch=batch)
    assert tiny.changed_by_name(found) == {name: {rows in ("all", name)} for name in TEXTS}


def test_texts_of_two_lengths_are_told_in_a_call_that_they_share(pixart):
    texts = {"positive": tiny.cond(1, tokens=4), "negative": tiny.cond(2, tokens=2)}
    steered = tiny.steered(tiled(pixart), tiny.vector(pixart), rows="positive")
    with tiny.spying(steered, **texts) as found:
        run(steered, texts)
    assert tiny.changed_by_name(found) == {"positive": {True}, "negative": {False}}


def test_one_tile_gives_the_pair_of_no_tiles(pixart):
    plain, one = (pair(tiny.steered(model, tiny.vector(pixart))) for model in (pixart, tiled(pixart, across=1)))
    assert torch.equal(plain.factual, one.factual) and torch.equal(plain.counterfactual, one.counterfactual)
    assert not torch.equal(plain.factual, plain.counterfactual)


@pytest.mark.parametrize("lock", [OPEN, PREDICTION])
def test_the_pair_of_a_tiled_model_has_the_unsteered_factual_and_another_counterfactual(pixart, lock):
    model = tiled(pixart)
    made = pair(tiny.steered(model, tiny.vector(pixart), rows="positive"), lock, counterfactual=tiny.cond(3))
    assert torch.equal(made.factual, run(model)) and not torch.equal(made.factual, made.counterfactual)
    if lock == PREDICTION:
        outside = made.mask[:, None, ::8, ::8].expand_as(made.factual) == 0
        assert torch.equal(made.counterfactual[outside], made.factual[outside])


def test_a_concept_map_of_tiles_is_refused(pixart):
    with pytest.raises(MedSteerError, match="There is no concept map: another node shows the model parts of the image"):
        pair(tiny.steered(tiled(pixart), tiny.vector(pixart)), CONCEPT)


def test_rows_that_nothing_tells_apart_are_refused_unless_all_are_steered(pixart):
    same = {"positive": tiny.cond(1), "negative": tiny.cond(1)}
    with pytest.raises(MedSteerError, match="8 rows for 1 images and does not tell which are the prompt's"):
        run(tiny.steered(tiled(pixart), tiny.vector(pixart), rows="positive"), same)
    result = run(tiny.steered(tiled(pixart), tiny.vector(pixart), rows="all"), same)
    assert not torch.equal(result, run(tiled(pixart), same))
    assert tiny.hook_count(pixart) == 0


@pytest.mark.parametrize("noise", ["paired", "unpaired", "same state"])
def test_extraction_is_refused(pixart, noise):
    request = tiny.request(tiled(pixart), tiny.cond(1), tiny.cond(2), tiny.cond(3), noise=noise,
                           latent=tiny.latent(SIDE, SIDE))  # fmt: skip
    with pytest.raises(MedSteerError, match="extraction would see parts of images"):
        extraction.extract(tiled(pixart), request)
    assert tiny.hook_count(pixart) == 0


def test_a_mask_on_steer_is_refused(pixart):
    from medsteer_pack.medsteer_core.host.patching import steer

    steered = steer.steer(tiled(pixart), tiny.vector(pixart), "ablate", {}, 0.0, 1.0, "all", "all",
                          mask=torch.ones(1, SIDE, SIDE))[0]  # fmt: skip
    with pytest.raises(MedSteerError, match="or by a node that tiles"):
        run(steered)


def test_strength_0_leaves_a_tiled_run_as_it_is(pixart):
    still = tiny.steered(tiled(pixart), tiny.vector(pixart), operator="suppress", strength=0.0)
    assert torch.equal(run(still), run(tiled(pixart)))


def test_a_row_is_named_by_the_text_that_it_alone_could_have():
    one, two = torch.arange(6.0).view(1, 2, 3), torch.ones(1, 1, 3)
    rows = torch.cat([two.repeat(1, 2, 1), one, one])
    assert names_by_text(rows, {"a": [one], "b": [two]}) == ["b", "a", "a"]
    assert names_by_text(rows, {"a": [one], "b": [two], "c": [one]}) is None
    assert names_by_text(rows, {"a": [one]}) is None and names_by_text(None, {"a": [one]}) is None
    assert ranges_of(["b", "a", "a", "b"])("b") == [(0, 1), (3, 4)]
    assert ranges_of(["b", "a", "a", "b"])("a") == [(1, 3)] and ranges_of(["a"])("b") == []
