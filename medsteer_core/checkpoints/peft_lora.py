"""LoRAs as Hugging Face's `peft` saves them: a folder with `adapter_config.json` and `adapter_model.safetensors`.

A LoRA adds `scale * up @ down` to a module's weight (arXiv 2106.09685, section 4.1). The config holds what the scale
is made of, and much else that can change the result. What is not applied here exactly as peft does is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import MedSteerError
from ..files.inside import shown
from .peft_patterns import PEFT_FORM, Clock, is_expression

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
LONGEST_NAME = 500  # characters of a tensor's name
PREFIX = "base_model.model."  # peft's own wrapping around the trained model's names

# Options that, when set, make of the LoRA something else than `up @ down` on the weights of the stock model.
REFUSED = (
    "use_dora", "fan_in_fan_out", "modules_to_save", "layer_replication", "lora_bias", "trainable_token_indices",
    "target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
# Options that are read here, or that matter in training alone.
HEEDED = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora", "velora_config",
)  # fmt: skip
# How up and down may have begun while the weights of the model stayed the stock ones.
KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
# Tensors that belong to an option of REFUSED, whatever the config says: a part of the name, and the option.
REFUSED_TENSORS = (
    ("lora_magnitude_vector", "use_dora (DoRA)"),
    ("lora_embedding_", "LoRA of an embedding"),
    ("lora_diag", "kasa_config (KaSA)"),
    ("modules_to_save", "modules_to_save"),
)
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<kind>weight|bias)")
_MERGE = "Merge it into the model with peft and load that, or train without the option."
_AGAIN = "Download or save the LoRA again."


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is added to one weight: ``scale * up @ down``, ``up (outputs, rank, ...)``, ``down (rank, inputs, ...)``."""

    up: Tensor
    down: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this fits: ``(outputs, inputs)``, of a convolution with its kernel."""
        return (self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True, eq=False)
class PeftLora:
    """One PEFT folder. ``modules`` go by their names in the trained model, ``unexpected`` names tensors of no use."""

    path: Path
    modules: dict[str, LowRank]
    unexpected: tuple[str, ...]
    config: dict[str, Any]

    @property
    def ignored_options(self) -> list[str]:
        """Options that are set and that this reader has never heard of."""
        return sorted(key for key, value in self.config.items() if value and key not in (*HEEDED, *REFUSED))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of a model's module ``names`` that the config says are trained, and that the file has nothing for."""
        if self.config.get("layers_to_transform") is not None:
            return []  # a choice of layers, which the file itself shows well enough
        wanted, excluded = self.config.get("target_modules"), self.config.get("exclude_modules")
        clock = Clock(self.path / CONFIG_FILE)
        others = [name for name in names if name not in self.modules]
        return [name for name in others if _names(wanted, name, clock) and not _names(excluded, name, clock)]


def read(folder: Path) -> PeftLora:
    """Read a PEFT folder. Raises MedSteerError for files that are missing, damaged or not exactly reproducible."""
    config = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    pairs, unexpected = _pair(path, _read_tensors(path))
    modules, clock = {}, Clock(folder / CONFIG_FILE)
    for name, (up, down) in pairs.items():
        _check_pair(path, name, up, down)
        modules[name] = LowRank(up, down, scale_of(config, name, down.shape[0], folder / CONFIG_FILE, clock))
    return PeftLora(folder, modules, tuple(unexpected), config)


def scale_of(config: Mapping[str, Any], name: str, rank: int, path: Path, clock: Clock) -> float:
    """What ``up @ down`` of module ``name`` is multiplied with: alpha / rank, or alpha / sqrt(rank) (arXiv 2312.03732).

    Raises MedSteerError when the config gives the module another rank than its tensors have.
    """
    expected = pattern_value(config.get("rank_pattern") or {}, name, config["r"], clock)
    if rank != expected:
        raise MedSteerError(
            f"'{path}' gives module '{name}' rank {expected}, but its tensors have rank {rank}: the two files are not "
            f"of one LoRA. {_AGAIN}"
        )
    alpha = pattern_value(config.get("alpha_pattern") or {}, name, config["lora_alpha"], clock)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any, clock: Clock) -> Any:
    """peft's rule: the first pattern that is the whole name, or all of it behind some dot, gives the value."""
    return next((value for key, value in patterns.items() if clock.ending(key, name)), default)


