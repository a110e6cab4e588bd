"""Small files that would take all memory, much time or another path: each is refused, fast and in one line."""

import io
import json
import pickle
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from medsteer_core.checkpoints import peft_lora, pixart_config
from medsteer_core.checkpoints.peft_patterns import Clock
from medsteer_core.errors import MedSteerError
from medsteer_core.judges import card as judge_json
from medsteer_core.judges.onnx_network import _session
from medsteer_core.pictures.vector_plot import vector_picture
from medsteer_core.steering.selection import select_sites
from medsteer_core.vectors import file as vector_file
from medsteer_core.vectors import reference_files
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections
from medsteer_core.vectors.provenance import DEEPEST, check_provenance

MEMORY, SECONDS = 256 * 2**20, 5.0


def refused(read, *arguments, match):
    """The error, once reading stayed within the limits of a file under 1 MB."""
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(MedSteerError, match=match) as error:
            read(*arguments)
        seconds, (_, peak) = time.process_time() - begun, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < SECONDS and peak < MEMORY
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000
    return str(error.value)


# Memory


def test_one_list_named_at_every_step_is_not_copied_for_each():
    # 20,000 steps that each name one list of 60,000 parts: 10 GB, were it copied
    blocks = {"blocks": [None] * 60_000}
    data = pickle.dumps(dict.fromkeys(range(20_000), blocks), protocol=4)
    assert len(data) < 10**6
    refused(reference_files.read_pickle, data, "v.pickle", match="step 0, block 0")


def test_directions_that_can_not_be_orthogonal_are_refused_before_their_products(tmp_path):
    rank = 60_000  # in one channel: the products of all pairs would take 14 GB
    site = {
        "directions": torch.ones(1, rank, 1), "gaps": torch.ones(1, rank), "centres": torch.zeros(1, 1),
        "projections": torch.zeros(1, 2, rank), "spreads": torch.ones(1, 2),
    }  # fmt: skip
    about = {"format": vector_file.FORMAT, "version": "1", "sites": '["a"]', "flow": "false", "provenance": "{}",
             "content_hash": ""}  # fmt: skip
    save_file({"sigmas": torch.ones(1), **{f"a/{k}": v for k, v in site.items()}}, tmp_path / "v", metadata=about)
    refused(vector_file.load, tmp_path / "v", match="60000 directions of 1 channels can't be orthogonal")


def test_an_archive_that_unpacks_to_far_more_than_it_holds_is_refused():
    stream = io.BytesIO()
    values = np.zeros((1, 1, 30 * 2**18), np.float32)
    np.savez_compressed(
        stream, format=np.array(reference_files.NPZ_FORMAT), values=values, layer_ids=np.arange(1),
        positive_prompts=["a"], negative_prompts=["b"], seeds=[0],
    )  # fmt: skip
    data = stream.getvalue()
    assert len(data) < 10**6
    refused(reference_files.read_npz, data, "v.npz", match="16 times as many at most are read")


def test_an_archive_of_usual_numbers_that_packs_well_still_reads():
    stream = io.BytesIO()
    values = np.tile(np.eye(8, dtype=np.float32), (20, 4, 1))
    np.savez_compressed(
        stream, format=np.array(reference_files.NPZ_FORMAT), values=values, layer_ids=np.arange(32),
        positive_prompts=["a"], negative_prompts=["b"], seeds=[0],
    )  # fmt: skip
    assert np.array_equal(reference_files.read_npz(stream.getvalue(), "v.npz").values.numpy(), values)


# Time


def test_many_names_of_a_json_object_are_compared_once_each(tmp_path):
    text = "{" + ",".join(f'"{n}":0' for n in range(80_000)) + "}"
    (tmp_path / "judge.json").write_text(text)
    refused(judge_json.read_classifier, tmp_path / "judge.json", match="has the key '0'")


