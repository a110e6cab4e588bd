"""The pack's own graphs through the API of the real server: what a headless user does, with the shipped model."""

import copy
import io
import json
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from medsteer_core.run.demo import WORKFLOW
from medsteer_core.run.workflow import WorkflowFailed, WorkflowInterrupted, WorkflowRefused
from medsteer_core.scores.scorer import score_pair

EXAMPLE = json.loads(WORKFLOW.read_text())
WORKFLOWS = WORKFLOW.parent.parent
SHOWING_ONLY = {"MarkdownNote", "SeedNode", "PreviewAny"}  # what the graph on the canvas may have more
SCHEMA = {
    "MedSteer_LoadEndoPhantom": ([], ["MODEL", "CLIP", "VAE"]),
    "MedSteer_LoadDiT": (["model_name", "weight_dtype", "family"], ["MODEL"]),
    "MedSteer_LoadPEFTLoRA": (
        ["model", "lora_name", "strength_model", "strength_clip", "clip"], ["MODEL", "CLIP", "STRING"],
    ),
    "MedSteer_PromptContexts": (["clip", "present", "absent", "templates"], ["CONDITIONING", "CONDITIONING"]),
    "MedSteer_ExtractPathologyVector": (
        ["model", "present", "absent", "negative", "latent_image", "samples", "seed", "steps", "cfg", "sampler_name",
         "scheduler", "noise", "sampler", "sigmas", "rank", "estimator", "keep_samples"],
        ["MEDSTEER_VECTOR", "STRING"],
    ),
    "MedSteer_SavePathologyVector": (["vector", "filename_prefix"], ["STRING"]),
    "MedSteer_LoadPathologyVector": (["vector_name"], ["MEDSTEER_VECTOR"]),
    "MedSteer_ImportPathologyVector": (
        ["file_name", "model", "schedule", "steps", "sigmas"], ["MEDSTEER_VECTOR", "STRING"],
    ),
    "MedSteer_ExportPathologyVector": (["vector", "filename_prefix"], ["STRING"]),
    "MedSteer_CombineVectors": (["a", "b", "how", "weight_a", "weight_b"], ["MEDSTEER_VECTOR", "STRING"]),
    "MedSteer_RandomDirection": (["vector", "seed", "within_class"], ["MEDSTEER_VECTOR", "STRING"]),
    "MedSteer_CounterfactualSampler": (
        ["model", "positive", "negative", "latent_image", "seed", "steps", "cfg", "sampler_name", "scheduler",
         "strengths", "lock", "lock_threshold", "lock_dilation", "sampler", "sigmas", "noise", "mask",
         "counterfactual", "counterfactual_start", "lock_smoothing", "computed_tokens", "kept_memory", "recipe"],
        ["LATENT", "LATENT", "MASK", "MASK", "STRING", "MEDSTEER_RECORD"],
    ),
    "MedSteer_CounterfactualOfImage": (
        ["image", "model", "vae", "positive", "negative", "steps", "cfg", "scheduler", "strengths", "lock",
         "lock_threshold", "lock_dilation", "lock_smoothing", "counterfactual_start", "size", "computed_tokens",
         "counterfactual", "mask", "group", "sigmas", "recipe"],
        ["IMAGE", "IMAGE", "MASK", "MASK", "LATENT", "STRING", "MEDSTEER_RECORD"],
    ),
    "MedSteer_PhantomImage": (
        ["shows", "truth_shows", "seed", "width", "height", "batch_size"], ["IMAGE", "IMAGE", "MASK"],
    ),
    "MedSteer_PixArtSigmas": (["steps", "denoise"], ["SIGMAS"]),
    "MedSteer_Steer": (
        ["model", "vector", "operator", "start_percent", "end_percent", "sites", "rows", "preset", "curve", "target",
         "mask", "recipe"], ["MODEL"],
    ),
    "MedSteer_CounterfactualCompare": (["factual", "counterfactual"], ["IMAGE", "STRING"]),
    "MedSteer_InspectVector": (["vector"], ["IMAGE", "STRING"]),
    "MedSteer_CounterfactualPanel": (
        ["factual", "counterfactual", "concept_map", "judge", "mask"], ["IMAGE", "STRING", "STRING"],
    ),
    "MedSteer_StrengthSweep": (
        ["factual", "counterfactual", "strengths", "judge", "source_class", "target_class"],
        ["IMAGE", "STRING", "STRING"],
    ),
    "MedSteer_SaveCounterfactualPairs": (
        ["factual", "counterfactual", "record", "folder", "source_class", "target_class", "split", "judge", "boxes",
         "metadata", "arm", "finding_in", "validation_fraction", "test_fraction", "mask"],
        ["STRING", "STRING"],
    ),
    "MedSteer_EvaluatePairs": (
        ["factual", "counterfactual", "judge", "source_class", "target_class", "mask", "strength_0",
         "random_direction", "reprompted"],
        ["STRING", "STRING", "IMAGE"],
    ),
}  # fmt: skip


