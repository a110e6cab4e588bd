"""Rows are named by the guider's conditionings, whatever their order, number and length in a model call."""

import comfy.samplers
import pytest
import tiny
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.patching import calls
from medsteer_pack.medsteer_core.host.patching.rows import names_of_indices, names_of_uuids, row_finder

CHOICES = ["all", "positive", "negative"]


@pytest.fixture(scope="module")
def vector(pixart):
    return tiny.vector(pixart)


def changed(model, positive, negative, **options):
    """Which conditionings' rows change, and the conditionings of each call."""
    with tiny.spying(model, positive=positive, negative=negative) as rows:
        tiny.run(model, positive, negative, **options)
    calls = {row.call: {other.name for other in rows if other.call == row.call} for row in rows}
    return tiny.changed_by_name(rows), list(calls.values())


def wanted(rows, names=("positive", "negative")):
    return {name: {rows in ("all", name)} for name in names}


@pytest.mark.parametrize("rows", CHOICES)
def test_texts_of_equal_length_share_a_call_and_keep_their_names(pixart, vector, rows):
    found, calls = changed(tiny.steered(pixart, vector, rows=rows), tiny.cond(1), tiny.cond(2))
    assert calls[0] == {"positive", "negative"}
    assert found == wanted(rows)


@pytest.mark.parametrize("rows", CHOICES)
def test_texts_of_different_length_have_their_own_calls_and_keep_their_names(pixart, vector, rows):
    found, calls = changed(tiny.steered(pixart, vector, rows=rows), tiny.cond(1), tiny.cond(2, tokens=1))
    assert all(len(call) == 1 for call in calls)
    assert found == wanted(rows)


@pytest.mark.parametrize("rows", CHOICES)
def test_every_image_of_a_batch_is_among_the_named_rows(pixart, vector, rows):
    size = tiny.latent(batch=3)
    found, _calls = changed(tiny.steered(pixart, vector, rows=rows), tiny.cond(1), tiny.cond(2), size=size)
    assert found == wanted(rows)


def area(conditioning, *box):
    return [[text, {**options, "area": box, "strength": 1.0}] for text, options in conditioning]


@pytest.mark.parametrize("rows", CHOICES)
def test_area_conditionings_that_share_an_identity_are_told_apart_by_their_index(pixart, vector, rows, monkeypatch):
    shared = []

    def remember(conds):
        uuids = [{entry["uuid"] for entry in conds[name]} for name in ("positive", "negative")]
        shared.append(uuids[0] & uuids[1])
        return names_of_uuids(conds)

    monkeypatch.setattr(calls, "names_of_uuids", remember)
    top, bottom = area(tiny.cond(1), 8, 16, 0, 0), area(tiny.cond(2), 8, 16, 8, 0)
    size = tiny.latent(16, 16)
    found, _calls = changed(tiny.steered(pixart, vector, rows=rows), top + bottom, tiny.cond(3), size=size)
    assert len(shared[0]) == 2  # ComfyUI copied both areas, identity and all, to the negative
    assert found == wanted(rows)


@pytest.mark.parametrize("tokens", [(4, 4, 4), (4, 2, 1)])
@pytest.mark.parametrize("rows", ["all", "positive", "middle", "negative"])
def test_a_guider_with_names_of_its_own_is_steered_by_them(pixart, vector, rows, tokens):
    names = ("positive", "middle", "negative")
    texts = {name: tiny.cond(index, count) for index, (name, count) in enumerate(zip(names, tokens, strict=True))}
    guider = Guider_DualCFG(tiny.steered(pixart, vector, rows=rows))
    guider.set_conds(**texts)
    guider.set_cfg(3.0, 2.0)
    with tiny.spying(pixart, **texts) as found:
        tiny.run_guider(guider)
    assert tiny.changed_by_name(found) == wanted(rows, names)


@pytest.mark.parametrize("rows", ["positive", "middle", "negative"])
def test_area_conditionings_are_told_apart_under_a_guider_with_another_order(pixart, vector, rows):
    texts = {name: tiny.cond(index) for index, name in enumerate(("positive", "middle", "negative"))}
    guider = Guider_DualCFG(tiny.steered(pixart, vector, rows=rows))
    guider.set_conds(area(texts["positive"], 4, 8, 0, 0), texts["middle"], texts["negative"])
    guider.set_cfg(3.0, 2.0)
    with tiny.spying(pixart, **texts) as found:
        tiny.run_guider(guider)
    assert tiny.changed_by_name(found) == wanted(rows, tuple(texts))


def test_a_name_that_the_guider_does_not_have_is_refused_with_those_it_has(pixart, vector):
    guider = Guider_DualCFG(tiny.steered(pixart, vector, rows="nonsense"))
    guider.set_conds(tiny.cond(1), tiny.cond(2), tiny.cond(3))
    guider.set_cfg(3.0, 2.0)
    with pytest.raises(MedSteerError, match="rows 'nonsense'.*middle, negative, positive"):
        tiny.run_guider(guider)


def test_the_name_of_a_guider_with_one_conditioning_is_known_too(pixart, vector):
    guider = comfy.samplers.CFGGuider(tiny.steered(pixart, vector, rows="positive"))
    guider.inner_set_conds({"positive": tiny.cond(1)})
    with tiny.spying(pixart, positive=tiny.cond(1)) as found:
        tiny.run_guider(guider)
    assert tiny.changed_by_name(found) == {"positive": {True}}


def test_rows_that_are_never_evaluated_are_an_error(pixart, vector):
    with pytest.raises(MedSteerError, match="rows 'negative'. changed nothing in this run"):
        tiny.run(tiny.steered(pixart, vector, rows="negative"), tiny.cond(1), tiny.cond(2), cfg=1.0)
    assert tiny.hook_count(pixart) == 0


def test_an_identity_under_two_names_has_none():
    conds = {"positive": [{"uuid": 1}, {"uuid": 2}], "negative": [{"uuid": 1}, {"uuid": 3}, {}], "middle": None}
    assert names_of_uuids(conds) == {2: "positive", 3: "negative"}


def test_the_chunks_of_a_call_are_found_by_identity_and_then_by_index():
    options = {"cond_or_uncond": [1, 0, 2], "uuids": ["a", "b", "c"]}
    by_identity = row_finder(6, options, {"a": "positive", "c": "middle"})
    # "a" is the positive in spite of its index; "b" is unknown, and index 0 is a positive.
    assert [by_identity(name) for name in ("positive", "negative", "middle")] == [[(0, 2), (2, 4)], [], [(4, 6)]]


def test_an_index_means_the_list_that_stands_there():
    positive, negative, middle = [{"a": 1}], [{"a": 1}], [{"a": 1}]  # equal, and yet not the same
    conds = {"positive": positive, "middle": middle, "negative": negative}
    assert names_of_indices([negative, middle, positive], conds) == ("negative", "middle", "positive")
    assert names_of_indices([None, list(middle), positive], conds) == ("", "", "positive")
    assert names_of_indices([list(positive), list(negative)], {"positive": positive, "negative": negative}) == (
        "positive",
        "negative",
    )
