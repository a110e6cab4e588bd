"""A workflow comes from anyone: no name in it leaves ComfyUI's folders, and no node runs or downloads anything."""

import ast
import json
import math
from pathlib import Path

import folder_paths
import pytest
import tiny
import torch
from comfy.cli_args import args
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.folders import (
    judges as judge_folder,
)
from medsteer_pack.medsteer_core.host.folders import (
    pairs as pair_folder,
)
from medsteer_pack.medsteer_core.host.folders import (
    vectors as vector_folder,
)
from medsteer_pack.medsteer_core.host.loading import checkpoints, lora
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.host.sampling.counterfactual import multiples_of
from medsteer_pack.nodes import NODES
from medsteer_pack.nodes.export import SaveCounterfactualPairs
from medsteer_pack.nodes.pictures import CounterfactualPanel, StrengthSweep
from medsteer_pack.nodes.sampler import CounterfactualSampler
from medsteer_pack.nodes.vectors import ExportPathologyVector, ImportPathologyVector, LoadPathologyVector
from PIL import Image

NAMES = [
    "../secret", "../../etc/passwd", "/etc/passwd", "C:\\secret", "\\\\server\\share\\x", "input/../secret", "a\0b",
    "a\nb", "CON", "NUL.safetensors", "COM1", "x" * 5000, "a\u202eb", "\ud800", "http://example.com/x", "~/x", "%s", "",
]  # fmt: skip
SUFFIXES = ["", ".safetensors", ".pickle", ".npz"]
NO_TEXTS = [None, 5, {"a": 1}, ["1", 0], True]
PACK = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def vector(pixart):
    return tiny.vector(pixart, steps=3)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """ComfyUI with empty model, input and output folders, and a secret beside them."""
    for name in ("input", "output", "models", "temp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    for name in ("input", "output", "temp"):
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    folder_paths.folder_names_and_paths.pop("medsteer", None)
    vector_folder.register_folder()
    for suffix in SUFFIXES:
        (tmp_path / f"secret{suffix}").write_text("secret")
    return tmp_path


def refused(call, *arguments):
    with pytest.raises(MedSteerError) as error:
        call(*arguments)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


# Names


@pytest.mark.parametrize("name", NAMES)
def test_no_name_that_is_read_leads_out_of_the_folders(name):
    for suffix in SUFFIXES:
        refused(vector_folder.find, name + suffix)
        refused(vector_folder.find_reference, name + suffix)
        refused(judge_folder.judge_of, name + suffix or "judge")
        refused(lora.find, name + suffix)
        for folder in ("diffusion_models/", "checkpoints/", "", "input/"):
            refused(checkpoints.load_described, folder + name + suffix)
    for node, key in (
        (LoadPathologyVector, "vector_name"),
        (ImportPathologyVector, "file_name"),
        (StrengthSweep, "judge"),
    ):
        said = node.validate_inputs(**{key: name})
        assert isinstance(said, str) and said.isprintable() and len(said) < 1000


@pytest.mark.parametrize("name", NO_TEXTS[1:])
def test_what_is_no_text_is_no_name(name):
    for call in (vector_folder.find, vector_folder.find_reference, judge_folder.judge_of, lora.find):
        refused(call, name)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("~/x", "%s")])
def test_no_name_that_is_written_leads_out_of_the_folders(vector, folders, name):
    before = {path for path in folders.rglob("*") if path.is_file()}
    for call in (vector_folder.save, vector_folder.export):
        refused(call, vector, name)
    refused(pair_folder.folder_of, name)
    assert SaveCounterfactualPairs.validate_inputs(name, None, None, None) == pair_folder.problem(name) != ""
    assert {path for path in folders.rglob("*") if path.is_file()} == before


def test_names_of_home_folders_and_patterns_are_names_like_others(vector, folders):
    # neither is expanded
    assert vector_folder.save(vector, "~/x").startswith("~")
    assert (folders / "models" / "medsteer" / "~").is_dir()


