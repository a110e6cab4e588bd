"""Vectors in ComfyUI's folders: saved under models/medsteer, loaded by listed name and by no other."""

import folder_paths
import pytest
import tiny
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.folders import vectors as vector_folder
from medsteer_pack.medsteer_core.host.folders.copies import ONE_OF_OURS, tell_of_another_copy
from medsteer_pack.nodes.vectors import LoadPathologyVector


@pytest.fixture(scope="module")
def vector(pixart):
    return tiny.vector(pixart, steps=3)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """ComfyUI with empty model and input folders."""
    models, uploads = tmp_path / "models", tmp_path / "input"
    uploads.mkdir()
    monkeypatch.setattr(folder_paths, "models_dir", str(models))
    monkeypatch.setattr(folder_paths, "input_directory", str(uploads))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    folder_paths.folder_names_and_paths.pop("medsteer", None)
    vector_folder.register_folder()
    return tmp_path


def test_what_is_saved_is_listed_and_loads_with_the_same_content(vector, folders):
    name = vector_folder.save(vector, "polyps")
    assert name == f"polyps_{vector.short_hash()}.safetensors"
    assert (folders / "models" / "medsteer" / name).is_file()
    assert vector_folder.names() == [name]
    assert vector_folder.load(name).content_hash() == vector.content_hash()


@pytest.mark.parametrize("prefix", ["colon/polyps", "colon\\polyps", " colon/polyps "])
def test_a_prefix_may_name_a_folder(vector, prefix):
    name = vector_folder.save(vector, prefix)
    assert name == f"colon/polyps_{vector.short_hash()}.safetensors"
    assert vector_folder.load(vector_folder.names()[0]).content_hash() == vector.content_hash()


def test_other_content_gets_another_name_and_the_same_content_the_same(vector, pixart):
    other = tiny.vector(pixart, steps=3, seed=1)
    names = [vector_folder.save(value, "polyps") for value in (vector, vector, other)]
    assert names[0] == names[1] != names[2]
    assert sorted(vector_folder.names()) == sorted(set(names))


@pytest.mark.parametrize(
    "prefix",
    ["", " ", "/", "../polyps", "a/../../polyps", "..\\polyps", "./polyps", "C:\\polyps", "a\0b", "a\nb", "a*?"],
)
def test_a_prefix_that_leads_out_or_names_no_file_is_refused(vector, folders, prefix):
    with pytest.raises(MedSteerError, match="filename_prefix is"):
        vector_folder.save(vector, prefix)
    assert not list(folders.rglob("*.safetensors"))


def test_an_absolute_prefix_is_refused(vector, folders):
    with pytest.raises(MedSteerError, match="filename_prefix is .*begins with a slash"):
        vector_folder.save(vector, f"/{folders.name}/polyps")
    assert not list(folders.rglob("*.safetensors"))


def test_a_link_that_leads_out_of_the_folder_is_not_followed(vector, folders):
    (folders / "elsewhere").mkdir()
    inside = folders / "models" / "medsteer"
    inside.mkdir(parents=True, exist_ok=True)
    try:
        (inside / "away").symlink_to(folders / "elsewhere", target_is_directory=True)
    except OSError:  # Windows without the right to make links
        return
    with pytest.raises(MedSteerError, match="leads out of models/medsteer"):
        vector_folder.save(vector, "away/polyps")
    assert not list((folders / "elsewhere").iterdir())


def test_uploads_are_listed_and_loaded(vector, folders):
    name = vector_folder.save(vector, "polyps")
    (folders / "models" / "medsteer" / name).rename(folders / "input" / "mine.safetensors")
    (folders / "input" / "picture.png").write_bytes(b"")
    assert vector_folder.names() == ["input/mine.safetensors"]
    assert vector_folder.load("input/mine.safetensors").content_hash() == vector.content_hash()


def test_the_weights_of_judges_are_no_vectors(vector, folders):
    name = vector_folder.save(vector, "polyps")
    (folders / "models" / "medsteer" / "judges" / "mine").mkdir(parents=True)
    (folders / "models" / "medsteer" / "judges" / "mine" / "weights.safetensors").write_bytes(b"")
    assert vector_folder.names() == [name]


@pytest.mark.parametrize("name", ["missing.safetensors", "../secret.safetensors", "input/../secret.safetensors", ""])
def test_a_name_that_is_not_listed_is_refused_with_advice(folders, vector, name):
    saved = vector_folder.save(vector, "polyps")
    (folders / "models" / "medsteer" / saved).rename(folders / "secret.safetensors")
    with pytest.raises(MedSteerError, match=r"no vector '.*'\. Put the file into models/medsteer .*refresh the list"):
        vector_folder.load(name)
    assert "There is no vector" in vector_folder.problem(name)
    assert LoadPathologyVector.validate_inputs(name) == vector_folder.problem(name)


def test_the_load_nodes_fingerprint_follows_the_files_bytes(vector, pixart, folders):
    name = vector_folder.save(vector, "polyps")
    before = LoadPathologyVector.fingerprint_inputs(name)
    assert LoadPathologyVector.validate_inputs(name) is True
    assert LoadPathologyVector.fingerprint_inputs(name) == before
    other = vector_folder.save(tiny.vector(pixart, steps=3, seed=1), "other")
    (folders / "models" / "medsteer" / other).replace(folders / "models" / "medsteer" / name)
    assert LoadPathologyVector.fingerprint_inputs(name) != before


def test_a_listed_file_that_is_no_vector_is_refused(folders):
    (folders / "input" / "notes.safetensors").write_text("not a vector")
    with pytest.raises(MedSteerError, match="a text file, not a readable safetensors file"):
        vector_folder.load("input/notes.safetensors")


def test_another_copy_of_the_pack_is_told_of(caplog, monkeypatch):
    import nodes

    class There:
        RELATIVE_PYTHON_MODULE = "custom_nodes.medsteer-old"

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, ONE_OF_OURS, There)
    tell_of_another_copy("custom_nodes.medsteer-old")
    assert caplog.text == ""
    tell_of_another_copy("custom_nodes.medsteer")
    assert "installed twice, as 'custom_nodes.medsteer-old' and as 'custom_nodes.medsteer'" in caplog.text
    monkeypatch.delitem(nodes.NODE_CLASS_MAPPINGS, ONE_OF_OURS)
    caplog.clear()
    tell_of_another_copy("custom_nodes.medsteer")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a:\n  is_default: true\n  medsteer: THERE\n", "THERE"),
        ("a:\n  medsteer: THERE\n", "own"),
        ("a:\n  is_default: true\n  loras: THERE\n", "own"),
        ("[broken", "own"),
        ("- a\n- b\n", "own"),
        (None, "own"),
    ],
)
def test_the_users_default_folder_stays_the_first(tmp_path, monkeypatch, text, first):
    from comfy.cli_args import args

    config = tmp_path / "extra.yaml"
    if text is not None:
        config.write_text(text, encoding="utf-8")
    monkeypatch.setattr(args, "extra_model_paths_config", [[str(config)]])
    monkeypatch.setitem(folder_paths.folder_names_and_paths, vector_folder.FOLDER, (["THERE"], set()))
    vector_folder.register_folder()
    paths = folder_paths.get_folder_paths(vector_folder.FOLDER)
    assert len(paths) == 2 and (paths[0] == "THERE") == (first == "THERE")
