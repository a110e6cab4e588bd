"""Where pathology vectors are kept: ``models/medsteer`` and, for uploads, ComfyUI's input folder.

Besides the pack's own files these folders may hold published ones of the reference code, under names of their own kind.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import folder_paths

from ...errors import MedSteerError
from ...files.inside import name_parts, path_inside, shown
from ...vectors import file as vector_file
from ...vectors import reference_files
from ...vectors.pathology_vector import PathologyVector
from ...vectors.reference_files import NPZ_SUFFIX, PICKLE_SUFFIXES
from ...vectors.reference_vectors import from_vector

FOLDER, SUFFIX, UPLOADED = "medsteer", ".safetensors", "input/"
JUDGES = "judges"  # a folder in it, see judge_folder.py
REFERENCE_SUFFIXES = (*PICKLE_SUFFIXES, NPZ_SUFFIX)
_AGAIN = ", or make it again with Extract and Save Pathology Vector"


def register_folder() -> None:
    """Make ``models/medsteer`` known to ComfyUI, before the user's extra model paths unless those are the default."""
    own = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, own, is_default=not _has_default_of_user())


def _has_default_of_user() -> bool:
    """Whether an extra_model_paths file that ComfyUI reads names our folder under ``is_default``.

    ComfyUI has read it by now, and keeps the paths without that word.
    """
    import yaml
    from comfy.cli_args import args

    beside = Path(folder_paths.__file__).parent / "extra_model_paths.yaml"
    named = [Path(path) for paths in args.extra_model_paths_config or () for path in paths]
    for path in (beside, *named):
        try:
            sections = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        values = sections.values() if isinstance(sections, dict) else ()
        if any(isinstance(one, dict) and one.get("is_default") and FOLDER in one for one in values):
            return True
    return False


def names() -> list[str]:
    """Every vector file: names in ``models/medsteer``, then ``input/...`` for uploaded ones. Judges' files are none."""
    return [name for name in _listed((SUFFIX,)) if Path(name).parts[0] != JUDGES]


def reference_names() -> list[str]:
    """Every published file (.pickle, .pkl, .npz), listed in the same way."""
    return _listed(REFERENCE_SUFFIXES)


def _listed(suffixes: tuple[str, ...]) -> list[str]:
    kept = folder_paths.get_filename_list(FOLDER) if FOLDER in folder_paths.folder_names_and_paths else []
    upload_root = Path(folder_paths.get_input_directory())
    uploads = sorted(path.name for path in upload_root.iterdir()) if upload_root.is_dir() else []
    return [name for name in (*kept, *(f"{UPLOADED}{name}" for name in uploads)) if name.endswith(suffixes)]


def problem(name: str) -> str:
    """Why a vector name can't be loaded; "" when it can."""
    return _problem(find, name)


def reference_problem(name: str) -> str:
    """Why a published file's name can't be imported; "" when it can."""
    return _problem(find_reference, name)


def _problem(look: Callable[[str], Path], name: str) -> str:
    try:
        look(name)
    except MedSteerError as error:
        return str(error)
    return ""


def find(name: str) -> Path:
    """The file behind a listed name. Names that are not listed, such as paths out of the folders, are refused."""
    return _find(name, names(), _AGAIN)


def find_reference(name: str) -> Path:
    """The same for a published file."""
    return _find(name, reference_names())


def _find(name: str, listed: list[str], otherwise: str = "") -> Path:
    if not isinstance(name, str) or name not in listed:
        raise MedSteerError(
            f"There is no vector '{shown(name)}'. Put the file into models/medsteer (or upload it to the input folder) "
            f"and refresh the list (R){otherwise}."
        )
    if name.startswith(UPLOADED):
        # What is uploaded is a file; a link among the uploads was put there by something else.
        path = path_inside(Path(folder_paths.get_input_directory()), [name.removeprefix(UPLOADED)], "the input folder")
        if path.is_file():
            return path
    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def file_hash(name: str) -> str:
    """Hash of a vector file's bytes, so that a changed file is read again."""
    return _hash(find(name))


def reference_hash(name: str) -> str:
    """The same for a published file."""
    return _hash(find_reference(name))


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):  # such a file may be anything, and of any size
            digest.update(part)
    return digest.hexdigest()


def load(name: str) -> PathologyVector:
    return vector_file.load(find(name))


def save(vector: PathologyVector, prefix: str) -> str:
    """Write ``{prefix}_{short hash}.safetensors`` under ``models/medsteer``; returns the name in that folder."""
    root, path = _target(vector, prefix, SUFFIX)
    vector_file.save(vector, path)
    return str(path.relative_to(root))  # with the system's own separators, as ComfyUI lists it


def export(vector: PathologyVector, prefix: str) -> str:
    """Write ``{prefix}_{short hash}.npz``, PolypSteer's format, there; returns the name in that folder."""
    field = from_vector(vector)  # before a folder is made for it
    root, path = _target(vector, prefix, NPZ_SUFFIX)
    reference_files.write_npz(field, path)
    return str(path.relative_to(root))


def _target(vector: PathologyVector, prefix: str, suffix: str) -> tuple[Path, Path]:
    """The folder ``models/medsteer`` and the file to write in it, whose own folder exists."""
    parts = name_parts(prefix, "filename_prefix")
    root = Path(folder_paths.get_folder_paths(FOLDER)[0])
    path = path_inside(root, (*parts[:-1], f"{parts[-1]}_{vector.short_hash()}{suffix}"), f"models/{FOLDER}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return root, path