@pytest.fixture
def lora(tmp_path):
    """Write a LoRA of one module with a name that almost fits; options replace the config's."""

    def write(**options):
        name = "base_model.model." + "a" * 60 + ".to_q"
        tensors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"], **options}
        save_file(tensors, tmp_path / peft_lora.WEIGHTS_FILE)
        (tmp_path / peft_lora.CONFIG_FILE).write_text(json.dumps(config))
        return tmp_path

    return write


def test_a_pattern_that_would_never_end_is_stopped(lora, monkeypatch):
    monkeypatch.setattr(Clock.__init__, "__defaults__", (0.2,))
    folder = lora(rank_pattern={"(a|aa)+b": 2})
    refused(peft_lora.read, folder, match="patterns that take more than")
    known = peft_lora.read(lora(target_modules="(a|aa)+b"))
    refused(known.missing, ["a" * 60], match="patterns that take more than")


@pytest.mark.parametrize("pattern", ["(a|b|c){60000}", "((a{99}){99}){99}", "(?i)[\\x00-\\U0010ffff]", "a" * 2000])
def test_a_pattern_that_is_long_to_compile_is_refused(lora, pattern):
    refused(peft_lora.read, lora(target_modules=pattern), match="has target_modules")


def test_usual_patterns_are_taken(lora):
    pattern = r".*\.(to_q|to_k)|transformer_blocks\.\d{1,2}\.attn[12]\.to_v"
    assert peft_lora.read(lora(target_modules=pattern)).missing(["x.to_k", "x.proj"]) == ["x.to_k"]


# Numbers and texts


def test_whole_numbers_that_no_float_can_hold_are_refused(tmp_path):
    card = {"labels": ["a", "b"], "input_size": [8, 8], "mean": [0, 0, 10**400], "std": [1, 1, 1], "crop_pct": 1,
            "interpolation": "bicubic", "activation": "softmax"}  # fmt: skip
    (tmp_path / "judge.json").write_text(json.dumps(card))
    refused(judge_json.read_classifier, tmp_path / "judge.json", match="says mean")
    config = {"_class_name": pixart_config.CLASSES[0], "sample_size": 10**400, "interpolation_scale": 1e-300}
    refused(pixart_config.parse_config, json.dumps(config), "config.json", match="has sample_size")


def test_a_number_too_long_to_be_an_index_is_an_error_about_sites():
    refused(select_sites, "9" * 5000, ["a"], match="No site is named")


@pytest.mark.parametrize("name", ["a\nb", "a\u202eb", "a" * 300, "\ud800"])
def test_sites_with_strange_names_are_refused(tmp_path, name):
    vector = _vector()
    tensors = {key.replace("site", "x"): value for key, value in _tensors(vector).items()}
    about = {"format": vector_file.FORMAT, "version": "1", "sites": json.dumps([name]), "flow": "false",
             "provenance": "{}", "content_hash": ""}  # fmt: skip
    (tmp_path / "v").write_bytes(save(tensors, metadata=about))
    refused(vector_file.load, tmp_path / "v", match="damaged header")


def test_a_long_value_in_a_models_config_is_shown_in_part():
    text = json.dumps({"_class_name": pixart_config.CLASSES[0], "sample_size": "x" * 10**5})
    assert len(refused(pixart_config.parse_config, text, "config.json", match="has sample_size")) < 300


# Provenance


def _vector(**facts):
    site = SiteDirections(
        torch.eye(4)[None, :1], torch.ones(1, 1), torch.zeros(1, 4), torch.zeros(1, 2, 1), torch.ones(1, 2)
    )
    return PathologyVector({"site": site}, torch.ones(1), facts)


def _tensors(vector):
    return {"sigmas": vector.sigmas, **{f"site/{k}": v.clone() for k, v in vector.sites["site"].tensors().items()}}


