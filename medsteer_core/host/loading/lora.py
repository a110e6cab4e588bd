"""PEFT LoRAs from ``models/loras`` on a MODEL and a CLIP, through ComfyUI's own patches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import comfy.lora
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...checkpoints import peft_lora
from ...checkpoints.peft_lora import CONFIG_FILE, PREFIX, WEIGHTS_FILE, PeftLora
from ...errors import MedSteerError
from ...files.inside import shown

FOLDER = "loras"
MODEL, CLIP = "MODEL", "CLIP"
TEXT_MODULES = ("encoder.block.", "decoder.block.", "text_model.")  # where T5's and CLIP's modules begin
# Under which of these names ComfyUI's map knows a module depends on the model's family.
MODEL_FORMS = (f"{PREFIX}{{}}", "transformer.{}", "diffusion_model.{}", "{}")
SHOWN = 3  # names in a report

Target = str | tuple  # a weight's key in the host's model, or (key, (axis, start, length)) for a part of one


@dataclass(frozen=True, eq=False)
class _Part:
    """A LoRA whose place in the host's model is settled. Nothing has been changed yet."""

    lora: PeftLora
    side: str
    targets: dict[str, Target]  # by module name
    missing: list[str]

    @property
    def unexpected(self) -> list[str]:
        return [*(name for name in self.lora.modules if name not in self.targets), *self.lora.unexpected]


def names() -> list[str]:
    """Every folder with a PEFT LoRA, and every folder that holds such folders, with ``/`` on every system."""
    parts = {part.as_posix() for part in _part_folders()}
    parents = {PurePath(part).parent.as_posix() for part in parts} - {"."}
    return sorted(parts | parents)


def problem(name: str) -> str:
    """Why a name can't be loaded; "" when it can."""
    try:
        find(name)
    except MedSteerError as error:
        return str(error)
    return ""


def find(name: str) -> list[Path]:
    """The PEFT folders behind a listed name. Other names, such as paths that lead out of models/loras, are refused."""
    listed = {part.as_posix(): path for part, path in _part_folders().items()}
    if isinstance(name, str) and name in listed:
        return [listed[name]]
    children = [path for part, path in sorted(listed.items()) if PurePath(part).parent.as_posix() == name != "."]
    if not children:
        raise MedSteerError(
            f"There is no PEFT LoRA '{shown(name)}'. Put its folder, with {WEIGHTS_FILE} and {CONFIG_FILE}, into "
            "models/loras and refresh the list (R)."
        )
    return children