def _names(option: str | list[str] | None, name: str, clock: Clock) -> bool:
    """Whether `target_modules` or `exclude_modules` names a module: a regular expression, or a list of endings."""
    if isinstance(option, str):
        return clock.whole(option, name)
    return any(name == ending or name.endswith(f".{ending}") for ending in option or ())


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise MedSteerError(f"'{path}' can't be read: {error}. {_AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise MedSteerError(f"'{path}' is not JSON that can be read ({error}). {_AGAIN}") from error
    if not isinstance(config, dict):
        raise MedSteerError(f"'{path}' is a JSON {type(config).__name__}; an object of options was expected. {_AGAIN}")
    _refuse(path, config)
    for option, fits, expected in _TYPES:
        value = config.get(option)
        if not fits(value):
            raise MedSteerError(f"'{path}' has {option} = {_short(value)}; {expected} was expected. {_AGAIN}")
    return config


def _refuse(path: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise MedSteerError(
            f"'{path}' has peft_type = {_short(config.get('peft_type'))}; only 'LORA' can be applied. {_MERGE}"
        )
    for option in REFUSED:
        if config.get(option):
            raise MedSteerError(
                f"'{path}' uses {option} = {_short(config[option])}, which is more than a LoRA on the stock weights "
                f"and can't be applied exactly. {_MERGE}"
            )
    if config.get("bias") not in (None, "none"):
        raise MedSteerError(
            f"'{path}' has bias = {_short(config['bias'])}: trained biases are not applied; bias 'none' was expected. "
            f"{_MERGE}"
        )
    initial = config.get("init_lora_weights")
    if initial not in (None, True, False) and str(initial).lower() not in KEEPS_BASE:
        raise MedSteerError(
            f"'{path}' has init_lora_weights = {_short(initial)}, which changes the model's own weights before "
            "training, so that the LoRA does not fit the stock model. Save it with peft's "
            "path_initial_model_for_weight_conversion, which makes it fit."
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Cloned, since the tensors otherwise lie in the file, which another program may cut short.
            return {name: file.get_tensor(name).clone() for name in file.keys()}
    except FileNotFoundError as error:
        raise MedSteerError(f"There is no file '{path}'. {_AGAIN}") from error
    except (SafetensorError, OSError) as error:
        words = shown(str(error), 200)
        raise MedSteerError(f"'{path}' is not a readable safetensors file, or cut off ({words}). {_AGAIN}") from error


def _pair(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """``(up, down)`` for each module, and the names of tensors that belong to no LoRA."""
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    unexpected, adapters = [], set()
    for key, tensor in tensors.items():
        if not key.isprintable() or len(key) > LONGEST_NAME:
            raise MedSteerError(f"'{path}' holds '{shown(key)}', which is no name of a module. {_AGAIN}")
        part = _TENSOR.fullmatch(key)
        option = next((option for name, option in REFUSED_TENSORS if name in key), "")
        if option or (part and part["kind"] == "bias"):
            option = option or "lora_bias"
            raise MedSteerError(f"'{path}' holds '{key}', which is {option} and can't be applied exactly. {_MERGE}")
        if not part:
            unexpected.append(key)
            continue
        name = part["module"].removeprefix(PREFIX)
        adapters.add(part["adapter"])
        if len(adapters) > 1 or name in sides[part["side"]]:
            raise MedSteerError(f"'{path}' holds more than one LoRA ('{key}'); a file for each was expected. {_AGAIN}")
        sides[part["side"]][name] = tensor
    half = sorted(sides["A"].keys() ^ sides["B"].keys())
    if half:
        raise MedSteerError(f"'{path}' is damaged: '{half[0]}' has only one of lora_A and lora_B. {_AGAIN}")
    if not sides["A"]:
        some = ", ".join(f"'{key}'" for key in unexpected[:3])
        raise MedSteerError(f"'{path}' holds no LoRA: no tensor's name ends in .lora_A.weight ({some} ...). {_AGAIN}")
    return {name: (sides["B"][name], down) for name, down in sides["A"].items()}, unexpected


def _check_pair(path: Path, name: str, up: Tensor, down: Tensor) -> None:
    shapes = f"lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}"
    fits = up.ndim == down.ndim and 2 <= up.ndim <= 5 and up.shape[1] == down.shape[0] and set(up.shape[2:]) <= {1}
    if not fits or 0 in up.shape or 0 in down.shape:
        raise MedSteerError(f"'{path}': module '{name}' has {shapes}; (rank, inputs), (outputs, rank) were expected.")
    for tensor in (up, down):
        if not tensor.is_floating_point():
            raise MedSteerError(
                f"'{path}': module '{name}' is of {tensor.dtype}; floating point was expected. {_AGAIN}"
            )
        if not torch.isfinite(tensor.float()).all():
            raise MedSteerError(
                f"'{path}': module '{name}' holds NaN or infinity: the training diverged, or the file is damaged. Use "
                "an earlier save of this LoRA."
            )


def _short(value: Any) -> str:
    return shown(repr(value), 60)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # also false for NaN


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_patterns(value: Any, fits: Callable[[Any], bool]) -> bool:
    if not isinstance(value, dict):
        return value is None
    return all(is_expression(PEFT_FORM.format(key)) and fits(item) for key, item in value.items())


def _is_modules(value: Any) -> bool:
    strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return value is None or strings or is_expression(value)


_TYPES = (
    ("r", _is_rank, "a whole number from 1"),
    ("lora_alpha", _is_number, "a number"),
    ("use_rslora", lambda value: value in (None, True, False), "true or false"),
    ("rank_pattern", lambda value: _is_patterns(value, _is_rank), "an object of patterns and whole numbers"),
    ("alpha_pattern", lambda value: _is_patterns(value, _is_number), "an object of patterns and numbers"),
    ("target_modules", _is_modules, "a list of names or a pattern"),
    ("exclude_modules", _is_modules, "a list of names or a pattern"),
)