@pytest.mark.parametrize(
    "facts",
    [
        {"unknown": 5}, {"unknown": [["gaps"]]}, {"dropped_sites": 3}, {"dropped_sites": [{}]}, {"prompts": "polyps"},
        {"prompts": {"present": {"text": 3}}}, {"prompts": {"present": ["x"]}}, {"prompts": None}, {"seeds": 3},
        {"estimator": ["combined"]}, {"estimator": "imported", "source": "x"}, {"combined": {}}, {"combined": None},
        {"combined": {"expression": "a", "parts": [{}], "overlap": []}}, {"explained": "1"}, {"explained": 10**400},
        {"combined": {"expression": "a", "parts": [{"provenance": {"prompts": 1}}], "overlap": []}},
        {"combined": {"expression": "a", "parts": [], "overlap": [{"parts": [0], "mean": 1}]}}, {"noise": []},
        {"model": "x"}, {"samples": "many"}, {"degenerate": []}, {"normalised": {}}, {"seed": -1.5},
    ],
)  # fmt: skip
def test_facts_of_another_kind_than_expected_are_refused_when_a_file_is_read(tmp_path, facts):
    path = vector_file.save(_vector(**facts), tmp_path / "v.safetensors")
    refused(vector_file.load, path, match="damaged pathology vector. Its provenance has")


def test_facts_that_nobody_reads_may_be_anything_and_none_is_needed():
    check_provenance({})
    check_provenance({"note": {"deep": [1, None, "x"]}, "model": None, "explained": None})


def test_facts_nested_beyond_sense_are_refused():
    value = {}
    for _ in range(DEEPEST):
        value = {"a": [value]}
    with pytest.raises(MedSteerError, match="nested more than"):
        check_provenance(value)


def test_a_prompt_with_dollar_signs_is_drawn_as_it_is():
    prompts = {"present": {"text": "$\\frac{$"}, "absent": {"text": "costs $5 or $6"}}
    assert vector_picture(_vector(prompts=prompts)).ndim == 3


# ONNX


@pytest.mark.parametrize(
    "key", [b"\n\x08location\x12\x01x", b"\n\x88\x00location\x12\x01x", b"\x12\x01x\n\x08location"]
)
def test_weights_in_another_file_are_refused_however_the_graph_says_so(key):
    pytest.importorskip("onnxruntime")
    with pytest.raises(MedSteerError, match="keeps weights in another file"):
        _session(b"\x08\x07" + key, "x.onnx", "cpu")


def test_a_zip_with_a_broken_directory_is_refused_as_an_archive():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in reference_files._MEMBERS:
            archive.writestr(f"{name}.npy", b"")
    data = bytearray(stream.getvalue())
    place = data.rindex(b"PK\x01\x02")
    data[place + 42 : place + 46] = (len(data) - 5).to_bytes(4, "little")  # a member that begins at the file's end
    with pytest.raises(MedSteerError, match="no pathology vector of the reference code"):
        reference_files.read_npz(bytes(data), "v.npz")


def test_positions_that_are_empty_or_have_no_sides_are_refused():
    shapes = ((), (0,), (1, 0, 12), (0, 12), (1, 4, 0), (1,) * 65)
    for positions in (*map(torch.ones, shapes), torch.full((1, 4, 12), float("nan"))):
        with pytest.raises(MedSteerError, match="position grid"):
            pixart_config.extent_of_positions(positions, 12, "x.safetensors")


def test_tensors_of_more_dimensions_than_torch_adds_up_are_refused(lora):
    many = torch.ones((1,) * 65)
    with pytest.raises(MedSteerError, match="sigmas has shape"):
        PathologyVector(_vector().sites, many)
    folder = lora()
    name = "base_model.model.to_q"
    save_file({f"{name}.lora_A.weight": many, f"{name}.lora_B.weight": many.clone()}, folder / peft_lora.WEIGHTS_FILE)
    refused(peft_lora.read, folder, match="were expected")


def test_a_plans_strange_keys_stand_in_one_line(tmp_path):
    yaml_file = pytest.importorskip("medsteer_core.scale.yaml_file")
    pytest.importorskip("yaml")
    source = yaml_file.parse(b'{"a\\nb": 1, "splits": {"c\\nd": 2}}', "plan.yaml")
    refused(source.check_keys, (), source.values, ["seeds"], match="there is no key")
    refused(source.check_keys, ("splits",), source.values["splits"], ["test"], match="there is no key")
