"""The pack inside ComfyUI's Python hides none of ComfyUI's modules, and none of ComfyUI's hide the pack's."""

import sys
from pathlib import Path

import comfy.model_management
import folder_paths
import medsteer_pack
from execution import full_type_name
from medsteer_pack.medsteer_core import errors

import nodes
from medsteer_core.run.server import comfyui_from_environment

COMFYUI = comfyui_from_environment()


def test_nodes_is_comfyuis_own_module():
    assert Path(nodes.__file__) == COMFYUI / "nodes.py"
    assert "KSampler" in nodes.NODE_CLASS_MAPPINGS


def test_the_packs_nodes_live_under_the_packs_name():
    assert Path(sys.modules["medsteer_pack.nodes"].__file__).parent == Path(medsteer_pack.__file__).parent / "nodes"
    assert sys.modules["medsteer_pack.nodes"] is not nodes


def test_everything_runs_on_the_cpu():
    assert comfy.model_management.get_torch_device().type == "cpu"


def test_no_folder_of_the_users_comfyui_is_written_to():
    for folder in (folder_paths.output_directory, folder_paths.input_directory, folder_paths.models_dir):
        assert not Path(folder).is_relative_to(COMFYUI)


def test_an_error_is_shown_without_the_path_of_the_packs_folder():
    """ComfyUI puts the module and the class before the message; a pack's own modules are named after its folder."""
    assert full_type_name(errors.MedSteerError) == "medsteer_core.errors.MedSteerError"
