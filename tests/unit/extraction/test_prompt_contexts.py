"""Templates of a prompt: one a line, each with a place for the concept."""

import pytest

from medsteer_core.endophantom.text import word_ids
from medsteer_core.errors import MedSteerError
from medsteer_core.extraction.prompt_contexts import DEFAULT, filled


def test_every_line_is_filled_and_empty_ones_do_not_count():
    lines = "An image of {concept}\n\n  {concept}, {concept} \r\n\t\nA {frame} of {concept}"
    assert filled(lines, " polyps ") == ["An image of polyps", "polyps, polyps", "A {frame} of polyps"]


def test_a_concept_with_braces_is_taken_as_it_is():
    assert filled("a {concept} b", "{concept} {0}") == ["a {concept} {0} b"]


def test_the_default_templates_differ_also_for_endophantom():
    prompts = filled(DEFAULT, "polyps")
    assert len({frozenset(word_ids(prompt)) for prompt in prompts}) == len(prompts) == 3


@pytest.mark.parametrize(
    ("templates", "concept", "message"),
    [
        ("{concept}", "  ", "concept is empty"),
        (" \n\n", "polyps", "no templates"),
        ("{concept}\nan image of it", "polyps", r"Template 2 is 'an image of it'"),
        ("{concept}!\na {concept}\n{concept}!", "polyps", "Template 3 is there twice"),
    ],
)
def test_what_can_not_be_filled_is_refused(templates, concept, message):
    with pytest.raises(MedSteerError, match=message):
        filled(templates, concept)
