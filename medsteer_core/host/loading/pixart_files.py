"""Model files in the user's folders: one file, or a folder of shards with an index as Hugging Face ships it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths

from ...checkpoints.pixart_config import parse_config
from ...errors import MedSteerError

SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
INDEX = re.compile(r".*\.safetensors\.index\.(?:[^./\\]+\.)?json")
CONFIG = "config.json"


@dataclass(frozen=True)
class Contents:
    """What a model file holds: weights by name, the file's metadata, and how many shards it came in (1 for none)."""

    state: dict[str, Any]
    metadata: dict[str, str] | None
    shards: int = 1


def entries(folder: str) -> list[str]:
    """The models of one of ComfyUI's folders by name; shards that an index belongs to stand as that index, once."""
    names = folder_paths.get_filename_list(folder)
    return list(dict.fromkeys(index_of(folder, name) or name for name in names))


def index_of(folder: str, name: str) -> str | None:
    """The index that stands beside a shard; None when ``name`` is no shard or there is no index."""
    shard = SHARD.fullmatch(name)
    if shard is None:
        return None
    stem, _, variant = shard["stem"].rpartition(".")
    # The second is how diffusers names the index of a variant: X.fp16-00001-of-00002, X.safetensors.index.fp16.json.
    candidates = [f"{shard['stem']}.safetensors.index.json", f"{stem}.safetensors.index.{variant}.json"]
    return next((index for index in candidates if folder_paths.get_full_path(folder, index)), None)


def read(path: str, name: str) -> Contents:
    """Read a model file, or every shard of an index; MedSteerError naming the file that is missing or damaged."""
    if INDEX.fullmatch(path):
        return _read_shards(Path(path), name)
    shard = SHARD.fullmatch(name)
    if shard:
        raise MedSteerError(
            f"'{name}' is one of {int(shard['count'])} parts of a model; its index "
            f"'{Path(shard['stem']).name}.safetensors.index.json' was expected beside it. Download the whole folder."
        )
    return Contents(*_read_weights(path, name))


def _read_weights(path: str, name: str) -> tuple[dict[str, Any], dict[str, str] | None]:
    try:
        state, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    except Exception as error:  # safetensors, pickle, zip and the system each have errors of their own
        if comfy.model_management.is_oom(error):
            raise  # ComfyUI answers this one itself, by unloading models
        raise MedSteerError(
            f"'{name}' can't be read as a model file: {one_line(error)}. A whole file of weights was expected; "
            "download it again."
        ) from error
    if not isinstance(state, dict):
        raise MedSteerError(f"'{name}' holds a {type(state).__name__}; weights by name were expected.")
    return state, metadata


def _read_shards(index: Path, name: str) -> Contents:
    files: dict[str, set[str]] = {}
    for key, file in _weight_map(index, name).items():
        files.setdefault(file, set()).add(key)
    shown = {file: re.sub(r"[^/\\]+$", lambda _match, file=file: file, name) for file in files}
    for file in files:
        if not (index.parent / file).is_file():
            raise MedSteerError(
                f"The shard '{shown[file]}' is not beside '{name}', which names it. Download it into that folder."
            )
    state: dict[str, Any] = {}
    for file, keys in files.items():
        part, _ = _read_weights(str(index.parent / file), shown[file])
        if part.keys() != keys:
            odd = sorted(part.keys() ^ keys)[0]
            where = "is in the index but not in the shard" if odd in keys else "is in the shard but not in the index"
            raise MedSteerError(
                f"The shard '{shown[file]}' does not go with '{name}': '{odd}' {where}. Download the folder again."
            )
        state.update(part)
    return Contents(state, None, len(files))


def _weight_map(index: Path, name: str) -> dict[str, str]:
    """Which shard each weight is in. Names that lead out of the index's folder are refused."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise MedSteerError(
            f"'{name}' can't be read: {one_line(error)}. The index of a sharded model was expected."
        ) from error
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise MedSteerError(f"'{name}' has no weight_map; the index of a sharded model was expected.")
    for file in weights.values():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:]+\.safetensors", file):
            raise MedSteerError(
                f"'{name}' names the shard {json.dumps(file)}; the plain name of a .safetensors file beside it was "
                "expected. Download the folder again from its source."
            )
    return weights


def config_beside(path: str, name: str) -> tuple[dict[str, Any], str] | None:
    """The config.json in the folder of a model file, and its name for messages; None when there is none.

    Raises MedSteerError when it is no config of a PixArt.
    """
    file = Path(path).with_name(CONFIG)
    if not file.is_file():
        return None
    # Both separators, since names have the system's own.
    shown = re.sub(r"[^/\\]+$", CONFIG, name)
    try:
        text = file.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        raise MedSteerError(f"'{shown}' can't be read: {one_line(error)}.") from error
    return parse_config(text, shown), shown


def one_line(error: BaseException) -> str:
    """An error's own words in one line, without the full stop."""
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