def node(class_type: str, title: str = "", **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title or class_type}}


def graph(seed: int = 7, batch: int = 1) -> dict:
    """The example's nodes up to Steer with a small extraction, and a latent of ``batch`` images for the samplers."""
    nodes = {i: copy.deepcopy(EXAMPLE[i]) for i in "1234567"}
    nodes["6"]["inputs"].update(samples=2, steps=6)
    nodes["50"] = node("EmptyLatentImage", width=128, height=128, batch_size=batch)
    nodes["seed"] = seed
    return nodes


def with_images(nodes: dict, **models: list) -> dict:
    """Add a KSampler, a VAEDecode and a PreviewImage titled by name for every model link."""
    seed = nodes.pop("seed")
    for number, (name, model) in enumerate(models.items()):
        sample, decode, show = (str(100 + 10 * number + i) for i in range(3))
        settings = {"steps": 6, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        links = {"model": model, "positive": ["2", 0], "negative": ["4", 0], "latent_image": ["50", 0]}
        nodes[sample] = node("KSampler", f"sample {name}", seed=seed, **links, **settings)
        nodes[decode] = node("VAEDecode", samples=[sample, 0], vae=["1", 2])
        nodes[show] = node("PreviewImage", name, images=[decode, 0])
    return nodes


def steer(nodes: dict, node_id: str, **changes) -> list:
    """Another Steer node like the example's with other inputs; returns its link."""
    nodes[node_id] = copy.deepcopy(nodes["7"])
    nodes[node_id]["inputs"].update(changes)
    return [node_id, 0]


PLAIN, STEERED = ["1", 0], ["7", 0]


def test_every_node_stands_in_object_info_with_the_inputs_and_outputs_that_were_promised(comfy):
    info = comfy.object_info()
    for name, (inputs, outputs) in SCHEMA.items():
        found = info[name]["input"]
        assert [*found.get("required", {}), *found.get("optional", {})] == inputs, name
        assert info[name]["output"] == outputs, name
        assert info[name]["description"] and info[name]["category"].startswith("MedSteer")
    (vae_names, *_), *_ = info["VAELoader"]["input"]["required"].values()
    assert "endophantom_vae.safetensors" in vae_names


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("api/*.json")), ids=lambda path: path.stem)
def test_an_example_gives_every_node_what_it_asks_for(comfy, path):
    """Also where it can't be run, because it wants weights that must be downloaded."""
    info = comfy.object_info()
    prompt = json.loads(path.read_text(encoding="utf-8"))
    for entry in prompt.values():
        node_info, inputs = info[entry["class_type"]], entry["inputs"]
        required, optional = (node_info["input"].get(kind, {}) for kind in ("required", "optional"))
        given = {name.split(".")[0] for name in inputs}
        assert set(required) <= given <= {*required, *optional}, entry["class_type"]
        for name, value in inputs.items():
            if isinstance(value, list):
                source, slot = prompt[value[0]], value[1]
                kind = info[source["class_type"]]["output"][slot]
                wanted = {**required, **optional}[name][0]
                assert wanted in ("*", kind) or kind in str(wanted).split(","), (entry["class_type"], name)


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_an_examples_two_forms_hold_the_same_nodes(path, api_file):
    drawn = json.loads(path.read_text(encoding="utf-8"))
    headless = json.loads(api_file(path).read_text(encoding="utf-8"))
    on_canvas = [node["type"] for node in drawn["nodes"] if node["type"] not in SHOWING_ONLY]
    in_api = [entry["class_type"] for entry in headless.values() if entry["class_type"] not in SHOWING_ONLY]
    assert sorted(on_canvas) == sorted(in_api)


def test_the_example_workflow_removes_the_polyp_and_keeps_the_anatomy(comfy):
    result = comfy.run(EXAMPLE)
    first, second = (
        torch.from_numpy(result.pixels(title)[0]).permute(2, 0, 1).float() / 255
        for title in ("Factual", "Counterfactual")
    )
    score = score_pair(first, second, "polyps", "normal cecum")
    assert score.accepted and score.flipped
    assert score.finding_before > 0.01 and score.finding_left == 0
    assert score.ssim_outside > 0.9
    metrics = json.loads(result.text("Counterfactual Compare"))
    assert metrics["ssim"] == pytest.approx(score.ssim, abs=2e-3)


def test_strength_zero_is_bit_identical_to_no_node(comfy):
    nodes = graph()
    off = steer(nodes, "8", **{"operator.strength": 0.0})
    result = comfy.run(with_images(nodes, plain=PLAIN, off=off, steered=STEERED))
    assert (result.pixels("plain") == result.pixels("off")).all()
    assert (result.pixels("plain") != result.pixels("steered")).any()


