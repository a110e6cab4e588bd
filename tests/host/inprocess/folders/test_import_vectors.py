"""Published vector files in the graph: imported at the sigmas that the user names, steered with, exported. Presets."""

import os
import pickle

import folder_paths
import numpy as np
import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.checkpoints.pixart_sigmas import PIXART_SCHEDULE, pixart_sigmas, pixart_timesteps
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.folders import vectors as vector_folder
from medsteer_pack.medsteer_core.host.patching import levels, patch
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.nodes.schedule import PixArtSigmas
from medsteer_pack.nodes.steer import Steer
from medsteer_pack.nodes.vectors import (
    ExportPathologyVector,
    ImportPathologyVector,
    LoadPathologyVector,
    SavePathologyVector,
)

STEPS = 4


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """ComfyUI with empty model and input folders."""
    models, uploads = tmp_path / "models", tmp_path / "input"
    (models / "medsteer").mkdir(parents=True)
    uploads.mkdir()
    monkeypatch.setattr(folder_paths, "models_dir", str(models))
    monkeypatch.setattr(folder_paths, "input_directory", str(uploads))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    folder_paths.folder_names_and_paths.pop("medsteer", None)
    vector_folder.register_folder()
    return tmp_path


def run(node, *arguments, **more):
    """What a node gives: its outputs, and last the text that it shows."""
    output = node.PREPARE_CLASS_CLONE(None).execute(*arguments, **more)
    return (*(output.result or ()), (output.ui if isinstance(output.ui, dict) else output.ui.as_dict())["text"][0])


def directions(steps=STEPS, blocks=tiny.DEPTH, width=tiny.WIDTH):
    values = np.random.default_rng(3).normal(size=(steps, blocks, width))
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def upload(folders, values, name="field.pickle"):
    steps = {step: {"blocks": list(blocks)} for step, blocks in enumerate(values)}
    (folders / "input" / name).write_bytes(pickle.dumps(steps))
    return f"input/{name}"


def imported(folders, model, values=None, schedule="normal", steps=STEPS, sigmas=None):
    return run(ImportPathologyVector, upload(folders, directions() if values is None else values), model, schedule,
               steps, sigmas)[0]  # fmt: skip


# Files


def test_published_files_are_listed_beside_the_packs_own_and_neither_list_holds_the_others(folders, pixart):
    kept = folders / "models" / "medsteer" / "colon"
    kept.mkdir()
    for name in ("a.pickle", "b.pkl", "c.npz", "d.safetensors", "e.txt"):
        (kept / name).write_bytes(b"")
        (folders / "input" / name).write_bytes(b"")
    inside = [os.path.join("colon", name) for name in ("a.pickle", "b.pkl", "c.npz")]
    assert vector_folder.reference_names() == [*inside, "input/a.pickle", "input/b.pkl", "input/c.npz"]
    assert vector_folder.names() == [os.path.join("colon", "d.safetensors"), "input/d.safetensors"]


@pytest.mark.parametrize("name", ["gone.npz", "../secret.pickle", "input/../secret.pickle", "input/v.safetensors", ""])
def test_a_name_that_is_not_listed_is_refused(folders, pixart, name):
    (folders / "secret.pickle").write_bytes(b"")
    (folders / "input" / "v.safetensors").write_bytes(b"")
    with pytest.raises(MedSteerError, match="There is no vector '.*Put the file into models/medsteer"):
        run(ImportPathologyVector, name, pixart, PIXART_SCHEDULE, 20)
    assert ImportPathologyVector.validate_inputs(name) == vector_folder.reference_problem(name) != ""
    assert ImportPathologyVector.validate_inputs(None) is True


def test_the_nodes_fingerprint_follows_the_files_bytes(folders):
    name = upload(folders, directions())
    assert ImportPathologyVector.validate_inputs(name) is True
    before = ImportPathologyVector.fingerprint_inputs(name, schedule="normal", steps=3)
    assert ImportPathologyVector.fingerprint_inputs(name) == before
    upload(folders, directions(steps=2))
    assert ImportPathologyVector.fingerprint_inputs(name) != before
    assert ImportPathologyVector.fingerprint_inputs(None) == ""


