"""Real images through the real server: a photograph with EXIF, its bytes back, a data set that says what is real."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from medsteer_core.endophantom.true_pairs import true_pairs

EDIT, SAVE = "MedSteer_CounterfactualOfImage", "MedSteer_SaveCounterfactualPairs"


def node(class_type, title="", **inputs):
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title or class_type}}


def photo() -> bytes:
    """A phantom of 150 x 100 as a phone would store it: lying on its side, with EXIF that says so and whose it is."""
    image = true_pairs("polyps", "normal cecum", 1, 4, (100, 150)).image[0].movedim(0, -1)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "patient Doe"
    buffer = io.BytesIO()
    Image.fromarray((image * 255).round().byte().numpy()).rotate(90, expand=True).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def graph(name: str, **changes) -> dict:
    """Load Image, edited in six steps, saved as images and as a pair."""

    def prompt(text):
        return node("CLIPTextEncode", clip=["1", 1], text=text)

    edit = {
        "image": ["5", 0], "model": ["1", 0], "vae": ["1", 2], "positive": ["2", 0], "negative": ["4", 0],
        "counterfactual": ["3", 0], "steps": 6, "cfg": 2.0, "scheduler": "normal", "strengths": "1",
        "lock": "automatic", "lock_threshold": 0.0, "lock_dilation": 1, "lock_smoothing": 0,
        "counterfactual_start": 0.35, "size": "the model's", "computed_tokens": "in the mask", "group": "patient Doe",
        **changes,
    }  # fmt: skip
    return {
        "1": node("MedSteer_LoadEndoPhantom"),
        "2": prompt("An endoscopic image of polyps"), "3": prompt("An endoscopic image of normal cecum"),
        "4": prompt(""), "5": node("LoadImage", image=name), "8": node(EDIT, **edit),
        "9": node("PreviewImage", "edited", images=["8", 1]), "10": node("PreviewImage", "own", images=["8", 0]),
        "11": node("MaskToImage", mask=["8", 3]), "12": node("PreviewImage", "mask", images=["11", 0]),
        "20": node(SAVE, factual=["8", 0], counterfactual=["8", 1], record=["8", 6], folder="medsteer/real",
                   source_class="polyps", target_class="normal cecum", split="auto", judge="EndoPhantom", boxes="none",
                   metadata="workflow and record", arm="counterfactual", finding_in="auto", validation_fraction=0.1,
                   test_fraction=0.1),
    }  # fmt: skip


def pixels(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(scope="module")
def name(comfy):
    return comfy.upload(photo(), "Doe, Jane 4711.png")


@pytest.fixture(scope="module")
def result(comfy, name):
    return comfy.run(graph(name))


def test_outside_the_mask_are_the_uploaded_images_own_bytes_at_its_own_size(comfy, name, result):
    (edited,), (own,), (mask,) = ([pixels(d) for d in result.images(number)] for number in ("edited", "own", "mask"))
    upright = np.array(Image.open(io.BytesIO(photo())).rotate(-90, expand=True))
    assert edited.shape == own.shape == (100, 150, 3) and np.array_equal(own, upright)
    outside = mask[..., 0] == 0
    assert 0.2 < outside.mean() < 1 and np.array_equal(edited[outside], own[outside])
    assert not np.array_equal(edited, own)
    assert "seen by the model at 128 x 128" in result.text(EDIT)


def test_strength_0_gives_every_byte_back(comfy, name):
    again = graph(name, counterfactual=["2", 0])
    again.pop("20")
    (edited,), (own,) = ([pixels(d) for d in comfy.run(again).images(number)] for number in ("edited", "own"))
    assert np.array_equal(edited, own)


def test_the_data_set_says_that_the_factual_is_real_and_nothing_of_the_patient(comfy, result):
    output = result.output(SAVE)
    (record,) = output["medsteer_pairs"]
    assert record["made"]["factual"] == "real image"
    assert record["digital_source_type"].endswith("compositeWithTrainedAlgorithmicMedia")
    folder = f"medsteer/real/{record['split']}"
    lines = [json.loads(line) for line in comfy.view("metadata.jsonl", folder).splitlines()]
    assert [line["factual_is_real"] for line in lines] == [True]
    for item, data in zip(output["images"], result.images(SAVE), strict=True):
        assert b"Doe" not in data and b"4711" not in data
        assert (b"Iptc4xmpExt" in data) == ("_factual" not in item["filename"])
    assert (
        "Doe" not in json.dumps(record)
        and "In 1 pairs the factual image is real" in comfy.view("README.md", "medsteer/real").decode()
    )
