"""What ComfyUI has to import for this pack at its start: the pack, and no library. See `dev.py bench imports`."""

import sys

from benchmarks.speed.imports import HEAVY, heavy_of, imported, others_of

# Drawing, scoring and judging are for when a node runs.
LATER = {
    "scores.scorer",
    "pictures.sweep",
    "pictures.vector_plot",
    "pictures.panel",
    "pictures.difference",
    "judges.files",
    "endophantom.judges",
}


def test_the_pack_brings_in_no_library_and_nothing_of_its_own_that_draws_or_judges(checkout):
    modules = imported([checkout])[0]["modules"]
    assert heavy_of(modules) == []
    # Whatever else it needs, ComfyUI has loaded already.
    assert [name for name in others_of(modules) if name.split(".")[0] not in sys.stdlib_module_names] == []
    ours = {name.rpartition("medsteer_core.")[2] for name in modules if "medsteer_core." in name}
    assert "vectors.pathology_vector" in ours and not ours & LATER


def test_a_heavy_library_would_be_named():
    assert heavy_of(["json", "matplotlib.figure", "ray", "rayon"]) == ["matplotlib", "ray"]
    assert {"matplotlib", "torchmetrics", "ray", "timm", "diffusers"} <= set(HEAVY)