def test_a_malicious_pickle_runs_nothing_and_leaves_nothing(folders, pixart, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return (os.system, ("touch ran",))

    monkeypatch.chdir(folders)
    (folders / "input" / "bomb.pickle").write_bytes(pickle.dumps({0: {"blocks": [Bomb()]}}))
    with pytest.raises(MedSteerError, match=r"'bomb.pickle' is a pickle that asks for the global '(posix|nt).system'"):
        run(ImportPathologyVector, "input/bomb.pickle", pixart, PIXART_SCHEDULE, 20)
    assert not (folders / "ran").exists()


# Sigmas


def test_the_default_is_the_papers_schedule(folders, pixart):
    inputs = {entry.id: entry for entry in ImportPathologyVector.define_schema().inputs}
    assert (inputs["schedule"].default, inputs["steps"].default) == ("PixArt-alpha DPM-Solver++ (diffusers)", 20)
    values = directions(steps=20)
    vector = imported(folders, pixart, values, PIXART_SCHEDULE, 20)
    assert torch.equal(vector.sigmas, pixart_sigmas(20)[:-1])
    for block, site in enumerate(vector.sites.values()):
        assert torch.equal(site.directions[:, 0], torch.from_numpy(values[:, block]))


def test_a_scheduler_of_comfyui_gives_the_sigmas_that_ksampler_would_take(folders, pixart):
    vector = imported(folders, pixart, schedule="karras")
    assert torch.equal(vector.sigmas, sampling.schedule(pixart, STEPS, "euler", "karras").sigmas[:-1])
    assert vector.provenance["scheduler"] == "karras, 4 steps"


def test_the_sigmas_input_overrides_schedule_and_steps(folders, pixart):
    given = torch.tensor([9.0, 5.0, 3.0, 1.0, 0.0])
    vector = imported(folders, pixart, schedule=PIXART_SCHEDULE, steps=20, sigmas=given)
    assert torch.equal(vector.sigmas, given[:-1]) and vector.provenance["scheduler"] == "the sigmas input"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"schedule": PIXART_SCHEDULE, "steps": 20}, r"has 4 steps, and PixArt-alpha .* 20 steps gives 20"),
        ({"steps": 5}, "has 4 steps, and normal, 5 steps gives 5"),
        ({"sigmas": torch.tensor([2.0, 1.0, 0.5, 0.0])}, "has 4 steps, and the sigmas input gives 3"),
    ],
)
def test_another_number_of_steps_is_refused_naming_both(folders, pixart, more, said):
    with pytest.raises(MedSteerError, match=f"'field.pickle' {said}"):
        imported(folders, pixart, **more)


def test_another_depth_or_width_is_refused_naming_both(folders, pixart):
    with pytest.raises(
        MedSteerError, match="'field.pickle' was made for another model: it has 28 blocks.*has 3 blocks"
    ):
        imported(folders, pixart, directions(blocks=28))
    with pytest.raises(MedSteerError, match="directions have 1152 channels, and site 'blocks.0.* of this model has 48"):
        imported(folders, pixart, directions(width=1152))


def test_the_papers_sigmas_are_noise_levels_and_timesteps_of_comfyuis_pixart():
    model_sampling = tiny.stock_model().get_model_object("model_sampling")
    for steps in (1, 7, 20, 999):
        sigmas = PixArtSigmas.execute(steps, 1.0).result[0]
        assert torch.equal(sigmas[:-1], model_sampling.sigmas[pixart_timesteps(steps)])
        assert model_sampling.timestep(sigmas[:-1]).tolist() == pixart_timesteps(steps)
    assert len(PixArtSigmas.execute(10, 0.5).result[0]) == 11


# Steering with an imported vector