def test_unsteered_steered_unsteered_in_one_queue_gives_the_first_image_again(comfy):
    images = []
    for number, model in enumerate((PLAIN, STEERED, PLAIN)):
        nodes = graph()
        nodes["2"]["inputs"]["text"] += "!" * number  # means the same, but ComfyUI's cache can't answer for it
        images.append(comfy.run(with_images(nodes, image=model)).pixels("image"))
    assert (images[0] == images[2]).all()
    assert (images[0] != images[1]).any()


def test_two_steered_clones_in_one_graph_do_not_disturb_each_other(comfy):
    nodes = graph()
    weak = steer(nodes, "8", **{"operator.strength": 0.7})
    together = comfy.run(with_images(nodes, strong=STEERED, weak=weak, plain=PLAIN))
    for name, changes in (("strong", {}), ("weak", {"operator.strength": 0.7})):
        nodes = graph()
        nodes["2"]["inputs"]["text"] += "."  # samples anew
        alone = comfy.run(with_images(nodes, image=steer(nodes, "9", **changes)))
        assert (alone.pixels("image") == together.pixels(name)).all(), name
    assert (together.pixels("strong") != together.pixels("weak")).any()


def test_a_batch_of_three_equals_three_singles(comfy):
    nodes = graph(batch=3)
    nodes["51"] = node("LatentFromBatch", samples=["50", 0], batch_index=0, length=3)
    together = with_images(nodes, image=STEERED)
    together["100"]["inputs"]["latent_image"] = ["51", 0]
    batch = comfy.run(together).pixels("image").astype(int)
    for index in range(3):
        nodes = graph(batch=3)
        nodes["51"] = node("LatentFromBatch", samples=["50", 0], batch_index=index, length=1)
        alone = with_images(nodes, image=STEERED)
        alone["100"]["inputs"]["latent_image"] = ["51", 0]
        single = comfy.run(alone).pixels("image")[0].astype(int)
        assert np.abs(single - batch[index]).max() <= 1, index  # decoded to 8 bits: rounding may differ by one level
    assert np.abs(batch[0] - batch[1]).max() > 20


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_a_vector_of_euler_steers_other_samplers_and_step_counts(comfy, sampler):
    nodes = with_images(graph(), plain=PLAIN, steered=STEERED)
    for sample in ("100", "110"):
        nodes[sample]["inputs"].update(sampler_name=sampler, steps=9)
    result = comfy.run(nodes)
    assert np.abs(result.pixels("plain").astype(int) - result.pixels("steered")).max() > 20


def test_a_saved_vector_steers_exactly_as_the_one_it_was_saved_from(comfy):
    nodes = graph()
    nodes["60"] = node("MedSteer_SavePathologyVector", "save", vector=["6", 0], filename_prefix="tests/polyps")
    first = comfy.run(with_images(nodes, image=STEERED))
    name = first.text("save").removeprefix("Saved as models/medsteer/")
    assert name.startswith("tests") and name.endswith(".safetensors")
    nodes = graph()
    nodes["2"]["inputs"]["text"] += "?"
    nodes["6"] = node("MedSteer_LoadPathologyVector", "load", vector_name=name)
    second = comfy.run(with_images(nodes, image=STEERED))
    assert (first.pixels("image") == second.pixels("image")).all()
    assert "An endoscopic image of polyps - An endoscopic image of normal cecum" in second.text("load")


def test_an_image_says_how_the_loaded_vector_was_made(comfy):
    """In the PNG, and in what the browser keeps among the node's properties."""
    nodes = graph()
    nodes["60"] = node("MedSteer_SavePathologyVector", "save", vector=["6", 0], filename_prefix="tests/shared")
    saved = comfy.run(with_images(nodes, image=STEERED))
    name = saved.text("save").removeprefix("Saved as models/medsteer/")
    with Image.open(io.BytesIO(saved.images("image")[0])) as image:  # may come before or after the file: says neither
        assert "prompt" in image.text and "medsteer" not in image.text
    nodes = graph()
    nodes["6"] = node("MedSteer_LoadPathologyVector", "load", vector_name=name)
    nodes = with_images(nodes, image=STEERED)
    nodes["120"] = node("SaveImage", "file", images=["101", 0], filename_prefix="tests/shared")
    result = comfy.run(nodes)
    recipe = result.output("load")["medsteer_recipe"][0]
    assert recipe["file"] == name and recipe["vector"] in name
    made = recipe["made"]
    assert made["prompts"]["present"]["text"] == "An endoscopic image of polyps"
    assert (made["seed"], made["samples"], made["steps"], made["sampler"]) == (
        EXAMPLE["6"]["inputs"]["seed"], 2, 6, "euler"
    )  # fmt: skip
    assert "separability" not in made and "explained_by_site" not in made
    with Image.open(io.BytesIO(result.images("file")[0])) as image:
        assert json.loads(image.text["medsteer"]) == {recipe["vector"]: recipe}


