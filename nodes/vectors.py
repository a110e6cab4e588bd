"""Nodes that keep pathology vectors in files."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.host import vector_folder
from ..medsteer_core.host.notes import note
from ..medsteer_core.summary import describe
from .types import CATEGORY, Vector


class SavePathologyVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_SavePathologyVector",
            display_name="Save Pathology Vector",
            category=f"{CATEGORY}/vectors",
            description="Writes a pathology vector to models/medsteer; the file name ends in a hash of its content.",
            search_aliases=["export vector", "store steering vector"],
            inputs=[
                Vector.Input("vector", tooltip="From Extract Pathology Vector."),
                io.String.Input(
                    "filename_prefix",
                    default="polyps",
                    tooltip="Start of the file name; may hold subfolders, such as colon/polyps.",
                ),
            ],
            outputs=[io.String.Output("path", tooltip="The name under which Load Pathology Vector lists the file.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, vector, filename_prefix: str) -> io.NodeOutput:
        name = vector_folder.save(vector, filename_prefix)
        return io.NodeOutput(name, ui=note(f"Saved as models/medsteer/{name}", cls.hidden.unique_id))


class LoadPathologyVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_LoadPathologyVector",
            display_name="Load Pathology Vector",
            category=f"{CATEGORY}/vectors",
            description="Reads a pathology vector from models/medsteer or from the input folder.",
            search_aliases=["import vector", "steering vector"],
            inputs=[
                io.Combo.Input(
                    "vector_name",
                    options=vector_folder.names(),
                    tooltip="A .safetensors file in models/medsteer, or an uploaded one in the input folder.",
                )
            ],
            outputs=[Vector.Output("vector", tooltip="The pathology vector, for Steer.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, vector_name: str | None) -> bool | str:
        # None: linked to another node, so not known yet
        return vector_name is None or vector_folder.problem(vector_name) or True

    @classmethod
    def fingerprint_inputs(cls, vector_name: str | None) -> str:
        return "" if vector_name is None else vector_folder.file_hash(vector_name)

    @classmethod
    def execute(cls, vector_name: str) -> io.NodeOutput:
        vector = vector_folder.load(vector_name)
        return io.NodeOutput(vector, ui=note(describe(vector), cls.hidden.unique_id))
