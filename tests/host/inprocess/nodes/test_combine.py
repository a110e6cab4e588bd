"""Combine Pathology Vectors as a node, and steering with what it gives."""

import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.patching import fingerprint
from medsteer_pack.medsteer_core.host.sampling import extraction
from medsteer_pack.medsteer_core.vectors import file as vector_file
from medsteer_pack.medsteer_core.vectors.algebra import HOW
from medsteer_pack.nodes import NODES
from medsteer_pack.nodes.combine import CombineVectors

POSITIVE, NEGATIVE = tiny.cond(1), tiny.cond(2)


@pytest.fixture(scope="module")
def pair(pixart):
    """Two vectors of the model with other schedules."""
    return tiny.vector(pixart, steps=10), tiny.vector(pixart, steps=7, seed=1)


def combined(a, b, how="add", weight_a=1.0, weight_b=1.0):
    """The node's vector and report."""
    return CombineVectors.PREPARE_CLASS_CLONE(None).execute(a, b, how, weight_a, weight_b).result


def run(model):
    return tiny.run(model, POSITIVE, NEGATIVE)


def test_the_node_is_in_the_pack_and_every_input_and_output_is_explained():
    assert CombineVectors in NODES
    schema = CombineVectors.define_schema()
    assert [entry.id for entry in schema.inputs] == ["a", "b", "how", "weight_a", "weight_b"]
    assert all(entry.tooltip for entry in (*schema.inputs, *schema.outputs))
    assert schema.inputs[2].options == list(HOW)


@pytest.mark.parametrize("how", HOW)
def test_what_it_gives_steers_the_model(pixart, pair, how):
    vector, report = combined(*pair, how)
    assert vector.sigmas.tolist() == pair[0].sigmas.tolist()
    assert vector.short_hash() in report and "|cos| of parts 1 and 2" in report
    # The tiny vectors do not say by which estimator they were made, so their class means are not known.
    assert "Not known of the result: centres, projections, spreads" in report
    images = [run(pixart), run(tiny.steered(pixart, vector)), run(tiny.steered(pixart, pair[0]))]
    assert all((images[1] - images[other]).abs().max() > 1e-4 for other in (0, 2))
    still = tiny.steered(pixart, vector, operator="suppress", strength=0.0)
    assert torch.equal(run(still), images[0])


def test_joint_suppression_gives_the_same_image_in_either_order(pixart):
    pair = tiny.vector(pixart), tiny.vector(pixart, seed=1)
    images = [
        run(tiny.steered(pixart, combined(*order, "joint subspace")[0], operator="suppress", strength=2.0))
        for order in (pair, pair[::-1])
    ]
    assert (images[0] - run(pixart)).abs().max() > 1e-2
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)


def test_ablating_the_joint_subspace_leaves_nothing_along_either(pixart):
    pair = tiny.vector(pixart), tiny.vector(pixart, seed=1)
    joint = combined(*pair, "joint subspace")[0]
    with tiny.spying(pixart, positive=POSITIVE, negative=NEGATIVE) as rows:
        run(tiny.steered(pixart, joint))
    for row in rows:
        for name in joint.site_names:
            if row.site == name:
                d = joint.at(name, row.sigma).directions
                assert (row.out @ d.mT).abs().max() < 1e-5 * row.raw.norm(dim=-1).max()


def test_extracted_vectors_are_combined_saved_and_loaded(pixart, tmp_path):
    vectors = [
        extraction.extract(pixart, tiny.request(pixart, tiny.cond(seed), tiny.cond(9), NEGATIVE, steps=4))
        for seed in (3, 4)
    ]
    vector, _ = combined(*vectors, "subtract")
    assert vector.provenance["model"] == vectors[0].provenance["model"]
    assert fingerprint.differs(vector, pixart) == ""
    back = vector_file.load(vector_file.save(vector, tmp_path / "v.safetensors"))
    assert back.content_hash() == vector.content_hash()
    # The absent prompt is the same and the noise is paired: the difference is that of the two present prompts.
    direct = extraction.extract(pixart, tiny.request(pixart, tiny.cond(3), tiny.cond(4), NEGATIVE, steps=4))
    for name, site in direct.sites.items():
        cosines = (site.directions * vector.sites[name].directions).sum(dim=-1)
        assert cosines.min() > 0.9999
        torch.testing.assert_close(vector.sites[name].gaps, site.gaps, rtol=1e-3, atol=1e-5)


def test_weights_that_do_not_count_are_told(pair):
    assert "The weights do not count for 'joint subspace'" in combined(*pair, "joint subspace", 0.5)[1]
    assert "do not count" not in combined(*pair, "joint subspace")[1]
    assert "do not count" not in combined(*pair, "add", 0.5)[1]


def test_vectors_of_different_models_are_refused(pixart, pair):
    other = tiny.model(seed=1)
    with pytest.raises(MedSteerError, match="fingerprints differ in weights"):
        combined(pair[0], tiny.vector(other))
    with pytest.raises(MedSteerError, match="different sites"):
        combined(pair[0], tiny.vector(tiny.model(depth=2)))