def test_a_vector_that_is_not_there_is_refused_before_anything_runs(comfy):
    nodes = graph()
    nodes["6"] = node("MedSteer_LoadPathologyVector", "load", vector_name="nothing.safetensors")
    with pytest.raises(WorkflowRefused, match="There is no vector 'nothing.safetensors'"):
        comfy.run(with_images(nodes, image=STEERED))


def test_a_window_without_a_step_is_an_error_at_the_sampler_and_leaves_nothing_behind(comfy):
    nodes = graph(seed=8)
    narrow = steer(nodes, "8", start_percent=0.501, end_percent=0.502)
    with pytest.raises(WorkflowFailed, match="No step of this schedule falls into the steering window"):
        comfy.run(with_images(nodes, image=narrow))
    before = comfy.run(with_images(graph(), image=PLAIN)).pixels("image")
    nodes = graph()
    nodes["2"]["inputs"]["text"] += " ,"
    assert (comfy.run(with_images(nodes, image=PLAIN)).pixels("image") == before).all()


def test_an_interrupted_steered_run_leaves_the_model_unsteered(comfy):
    before = comfy.run(with_images(graph(), image=PLAIN)).pixels("image")
    nodes = with_images(graph(seed=9), image=STEERED)
    nodes["100"]["inputs"]["steps"] = 2000
    sampling = threading.Event()
    stop = threading.Thread(target=lambda: (sampling.wait(120), time.sleep(0.5), comfy.interrupt()))
    stop.start()

    def heard(progress):
        if progress.title == "sample image":
            sampling.set()

    with pytest.raises(WorkflowInterrupted):
        comfy.run(nodes, heard)
    stop.join()
    nodes = graph()
    nodes["2"]["inputs"]["text"] += " ;"
    assert (comfy.run(with_images(nodes, image=PLAIN)).pixels("image") == before).all()


def defaults(info: dict, name: str) -> dict:
    """What a node has in its widgets when it is dropped on the canvas; of a list of choices the first."""
    values = {}
    for inputs in (info[name]["input"].get(kind, {}) for kind in ("required", "optional")):
        for key, (kind, *options) in inputs.items():
            options = options[0] if options else {}
            if kind == "COMFY_DYNAMICCOMBO_V3":
                chosen = options["options"][0]
                values[key] = chosen["key"]
                nested = [*chosen["inputs"].get("required", {}).items(), *chosen["inputs"].get("optional", {}).items()]
                values |= {f"{key}.{inner}": about[1]["default"] for inner, about in nested}
            elif "default" in options:
                values[key] = options["default"]
            elif kind == "COMBO" and options.get("options"):
                values[key] = options["options"][0]
    return values


def test_a_fresh_graph_of_defaults_takes_the_finding_away(comfy):
    """Nothing but the prompts and the links is set; fewer samples than the default, to be quick."""
    info = comfy.object_info()
    nodes = {i: copy.deepcopy(EXAMPLE[i]) for i in "1234"}
    model, conds = ["1", 0], {"negative": ["4", 0], "latent_image": ["50", 0]}
    nodes["50"] = node("EmptyLatentImage", width=128, height=128, batch_size=1)

    def fresh(name, **links):
        return node(name, name, **{**defaults(info, name), **links})

    nodes["6"] = fresh(
        "MedSteer_ExtractPathologyVector", model=model, present=["2", 0], absent=["3", 0], **conds, samples=4
    )
    nodes["7"] = fresh("MedSteer_Steer", model=model, vector=["6", 0])
    nodes["8"] = fresh("MedSteer_CounterfactualSampler", model=["7", 0], positive=["2", 0], **conds)
    for place, title in enumerate(("factual", "counterfactual")):
        nodes[f"9{place}"] = node("VAEDecode", samples=["8", place], vae=["1", 2])
        nodes[f"10{place}"] = node("PreviewImage", title, images=[f"9{place}", 0])
    result = comfy.run(nodes)
    images = [
        torch.from_numpy(result.pixels(title)[0]).movedim(-1, 0).float() / 255
        for title in ("factual", "counterfactual")
    ]
    assert score_pair(*images, "polyps", "normal cecum").flipped


def test_a_preset_outside_its_own_window_says_so(comfy):
    for start, said in ((0.0, False), (0.3, True)):
        nodes = graph()
        link = steer(nodes, "8", preset="MedSteer (paper)", start_percent=start)
        nodes["8"]["_meta"]["title"] = "paper"
        text = comfy.run(with_images(nodes, image=link)).text("paper")
        assert ("the published method steers" in text) is said
