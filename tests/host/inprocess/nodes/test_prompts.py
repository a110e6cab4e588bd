"""What only the graph shows: how many Steer nodes lead to a model, and which map an automatic lock is of."""

import pytest
import tiny
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.host.sampling.counterfactual import PairRequest, sample_pair
from medsteer_pack.nodes.prompts import mask_in_graph, steer_nodes

GRAPH = {
    "1": {"class_type": "LoadDiT", "inputs": {}},
    "2": {"class_type": "MedSteer_Steer", "inputs": {"model": ["1", 0]}},
    "3": {"class_type": "MedSteer_Steer", "inputs": {"model": ["2", 0]}},
    "4": {"class_type": "MedSteer_Steer", "inputs": {"model": ["1", 0]}},
    "5": {"class_type": "ModelMergeSimple", "inputs": {"model1": ["3", 0], "model2": ["4", 0], "ratio": 0.5}},
    "6": {"class_type": "Sampler", "inputs": {"model": ["5", 0], "vector": ["4", 0]}},
    "7": {"class_type": "Sampler", "inputs": {"model": ["8", 0]}},
    "8": {"class_type": "Loop", "inputs": {"model": ["7", 0]}},
}


@pytest.mark.parametrize(("node", "count"), [("6", 3), ("3", 1), ("2", 0), ("7", 0), ("nowhere", 0), (None, 0)])
def test_steer_nodes_are_counted_along_the_models_and_nowhere_else(node, count):
    assert steer_nodes(GRAPH, node) == count
    assert steer_nodes(None, node) == 0


def test_steering_that_a_merge_has_lost_is_told(pixart):
    steered = tiny.steered(pixart, tiny.vector(pixart))
    schedule = sampling.schedule(steered, 4, "euler", "normal")

    def summary(steer_nodes):
        asked = PairRequest(tiny.cond(1), tiny.cond(2), tiny.latent(), 7, 3.0, schedule, steer_nodes=steer_nodes)
        return sample_pair(steered, asked).summary

    assert "2 Steer nodes lead to this model and 1 act: a node that merges two models keeps the first" in summary(2)
    assert "lead to this model" not in summary(1) + summary(0)


@pytest.mark.parametrize(
    ("lock", "model", "expected"),
    [
        ("automatic", ["2", 0], "concept map"),
        ("automatic", ["1", 0], "prediction difference"),
        ("prediction difference", ["2", 0], "prediction difference"),
        ("none", ["2", 0], "user"),
    ],
)
def test_the_mask_of_an_automatic_lock_is_named_by_what_it_is(lock, model, expected):
    sampler = {"class_type": "MedSteer_CounterfactualSampler", "inputs": {"lock": lock, "model": model}}
    graph = {**GRAPH, "9": sampler, "10": {"class_type": "MedSteer_EvaluatePairs", "inputs": {"mask": ["9", 3]}}}
    assert mask_in_graph(graph, "10", "mask") == expected