def test_an_imported_vector_suppresses_and_ablates_and_refuses_what_needs_class_statistics(folders, pixart):
    vector, cond, uncond = imported(folders, pixart), tiny.cond(1), tiny.cond(2)
    plain = tiny.run(pixart, cond, uncond)
    for operator in ({"operator": "suppress", "strength": 2.0, "keep_norm": True}, {"operator": "ablate"}):
        steered, text = run(Steer, pixart, vector, 0.0, 1.0, "all", "all", operator=operator)
        assert (tiny.run(steered, cond, uncond) - plain).abs().max() > 1e-3
        assert "Warning" not in text  # which weights it was made with is not known
    add = {"operator": "add", "strength": 1.0, "toward": "absent", "keep_norm": False}
    with pytest.raises(MedSteerError, match="The operator 'add' .*imported.* suppress or ablate, or extract"):
        run(Steer, pixart, vector, 0.0, 1.0, "all", "all", operator=add)
    with pytest.raises(MedSteerError, match="The operator 'affine' needs a vector .*'same state'"):
        run(Steer, pixart, vector, 0.0, 1.0, "all", "all", operator={"operator": "affine", "strength": 1.0})
    unsteered, _ = run(Steer, pixart, vector, 0.0, 1.0, "all", "all", operator={**add, "strength": 0.0})
    assert torch.equal(tiny.run(unsteered, cond, uncond), plain)


def test_what_the_import_says_of_a_vector_stays_when_it_is_saved_and_loaded(folders, pixart):
    vector, summary, shown = run(ImportPathologyVector, upload(folders, directions()), pixart, "normal", STEPS)
    assert summary == shown and "normal, 4 steps: the file does not hold them" in summary
    assert "3 of 3 sites, 48 channels" in summary and "field.pickle" in summary
    name, _ = run(SavePathologyVector, vector, "kept")
    again, text = run(LoadPathologyVector, name)
    assert again.content_hash() == vector.content_hash() and text == summary


def test_a_file_of_some_blocks_steers_these_and_leaves_the_others(folders, pixart):
    np.savez(
        folders / "input" / "some.npz", format="polypsteer-pathology-field-v3", values=directions(blocks=2),
        layer_ids=[0, 2], positive_prompts=["polyps"], negative_prompts=["cecum"], seeds=[1, 2],
    )  # fmt: skip
    vector, summary, _ = run(ImportPathologyVector, "input/some.npz", pixart, "normal", STEPS)
    assert "polyps - cecum" in summary and "2 of 3 sites" in summary and "2 seeds" in summary
    steered, _ = run(Steer, pixart, vector, 0.0, 1.0, "all", "all", operator={"operator": "ablate"})
    present, absent = tiny.cond(1), tiny.cond(2)
    with tiny.spying(steered, positive=present, negative=absent) as rows:
        tiny.run(steered, present, absent, steps=2)
    changed = {site: {row.changed for row in rows if row.site == site} for site in {row.site for row in rows}}
    assert changed == {f"blocks.{block}.cross_attn.proj": {block != 1} for block in range(3)}


# Export


def test_an_exported_vector_comes_back_bit_by_bit_with_the_same_schedule(folders, pixart):
    own = tiny.vector(pixart, steps=STEPS)
    name, text = run(ExportPathologyVector, own, "colon/polyps")
    assert name == os.path.join("colon", f"polyps_{own.short_hash()}.npz") and name in text
    assert os.listdir(folders / "models" / "medsteer" / "colon") == [os.path.basename(name)]
    assert name in vector_folder.reference_names()
    back, *_ = run(ImportPathologyVector, name, pixart, "normal", STEPS)
    assert torch.equal(back.sigmas, own.sigmas) and back.site_names == own.site_names
    for site in own.site_names:
        assert torch.equal(back.sites[site].directions, own.sites[site].directions)


@pytest.mark.parametrize("prefix", ["", "../polyps", "a*"])
def test_an_export_that_leads_out_of_the_folder_is_refused(folders, pixart, prefix):
    with pytest.raises(MedSteerError, match="filename_prefix is"):
        run(ExportPathologyVector, tiny.vector(pixart), prefix)
    assert not list(folders.rglob("*.npz"))


# Presets on Steer