def test_a_link_in_the_output_folder_is_not_followed_out_of_it(folders):
    (folders / "elsewhere").mkdir()
    try:
        (folders / "output" / "away").symlink_to(folders / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("no right to make links")
    for name in ("away", "away/pairs"):
        refused(pair_folder.folder_of, name)
    assert not list((folders / "elsewhere").iterdir())


def test_a_link_among_the_uploads_that_leads_out_is_refused(vector, folders):
    saved = vector_folder.save(vector, "polyps")
    (folders / "models" / "medsteer" / saved).rename(folders / "away.safetensors")
    try:
        (folders / "input" / "v.safetensors").symlink_to(folders / "away.safetensors")
    except OSError:
        pytest.skip("no right to make links")
    refused(vector_folder.load, "input/v.safetensors")
    # In a model folder links are the user's own way to keep large files elsewhere.
    (folders / "models" / "medsteer" / "linked.safetensors").symlink_to(folders / "away.safetensors")
    folder_paths.filename_list_cache.clear()
    assert vector_folder.load("linked.safetensors").content_hash() == vector.content_hash()


def test_a_broken_link_in_a_judges_folder_is_no_crash(folders):
    judge = folders / "models" / "medsteer" / "judges" / "mine"
    judge.mkdir(parents=True)
    (judge / "judge.json").write_text("{}")
    try:
        (judge / "gone").symlink_to(folders / "nowhere")
    except OSError:
        pytest.skip("no right to make links")
    assert "judge.json" in judge_folder.state("mine")


# What the pack's modules do


# Whole names of calls, and modules, that no node needs.
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "Popen", "run_path", "run_module", "urlopen",
         "urlretrieve", "hf_hub_download", "snapshot_download", "load_state_dict_from_url", "load_module"}  # fmt: skip
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "socket", "urllib",
           "requests", "http", "httpx", "aiohttp", "ftplib", "huggingface_hub", "runpy", "ctypes",
           "webbrowser"}  # fmt: skip
# Each of these talks to a ComfyUI or starts one, for the user's own commands; nodes don't import them.
COMMANDS = {"client", "server", "retrying_http", "listener", "run", "demo", "downloads"}


def nodes_modules():
    """The files of the pack that ComfyUI has loaded with its nodes, or that those import inside functions."""
    found, waiting = set(), [PACK / "nodes" / "__init__.py"]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                names = [folder.with_suffix(".py"), folder / "__init__.py"] if node.module else []
                waiting += names + [folder / f"{alias.name}.py" for alias in node.names]
    return sorted(found)


def test_no_module_behind_a_node_executes_downloads_or_unpickles():
    files = nodes_modules()
    assert len(files) > 60 and not {path.stem for path in files} & COMMANDS
    wrong = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                wrong += [f"{path.name}: import {name}" for name in names if name.split(".")[0] in MODULES]
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                plain = isinstance(node.func, ast.Name) or name not in ("compile", "eval")  # re.compile, network.eval
                torch_load = name == "load" and getattr(getattr(node.func, "value", None), "id", "") == "torch"
                torch_load = torch_load and "weights_only=True" not in ast.unparse(node)
                if (name in CALLS and plain) or torch_load:
                    wrong.append(f"{path.name}:{node.lineno} {name}")
    assert not wrong


def test_every_module_that_is_loaded_is_among_those_that_were_looked_at(pack_modules):
    loaded = {Path(module.__file__).resolve() for module in pack_modules.values() if module.__file__}
    assert len(loaded) > 60
    assert {path for path in loaded if path.stem != "__init__"} <= set(nodes_modules())


def test_no_node_has_an_input_for_an_address_or_code():
    for node in NODES:
        for entry in node.define_schema().inputs:
            assert not {"url", "code", "script", "command", "path", "expression"} & set(entry.id.lower().split("_")), (
                node.__name__, entry.id,
            )  # fmt: skip


# What is written into files


class Hidden:
    prompt, extra_pnginfo, unique_id = {"1": {"inputs": {"text": "a private prompt"}}}, {"workflow": {"x": 1}}, "1"


def _texts(folders, disabled, monkeypatch):
    monkeypatch.setattr(args, "disable_metadata", disabled)
    made = CounterfactualPanel.PREPARE_CLASS_CLONE(None)
    made.hidden = Hidden
    images = torch.rand(1, 32, 32, 3)
    made.execute(images, images)
    (picture,) = (folders / "temp").rglob("*.png")
    return Image.open(picture).text


