"""The recipes: their values, and what is said of inputs that are not theirs."""

import pytest

from medsteer_core.errors import MedSteerError
from medsteer_core.steering.operators import make_operator
from medsteer_core.steering.recipes import (
    ADD,
    IMAGE_RECIPES,
    RECIPES,
    REMOVE_DIFFUSE,
    REMOVE_FOCAL,
    SAMPLER_RECIPES,
    STEER_RECIPES,
    apart,
    find_recipe,
)
from medsteer_core.steering.rows import ALL_ROWS
from medsteer_core.vectors.schedule import CONSTANT


def test_each_kind_of_change_has_the_values_that_were_chosen_for_it():
    steer = {name: [recipe.steer[key] for key in ("operator.strength", "operator.focus", "start_percent", "rows")]
             for name, recipe in RECIPES.items()}  # fmt: skip
    assert steer == {
        "remove focal": [2.0, 1.0, 0.45, "all"],
        "remove diffuse": [1.5, 1.0, 0.45, "all"],
        "add": [1.75, 1.5, 0.35, "positive"],
    }
    locks = {name: recipe.sampler["lock"] for name, recipe in RECIPES.items()}
    assert locks == {REMOVE_FOCAL: "automatic", REMOVE_DIFFUSE: "none", ADD: "none"}
    for recipe in RECIPES.values():
        assert recipe.steer["start_percent"] == recipe.sampler["counterfactual_start"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_made_of_what_the_nodes_take(name):
    values = find_recipe(name).steer
    inner = {key.split(".")[1]: value for key, value in values.items() if "." in key}
    assert make_operator(values["operator"], **inner).strength == values["operator.strength"]
    assert values["curve"] == CONSTANT and values["rows"] in (ALL_ROWS, "positive")


def test_inputs_of_the_recipe_need_no_word():
    for name, recipe in RECIPES.items():
        assert apart(name, recipe.steer, STEER_RECIPES) == "" == apart(name, recipe.sampler, SAMPLER_RECIPES)
    assert apart("custom", {"operator.strength": 9.0}, STEER_RECIPES) == ""


def test_inputs_that_are_not_the_recipes_are_named_with_what_it_would_have():
    said = apart(ADD, {**RECIPES[ADD].steer, "operator.strength": 3.0, "rows": "all"}, STEER_RECIPES)
    assert said == (
        "Warning: recipe says 'add', but strength is 3, the recipe's 1.75, rows is all, the recipe's positive. "
        "The inputs count."
    )
    assert "lock is none, the recipe's automatic" in apart(REMOVE_FOCAL, {"lock": "none"}, SAMPLER_RECIPES)


def test_a_recipe_that_there_is_not():
    with pytest.raises(MedSteerError, match="no recipe 'cure'; choose custom, remove focal, remove diffuse, add"):
        find_recipe("cure")


def test_recipes_of_real_images_are_the_samplers_with_a_start_a_cfg_and_each_maps_own_threshold():
    for name, values in IMAGE_RECIPES.items():
        other = {key for key, value in RECIPES[name].sampler.items() if values[key] != value}
        assert set(values) == {*RECIPES[name].sampler, "cfg"} and other <= {"counterfactual_start", "lock_threshold"}
    chosen = {name: [values[key] for key in ("counterfactual_start", "cfg")] for name, values in IMAGE_RECIPES.items()}
    assert chosen == {"remove focal": [0.35, 3], "remove diffuse": [0.25, 2], "add": [0.25, 3]}
    assert {values["lock_threshold"] for values in IMAGE_RECIPES.values()} == {0}
    assert "cfg is 4, the recipe's 3" in apart(REMOVE_FOCAL, {"cfg": 4.0}, IMAGE_RECIPES)
