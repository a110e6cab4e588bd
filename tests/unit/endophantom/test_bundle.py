"""The shipped weights: small enough, with their recipe, and good enough for what the docs say of them."""

import pytest
import torch

from medsteer_core.endophantom import bundle
from medsteer_core.endophantom.judges import LABELS, NONE
from medsteer_core.endophantom.phantom import CLASSES, Anatomy, render
from medsteer_core.errors import MedSteerError

BUNDLE = bundle.Bundle()


def test_both_files_are_under_18_mb_and_the_judges_under_3():
    assert BUNDLE.path.stat().st_size + BUNDLE.vae_path.stat().st_size < 18_000_000
    judges = [BUNDLE.part(name) for name in ("classifier", "segmenter", "regressor", "distance")]
    assert sum(2 * value.numel() for part in judges for value in part.values()) < 3_000_000  # stored in half precision


def test_the_recipe_says_how_the_parts_were_made():
    assert set(BUNDLE.recipe) == {"generator", "text", "autoencoder", "judges", "data", "seeds", "torch"}
    assert BUNDLE.recipe["judges"]["labels"] == list(LABELS)
    assert BUNDLE.recipe["generator"]["steps"] >= 1000


def test_an_unknown_part_and_a_missing_file_are_clear_errors(tmp_path):
    with pytest.raises(MedSteerError, match="no part 'unet'"):
        BUNDLE.part("unet")
    with pytest.raises(MedSteerError, match="weights are missing"):
        bundle.Bundle(tmp_path / "none.safetensors").part("text")


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(MedSteerError, match="not an EndoPhantom bundle"):
        bundle.Bundle(path).recipe  # noqa: B018


@pytest.fixture(scope="module")
def judges():
    return BUNDLE.judges()


def test_the_classifier_knows_held_out_renders_of_every_class(judges):
    for index, name in enumerate(CLASSES):
        image = render(Anatomy.sample(24, 31_000 + index), name, 128, noise_seed=index).image
        right = sum(label == name for label in judges(image).labels)
        assert right >= 22, f"{name}: {right} of 24"


def test_what_is_no_endoscopy_is_none_of_these(judges):
    draw = torch.Generator().manual_seed(0)
    orange = torch.tensor([0.8, 0.5, 0.35]).view(1, 3, 1, 1).expand(1, 3, 128, 128)
    colon = render(Anatomy.sample(1, 32_000), "normal cecum", 128).image
    shown = {
        "orange blank": orange,
        "black": torch.zeros(1, 3, 128, 128),
        "static": torch.rand(1, 3, 128, 128, generator=draw),
        "blue colon": colon.flip(1),
        "negative": 1 - colon,
    }
    for name, image in shown.items():
        assert judges(image).labels == [NONE], name


def test_the_segmenter_finds_a_polyp_and_none_where_there_is_none(judges):
    anatomy = Anatomy.sample(16, 33_000)
    with_polyp = render(anatomy, "polyps", 128)
    found = judges(with_polyp.image).mask("polyp")
    truth = with_polyp.masks[:, 0].bool()
    overlap = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert overlap > 0.85
    clean = judges(render(anatomy, "normal cecum", 128).image).mask("polyp")
    assert float(clean.float().mean()) < 0.002