def test_previews_carry_the_workflow_and_nothing_with_disable_metadata(folders, monkeypatch):
    assert json.loads(_texts(folders, False, monkeypatch)["prompt"]) == Hidden.prompt
    for path in (folders / "temp").rglob("*.png"):
        path.unlink()
    assert _texts(folders, True, monkeypatch) == {}


@pytest.mark.parametrize("metadata", pair_folder.METADATA)
def test_saved_pairs_carry_what_their_setting_says_and_less_with_disable_metadata(metadata, monkeypatch):
    monkeypatch.setattr(args, "disable_metadata", False)
    texts = pair_folder.png_texts(metadata, Hidden.prompt, Hidden.extra_pnginfo)
    assert ("private" in json.dumps(texts)) == (metadata == pair_folder.WORKFLOW)
    assert pair_folder.with_record(metadata) == (metadata != pair_folder.MARKING)
    monkeypatch.setattr(args, "disable_metadata", True)
    assert pair_folder.png_texts(metadata, Hidden.prompt, Hidden.extra_pnginfo) == {}
    assert not pair_folder.with_record(metadata)


# Numbers, masks and latents of any kind


@pytest.mark.parametrize(
    "text", ["nan", "inf", "1e999", "", ",", "1;2", "0x1", "1" * 5000, "1,", "\N{FULLWIDTH DIGIT ONE}", "--1"]
)
def test_strengths_are_finite_numbers_or_refused(text):
    try:
        numbers = multiples_of(text)
    except MedSteerError:
        return
    assert numbers and all(map(math.isfinite, numbers))


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, 1e300, 10**400, "x", None])
def test_a_strength_that_is_not_finite_or_beyond_sense_is_refused(pixart, vector, strength):
    refused(lambda: tiny.steered(pixart, vector, operator="suppress", strength=strength, keep_norm=True))


@pytest.mark.parametrize("strength", [1e6, -1e6])
def test_the_largest_strengths_give_finite_images(pixart, vector, strength):
    model = tiny.steered(pixart, vector, operator="suppress", strength=strength, keep_norm=True)
    assert tiny.run(model, tiny.cond(1), tiny.cond(2), steps=2).isfinite().all()


@pytest.mark.parametrize(
    ("height", "width", "mask"), [(2, 2, (1, 1)), (2, 14, (500, 3)), (6, 10, (3, 1)), (8, 8, (64, 64))]
)
def test_masks_and_latents_of_any_size_go_together(pixart, vector, height, width, mask):
    model = tiny.steered(pixart, vector, operator="ablate")
    output = _sampled(model, latent_image=tiny.latent(height, width), mask=torch.full((1, *mask), 0.5))
    factual, counterfactual = (output.result[place]["samples"] for place in (0, 1))
    assert factual.shape[-2:] == counterfactual.shape[-2:] == (height, width)
    assert factual.isfinite().all() and counterfactual.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_mask_that_is_not_finite_is_refused(pixart, vector, value):
    model = tiny.steered(pixart, vector, operator="ablate")
    with pytest.raises(MedSteerError):
        _sampled(model, latent_image=tiny.latent(), mask=torch.full((1, 8, 8), value))


def _sampled(model, **inputs):
    made = CounterfactualSampler.PREPARE_CLASS_CLONE(None)
    made.hidden = Hidden
    usual = {
        "positive": tiny.cond(1), "negative": tiny.cond(2), "seed": 1, "steps": 2, "cfg": 2.0, "sampler_name": "euler",
        "scheduler": sampling.SCHEDULERS[0], "strengths": "1", "lock": "none", "lock_threshold": 0.2,
        "lock_dilation": 1,
    }  # fmt: skip
    return made.execute(model=model, **{**usual, **inputs})


def test_an_exported_vector_holds_the_prompts_and_the_loaders_error_never_a_files_content(vector, folders):
    name = vector_folder.export(vector, "polyps")
    assert (folders / "models" / "medsteer" / name).is_file()
    (folders / "input" / "x.safetensors").write_text("secret words of another file")
    with pytest.raises(MedSteerError) as error:
        vector_folder.load("input/x.safetensors")
    assert "secret words" not in str(error.value)
    assert ExportPathologyVector.define_schema().is_output_node
