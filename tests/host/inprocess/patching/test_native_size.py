"""What is said of an image's size: the one that comes out, and the one that the model was made for."""

import pytest
import tiny
from medsteer_pack.medsteer_core.host.patching.native_size import about_size, native_side
from medsteer_pack.medsteer_core.host.sampling import extraction
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.host.sampling.counterfactual import PairRequest, sample_pair
from medsteer_pack.nodes.prompts import asked_size


def pair(model, height, width, asked=None):
    schedule = sampling.schedule(model, 2, "euler", "normal")
    request = PairRequest(tiny.cond(1), tiny.cond(2), tiny.latent(height, width), 7, 4.0, schedule,
                          counterfactual=tiny.cond(3), asked_size=asked)  # fmt: skip
    return sample_pair(model, request).summary


@pytest.mark.parametrize(
    ("interpolation", "side", "latent", "suits"),
    [
        (None, 512, (64, 64), True), (1.0, 512, (48, 80), True), (0.5, 256, (32, 32), True),
        (1.0, 512, (128, 128), False), (2.0, 1024, (128, 128), True), (2.0, 1024, (64, 64), False),
    ],
)  # fmt: skip
def test_a_pixart_is_made_for_what_its_positions_say(interpolation, side, latent, suits):
    model = tiny.model(pe_interpolation=interpolation)
    assert native_side(model) == side
    told = about_size(model, (1, 4, *latent))
    assert told == [] if suits else f"made for {side} x {side} pixels, and these are" in told[0]


def test_endophantom_is_made_for_128_pixels_and_nothing_else(endophantom):
    model = endophantom[0]
    assert native_side(model) == 128 and about_size(model, (1, 16, 16, 16)) == []
    for latent in ((16, 13), (64, 64)):
        (told,) = about_size(model, (1, 16, *latent))
        assert f"made for 128 x 128 pixels, and these are {8 * latent[1]} x {8 * latent[0]}: it repeats or" in told


def test_the_summary_says_which_size_came_out_of_which_was_asked_for(pixart):
    said = pair(pixart, 8, 16, asked=(66, 130))
    assert "128 x 64 pixels, seed 7" in said
    assert "130 x 66 pixels were asked for and 128 x 64 come out" in said
    assert "asked for" not in pair(pixart, 8, 16, asked=(64, 128)) + pair(pixart, 8, 16)


def test_extraction_says_it_too(pixart):
    heard = []
    request = tiny.request(pixart, tiny.cond(1), tiny.cond(2), tiny.cond(3), samples=1)
    extraction.extract(pixart, request, heard.append)
    assert "this model was made for 512 x 512 pixels, and these are 64 x 64" in heard[0]


def test_the_size_that_the_graph_asks_for_is_known_where_it_stands_in_widgets():
    prompt = {
        "1": {"inputs": {"width": 130, "height": 66}},
        "2": {"inputs": {"latent_image": ["1", 0], "other": 3}},
        "3": {"inputs": {"latent_image": ["4", 0]}},
        "4": {"inputs": {"width": ["1", 0], "height": 66}},
    }
    assert asked_size(prompt, "2", "latent_image") == (66, 130)
    for node, name in (("3", "latent_image"), ("2", "other"), ("9", "latent_image")):
        assert asked_size(prompt, node, name) is None
    assert asked_size(None, None, "latent_image") is None