def state(name: str) -> str:
    """Sizes and times of a LoRA's files: it changes when they do, so that they are read again."""
    files = [folder / file for folder in find(name) for file in (CONFIG_FILE, WEIGHTS_FILE)]
    return repr([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def apply_lora(
    model: ModelPatcher, clip: comfy.sd.CLIP | None, name: str, strength_model: float, strength_clip: float
) -> tuple[ModelPatcher, comfy.sd.CLIP | None, str]:
    """Clones of ``model`` and ``clip`` with the LoRA's parts, and a report. A side without a change is given as it is.

    Raises MedSteerError, before anything is changed, for a LoRA that can't be read or does not fit.
    """
    strengths = {MODEL: strength_model, CLIP: strength_clip}
    parts = [_settle(peft_lora.read(folder), model, clip, strengths) for folder in find(name)]
    used = [part for part in parts if strengths[part.side] != 0]
    _refuse_overlap(used)
    result: dict[str, Any] = {MODEL: model, CLIP: clip}
    for side in {part.side for part in used}:
        result[side] = result[side].clone()
    for part in used:
        _patch(result[part.side], part, strengths[part.side])
    report = "\n".join(_report(part, strengths[part.side]) for part in parts)
    for line in report.splitlines():
        logging.log(logging.WARNING if "Warning" in line else logging.INFO, "MedSteer: %s", line.strip())
    return result[MODEL], result[CLIP], report


def _part_folders() -> dict[PurePath, Path]:
    """Folders with both files, by their place in the list of LoRAs."""
    found = {}
    for name in folder_paths.get_filename_list(FOLDER):
        path = folder_paths.get_full_path(FOLDER, name) if PurePath(name).name == WEIGHTS_FILE else None
        if path is not None and Path(path).with_name(CONFIG_FILE).is_file():
            found[PurePath(name).parent] = Path(path).parent
    return found


def _settle(lora: PeftLora, model: ModelPatcher, clip: comfy.sd.CLIP | None, strengths: dict[str, float]) -> _Part:
    side = CLIP if all(name.startswith(TEXT_MODULES) for name in lora.modules) else MODEL
    if strengths[side] == 0:
        return _Part(lora, side, {}, [])
    if side == CLIP and clip is None:
        raise MedSteerError(
            f"'{lora.path.name}' is a LoRA for the text encoder, and no clip is connected. Connect the clip, or set "
            "strength_clip to 0."
        )
    if side == CLIP:
        network = clip.cond_stage_model
        lookup, known = _clip_lookup(comfy.lora.model_lora_keys_clip(network, {}))
    else:
        network = model.model
        lookup, known = _model_lookup(comfy.lora.model_lora_keys_unet(network, {}))
    weights = network.state_dict()
    found = {name: lookup(name) for name in lora.modules}
    targets = {name: target for name, target in found.items() if target is not None and _key(target) in weights}
    if not targets:
        some = ", ".join(f"'{name}'" for name in list(lora.modules)[:SHOWN])
        raise MedSteerError(
            f"'{lora.path.name}' fits nothing in this {side}: none of its {len(lora.modules)} modules ({some} ...) is "
            f"in a {type(_network(network)).__name__}. Choose a LoRA that was trained for it."
        )
    for name, target in targets.items():
        _check_shape(lora, name, target, weights[_key(target)])
    candidates = [name for name in known if _is_layer(lookup(name), weights)]
    return _Part(lora, side, targets, lora.missing(candidates))


def _network(network: torch.nn.Module) -> torch.nn.Module:
    return getattr(network, "diffusion_model", network)


def _key(target: Target) -> str:
    return target if isinstance(target, str) else target[0]


def _is_layer(target: Target | None, weights: dict[str, Tensor]) -> bool:
    return target is not None and _key(target) in weights and weights[_key(target)].ndim >= 2


def _model_lookup(key_map: dict[str, Target]) -> tuple[Callable[[str], Target | None], Iterable[str]]:
    """How to find a module's weight in a diffusion model, and the module names that peft would use there."""

    def lookup(name: str) -> Target | None:
        forms = [form.format(name) for form in MODEL_FORMS] + [f"lora_unet_{name.replace('.', '_')}"]
        return next((key_map[form] for form in forms if form in key_map), None)

    return lookup, [key.removeprefix(PREFIX) for key in key_map if key.startswith(PREFIX)]


def _clip_lookup(key_map: dict[str, Target]) -> tuple[Callable[[str], Target | None], Iterable[str]]:
    """The same for text encoders: ComfyUI names a module ``text_encoders.<encoder>.transformer.<its own name>``."""
    places: dict[str, set[Target]] = {}
    for key, target in key_map.items():
        if key.startswith("text_encoders.") and ".transformer." in key:
            places.setdefault(key.split(".transformer.", 1)[1], set()).add(target)
    # A name that two encoders of one CLIP share tells nothing.
    single = {name: next(iter(targets)) for name, targets in places.items() if len(targets) == 1}
    return single.get, list(single)


def _check_shape(lora: PeftLora, name: str, target: Target, weight: Tensor) -> None:
    shape = list(weight.shape)
    part = None if isinstance(target, str) else target[1]
    if part is not None:
        axis, start, length = part
        shape[axis] = min(length, shape[axis] - start)
    made_for = lora.modules[name].shape
    if made_for != tuple(shape):
        raise MedSteerError(
            f"'{lora.path.name}' is a LoRA for a model of another size: '{name}' is {tuple(made_for)} there and "
            f"{tuple(shape)} in the connected model. Choose the LoRA that was trained for this model."
        )


def _refuse_overlap(parts: list[_Part]) -> None:
    """Two parts for one weight are two LoRAs, such as two checkpoints of a training, and not two parts of one."""
    seen: dict[tuple[str, Target], str] = {}
    for part in parts:
        for name, target in part.targets.items():
            first = seen.get((part.side, target))
            if first is not None:
                raise MedSteerError(
                    f"'{part.lora.path.parent.name}' holds '{first}' and '{part.lora.path.name}', which both change "
                    f"'{name}': they are different LoRAs. Choose one of the two folders."
                )
            seen[part.side, target] = part.lora.path.name


def _patch(patcher: ModelPatcher | comfy.sd.CLIP, part: _Part, strength: float) -> None:
    """Hand a part to ComfyUI, which multiplies with alpha / rank."""
    tensors: dict[str, Tensor] = {}
    for name in part.targets:
        module = part.lora.modules[name]
        tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"] = module.up, module.down
        tensors[f"{name}.alpha"] = torch.tensor(module.scale * module.rank, dtype=torch.float64)
    patcher.add_patches(comfy.lora.load_lora(tensors, part.targets), strength)


def _report(part: _Part, strength: float) -> str:
    """What of a part was applied, missing and unexpected."""
    lora = part.lora
    if strength == 0:
        return f"{lora.path.name}: not applied, the strength for {part.side} is 0"
    modules = [lora.modules[name] for name in part.targets]
    ranks, scales = sorted({m.rank for m in modules}), sorted({m.scale for m in modules})
    lines = [
        f"{lora.path.name}: on {part.side} at strength {strength:g}, rank {_some(ranks)}, scale {_some(scales)}",
        f"  applied {_listed(list(part.targets))}",
        f"  {'Warning: ' * bool(part.missing)}missing {_listed(part.missing)}",
        f"  {'Warning: ' * bool(part.unexpected)}unexpected {_listed(part.unexpected)}",
    ]
    if lora.ignored_options:
        lines.append(f"  Warning: unknown options, not heeded {_listed(lora.ignored_options)}")
    return "\n".join(lines)


def _listed(items: list[str]) -> str:
    more = ", ..." if len(items) > SHOWN else ""
    return f"{len(items)}: {', '.join(items[:SHOWN])}{more}" if items else "0"


def _some(values: list[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
