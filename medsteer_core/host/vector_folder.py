"""Where pathology vectors are kept: ``models/medsteer`` and, for uploads, ComfyUI's input folder."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import folder_paths

from .. import vector_file
from ..errors import MedSteerError
from ..pathology_vector import PathologyVector

FOLDER, SUFFIX, UPLOADED = "medsteer", ".safetensors", "input/"


def register_folder() -> None:
    """Make ``models/medsteer`` known to ComfyUI (and to the user's extra model paths)."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER), is_default=True)


def names() -> list[str]:
    """Every vector file: names in ``models/medsteer``, then ``input/...`` for uploaded ones."""
    kept = folder_paths.get_filename_list(FOLDER) if FOLDER in folder_paths.folder_names_and_paths else []
    upload_root = Path(folder_paths.get_input_directory())
    uploads = sorted(path.name for path in upload_root.glob(f"*{SUFFIX}")) if upload_root.is_dir() else []
    return [name for name in kept if name.endswith(SUFFIX)] + [f"{UPLOADED}{name}" for name in uploads]


def problem(name: str) -> str:
    """Why a vector name can't be loaded; "" when it can."""
    try:
        find(name)
    except MedSteerError as error:
        return str(error)
    return ""


def find(name: str) -> Path:
    """The file behind a listed name. Names that are not listed, such as paths out of the folders, are refused."""
    if name not in names():
        raise MedSteerError(
            f"There is no vector '{name}'. Put the file into models/medsteer (or upload it to the input folder) and "
            "refresh the list (R), or make it again with Extract and Save Pathology Vector."
        )
    if name.startswith(UPLOADED):
        path = Path(folder_paths.get_input_directory()) / name.removeprefix(UPLOADED)
        if path.is_file():
            return path
    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def file_hash(name: str) -> str:
    """Hash of a vector file's bytes, so that a changed file is read again."""
    return hashlib.sha256(find(name).read_bytes()).hexdigest()


def load(name: str) -> PathologyVector:
    return vector_file.load(find(name))


def save(vector: PathologyVector, prefix: str) -> str:
    """Write ``{prefix}_{short hash}.safetensors`` under ``models/medsteer``; returns the name in that folder."""
    parts = [part for part in re.split(r"[\\/]", prefix.strip()) if part]
    if not parts or any(part in (".", "..") or re.search(r'[<>:"|?*\x00-\x1f]', part) for part in parts):
        raise MedSteerError(
            f"filename_prefix is '{prefix}'; a name such as 'polyps' or 'colon/polyps' was expected: no '..', drive, "
            'and none of < > : " | ? *.'
        )
    root = Path(folder_paths.get_folder_paths(FOLDER)[0])
    path = root.joinpath(*parts[:-1], f"{parts[-1]}_{vector.short_hash()}{SUFFIX}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.resolve().is_relative_to(root.resolve()):
        raise MedSteerError(f"filename_prefix '{prefix}' leads out of models/medsteer; choose a name inside it.")
    vector_file.save(vector, path)
    return str(path.relative_to(root))  # with the system's own separators, as ComfyUI lists it
