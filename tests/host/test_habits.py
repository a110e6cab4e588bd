"""How people run ComfyUI: a pack's folder of any name, no cache, no metadata, folders of their own."""

import json
from pathlib import Path

import pytest

from medsteer_core.run.client import ComfyClient
from medsteer_core.run.server import ComfyServer, comfyui_from_environment
from medsteer_core.run.workflow import WorkflowFailed

ROOT = Path(__file__).resolve().parents[2]


def quick():
    """The first template with few steps."""
    pair = api("a_first_pair")
    for node in pair.values():
        if node["class_type"] == "MedSteer_CounterfactualSampler":
            node["inputs"]["steps"] = 4
    return pair


def api(name):
    return json.loads((ROOT / "example_workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "flags"),
    [("mein médsteer 包 (2)", ("--cache-none", "--disable-metadata")), ("medsteer-lru", ("--cache-lru", "3"))],
)
def test_the_pack_works_in_a_folder_of_any_name_and_without_ordinary_caches(name, flags):
    with ComfyServer(comfyui_from_environment(), ROOT, cpu=True, name=name, extra=flags) as server:
        client = ComfyClient(server.address)
        for _ in range(2):  # the second time from the cache, or anew
            result = client.run(quick())
            assert "SSIM" in result.text("Counterfactual Panel") or "unlike" in result.text("Counterfactual Panel")


def test_folders_of_extra_model_paths_are_listed_and_the_users_default_is_where_vectors_go(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place / "vectors").mkdir(parents=True)
    config = tmp_path / "extra.yaml"
    config.write_text(
        f"mine:\n  base_path: {tmp_path / 'one'}\n  is_default: true\n  medsteer: vectors\n"
        f"others:\n  base_path: {tmp_path / 'two'}\n  medsteer: vectors\n",
        encoding="utf-8",
    )
    extract = api("extract_inspect_save")
    for node in extract.values():
        if node["class_type"] == "MedSteer_ExtractPathologyVector":
            node["inputs"] |= {"samples": 1, "steps": 2}
    with ComfyServer(
        comfyui_from_environment(), ROOT, cpu=True, extra=("--extra-model-paths-config", str(config))
    ) as server:
        ComfyClient(server.address).run(extract)
        saved = [path.parent.parent.name for path in tmp_path.rglob("*.safetensors")]
        assert saved == ["one"]
        (made,) = tmp_path.rglob("*.safetensors")
        made.rename(tmp_path / "two" / "vectors" / "moved.safetensors")
        listed = json.dumps(ComfyClient(server.address).object_info("MedSteer_LoadPathologyVector"))
        assert "moved.safetensors" in listed


def test_folders_that_cannot_be_written_to_cost_what_is_kept_there_and_nothing_else(tmp_path):
    """A file in a folder's place is what no user, not even root, can write into."""
    for folder in ("user/__medsteer", "output/medsteer", "models/vectors"):
        (tmp_path / folder).parent.mkdir(parents=True)
        (tmp_path / folder).write_text("in the way", encoding="utf-8")
    config = tmp_path / "extra.yaml"
    config.write_text(
        f"mine:\n  base_path: {tmp_path / 'models'}\n  is_default: true\n  medsteer: vectors\n", encoding="utf-8"
    )
    options = ("--user-directory", str(tmp_path / "user"), "--output-directory", str(tmp_path / "output"))
    extract, pairs = api("extract_inspect_save"), api("paired_dataset")
    for node in [*extract.values(), *pairs.values()]:
        few = {"samples": 1, "steps": 2, "batch_size": 1}
        node["inputs"] |= {name: few[name] for name in few if isinstance(node["inputs"].get(name), int)}
    with ComfyServer(
        comfyui_from_environment(), ROOT, cpu=True, extra=(*options, "--extra-model-paths-config", str(config))
    ) as server:
        client = ComfyClient(server.address)
        with pytest.raises(WorkflowFailed, match="vectors") as failed:
            client.run(extract)
        assert "Save Pathology Vector" in str(failed.value)
        with pytest.raises(WorkflowFailed, match="output"):
            client.run(pairs)
        assert [path.read_text() for path in tmp_path.rglob("*") if path.name == "__medsteer"] == ["in the way"]
