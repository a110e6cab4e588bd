"""What a review found once and must not come back."""

import builtins

import pytest
import tiny
import torch
from medsteer_pack.medsteer_core import errors
from medsteer_pack.medsteer_core.host.folders import vectors as vector_folder
from medsteer_pack.medsteer_core.host.loading.pixart import AnySizePixArtMS
from medsteer_pack.medsteer_core.host.patching import fingerprint
from medsteer_pack.medsteer_core.scores import images as image_pairs
from medsteer_pack.nodes.steer import Steer
from medsteer_pack.nodes.vectors import LoadPathologyVector


def test_the_fingerprint_ignores_buffers_that_are_random_in_every_load(pixart):
    before = fingerprint.fingerprint(pixart)
    buffer = pixart.model.diffusion_model.y_embedder.y_embedding
    with torch.no_grad():
        buffer.add_(1.0)
        after = fingerprint.fingerprint(pixart)
        buffer.sub_(1.0)
    assert after == before


@pytest.mark.parametrize("sides", [(17, 17), (5, 40), (1, 1)])
def test_sides_that_are_no_multiple_of_the_patch_size_run(pixart, sides):
    network = pixart.model.diffusion_model
    assert isinstance(network, AnySizePixArtMS)
    x = torch.randn(1, network.in_channels, *sides)
    context = torch.randn(1, 3, network.y_embedder.y_proj.fc1.in_features)
    assert network(x, torch.tensor([500.0]), context).shape == x.shape


def test_an_operator_that_does_not_exist_is_named_in_the_error(pixart):
    with pytest.raises(errors.MedSteerError, match="no operator"):
        Steer.execute(pixart, tiny.vector(pixart), 0.0, 1.0, "all", "all", operator={"operator": "erase"})
    with pytest.raises(errors.MedSteerError, match="no operator"):
        Steer.execute(pixart, tiny.vector(pixart), 0.0, 1.0, "all", "all")


def test_a_vector_name_that_comes_over_a_link_is_not_refused_before_it_is_known():
    assert LoadPathologyVector.validate_inputs(vector_name=None) is True
    assert LoadPathologyVector.fingerprint_inputs(vector_name=None) == ""
    assert "There is no vector" in LoadPathologyVector.validate_inputs(vector_name="nowhere.safetensors")
    assert "There is no vector" in vector_folder.problem("../../secret.safetensors")


def test_a_missing_package_for_scores_is_a_clear_error(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchmetrics"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(errors.MedSteerError, match="pip install torchmetrics"):
        image_pairs.compare(torch.rand(3, 32, 32), torch.rand(3, 32, 32))
