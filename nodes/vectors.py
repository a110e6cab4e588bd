"""Nodes that keep pathology vectors in files."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.host.canvas.sharing import kept_with_recipe, shown_with_recipe
from ..medsteer_core.host.folders import reference_import
from ..medsteer_core.host.folders import vectors as vector_folder
from ..medsteer_core.pictures.summary import describe
from .types import CATEGORY, Vector


class SavePathologyVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_SavePathologyVector",
            display_name="Save Pathology Vector",
            category=f"{CATEGORY}/vectors",
            description="Keeps a pathology vector as a file in models/medsteer, for Load Pathology Vector.",
            search_aliases=["export vector", "store steering vector"],
            inputs=[
                Vector.Input("vector", tooltip="The vector to keep, from Extract, Combine or Import Pathology Vector."),
                io.String.Input(
                    "filename_prefix",
                    default="polyps",
                    tooltip="Start of the file name; may hold subfolders, such as colon/polyps.",
                ),
            ],
            outputs=[io.String.Output("path", tooltip="The name under which Load Pathology Vector lists the file.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, vector, filename_prefix: str) -> io.NodeOutput:
        name = vector_folder.save(vector, filename_prefix)
        shown = f"Saved as models/medsteer/{name}"
        return io.NodeOutput(name, ui=kept_with_recipe(vector, name, shown))


class LoadPathologyVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_LoadPathologyVector",
            display_name="Load Pathology Vector",
            category=f"{CATEGORY}/vectors",
            description="Loads a pathology vector that was saved before, for Steer.",
            search_aliases=["import vector", "steering vector"],
            inputs=[
                io.Combo.Input(
                    "vector_name",
                    options=vector_folder.names(),
                    tooltip="A .safetensors file in models/medsteer, or an uploaded one in the input folder.",
                )
            ],
            outputs=[Vector.Output("vector", tooltip="The pathology vector, for Steer.")],
            hidden=[io.Hidden.extra_pnginfo],
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
        return io.NodeOutput(vector, ui=shown_with_recipe(cls.hidden, vector, vector_name, describe(vector)))


class ImportPathologyVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_ImportPathologyVector",
            display_name="Import Pathology Vector",
            category=f"{CATEGORY}/vectors",
            description="Reads a vector from a file of the published code: MedSteer's .pickle or PolypSteer's .npz.",
            search_aliases=["load pickle", "load npz", "polypsteer", "published vector", "steering vector"],
            inputs=[
                io.Combo.Input(
                    "file_name",
                    options=vector_folder.reference_names(),
                    tooltip=(
                        "A .pickle, .pkl or .npz file in models/medsteer, or an uploaded one in the input folder. No "
                        "code in it is run."
                    ),
                ),
                io.Model.Input(
                    "model",
                    tooltip="The model that the file was made with: it gives the sites their names and widths.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=reference_import.SCHEDULES,
                    default=reference_import.SCHEDULES[0],
                    tooltip="The noise schedule that the file was made with; the file does not hold it.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=10000,
                    tooltip="Denoising steps that the file was made with; the published code takes 20.",
                ),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Takes the place of schedule and steps."),
            ],
            outputs=[
                Vector.Output("vector", tooltip="The pathology vector, for Steer (suppress, ablate) and Save."),
                io.String.Output("summary", tooltip="What the file says, and what was assumed."),
            ],
            hidden=[io.Hidden.extra_pnginfo],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, file_name: str | None) -> bool | str:
        # None: linked to another node, so not known yet
        return file_name is None or vector_folder.reference_problem(file_name) or True

    @classmethod
    def fingerprint_inputs(cls, file_name: str | None, **_others) -> str:
        return "" if file_name is None else vector_folder.reference_hash(file_name)

    @classmethod
    def execute(cls, file_name: str, model, schedule: str, steps: int, sigmas=None) -> io.NodeOutput:
        vector = reference_import.import_vector(model, file_name, schedule, steps, sigmas)
        summary = describe(vector)
        return io.NodeOutput(vector, summary, ui=shown_with_recipe(cls.hidden, vector, file_name, summary))


class ExportPathologyVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_ExportPathologyVector",
            display_name="Export Pathology Vector",
            category=f"{CATEGORY}/vectors",
            description="Writes a pathology vector as a file (.npz) for the published PolypSteer code.",
            search_aliases=["save npz", "polypsteer", "convert vector"],
            inputs=[
                Vector.Input(
                    "vector",
                    tooltip="The vector to write; one of rank 1, since the format holds one direction a site and step.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="polyps",
                    tooltip="Start of the file name; may hold subfolders, such as colon/polyps.",
                ),
            ],
            outputs=[io.String.Output("path", tooltip="The file's name in models/medsteer.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, vector, filename_prefix: str) -> io.NodeOutput:
        name = vector_folder.export(vector, filename_prefix)
        text = f"Exported as models/medsteer/{name}. It holds directions only: note the schedule that they belong to."
        return io.NodeOutput(name, ui=note(text))
