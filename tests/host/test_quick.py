"""A first pair from Python in two lines."""

import numpy
import pytest

import medsteer_core
from medsteer_core.errors import MedSteerError
from medsteer_core.run.quick import workflow


def test_two_prompts_give_two_images_of_one_anatomy():
    from medsteer_core import pair

    found = pair("An endoscopic image of polyps", "An endoscopic image of normal cecum", cpu=True)
    one, other = (numpy.asarray(image).astype(int) for image in found)
    assert one.shape == other.shape == (128, 128, 3)
    changed = numpy.abs(one - other).mean(-1) > 8
    assert 0.02 < changed.mean() < 0.5  # the finding, and not the picture


def test_what_makes_no_pair_is_refused():
    with pytest.raises(MedSteerError, match="Both prompts are the same"):
        medsteer_core.pair("polyps", "polyps")
    with pytest.raises(AttributeError, match="no attribute 'pears'"):
        medsteer_core.__getattr__("pears")


def test_the_workflow_is_the_first_template_with_these_prompts():
    nodes = workflow("one", "two", 5)
    sampler = next(node for node in nodes.values() if node["class_type"] == "MedSteer_CounterfactualSampler")
    texts = [nodes[sampler["inputs"][name][0]]["inputs"]["text"] for name in ("positive", "counterfactual", "negative")]
    assert texts == ["one", "two", ""] and sampler["inputs"]["seed"] == 5
    assert [nodes[f"save {title}"]["inputs"]["images"][0] for title in "AB"] == ["7", "8"]