def steering_of(model):
    (only,) = patch.plan_of(model).steerings
    return only


def test_preset_stands_behind_the_inputs_of_older_workflows_and_changes_nothing_by_default(pixart):
    older = ["model", "vector", "operator", "start_percent", "end_percent", "sites", "rows"]
    inputs = Steer.define_schema().inputs
    assert [entry.id for entry in inputs[: len(older)]] == older
    preset = inputs[len(older)]
    assert preset.id == "preset" and preset.optional and preset.default == "custom"
    assert preset.options == ["custom", "MedSteer (paper)", "PolypSteer"]
    operator = {"operator": "suppress", "strength": 1.5, "keep_norm": False}
    arguments = (pixart, tiny.vector(pixart), 0.2, 0.9, "0-1", "positive")
    old, old_text = run(Steer, *arguments, operator=operator)  # as a workflow saved before there were presets
    new, new_text = run(Steer, *arguments, operator=operator, preset="custom")
    for steering in (steering_of(old), steering_of(new)):
        assert steering.operator.to_dict() == {"name": "suppress", "strength": 1.5, "keep_norm": False}
        assert (steering.rows, len(steering.sites)) == ("positive", 2)
    assert old_text == new_text == "suppress at 2 of 3 sites, rows positive"
    samples = [tiny.run(model, tiny.cond(1), tiny.cond(2)) for model in (old, new)]
    assert torch.equal(*samples)


@pytest.mark.parametrize(
    ("preset", "strength", "keep_norm", "rows", "blocks"),
    [("MedSteer (paper)", 2.0, True, "all", (0, 1, 2)), ("PolypSteer", 2.5, False, "positive", (0, 1))],
)
def test_a_preset_replaces_operator_sites_and_rows_and_leaves_the_window(
    pixart, preset, strength, keep_norm, rows, blocks
):
    operator = {"operator": "ablate", "keep_norm": True}
    model, text = run(Steer, pixart, tiny.vector(pixart), 0.2, 0.9, "", "other", operator=operator, preset=preset)
    steering = steering_of(model)
    assert steering.operator.to_dict() == {"name": "suppress", "strength": strength, "keep_norm": keep_norm}
    assert (steering.rows, steering.sites) == (rows, tuple(f"blocks.{block}.cross_attn.proj" for block in blocks))
    assert steering.window == levels.window(pixart, 0.2, 0.9)
    assert f"{preset} in place of operator, sites and rows: suppress, strength {strength:g}" in text
    assert f"suppress at {len(blocks)} of 3 sites, rows {rows}" in text


def test_a_presets_blocks_are_counted_in_the_model_and_not_in_the_vector(pixart):
    names = [f"blocks.{block}.cross_attn.proj" for block in range(3)]
    some = tiny.vector(pixart, names=names[1:])
    some.provenance["dropped_sites"] = names[:1]
    model, _ = run(Steer, pixart, some, 0.0, 1.0, "all", "all", preset="PolypSteer")
    assert steering_of(model).sites == (names[1],)
    last = tiny.vector(pixart, names=names[2:])
    with pytest.raises(MedSteerError, match="preset 'PolypSteer' steers 'blocks.0.* and the vector has none of these"):
        run(Steer, pixart, last, 0.0, 1.0, "all", "all", preset="PolypSteer")


def test_strength_zero_stays_bit_identical_beside_presets(pixart):
    operator = {"operator": "suppress", "strength": 0.0, "keep_norm": True}
    model, text = run(Steer, pixart, tiny.vector(pixart), 0.0, 1.0, "all", "all", operator=operator, preset="custom")
    arguments = (tiny.cond(1), tiny.cond(2))
    assert torch.equal(tiny.run(model, *arguments), tiny.run(pixart, *arguments))
    assert "strength 0 changes nothing" in text


def test_an_unknown_preset_is_refused(pixart):
    with pytest.raises(MedSteerError, match="no preset 'Medsteer'"):
        run(Steer, pixart, tiny.vector(pixart), 0.0, 1.0, "all", "all", preset="Medsteer")
