"""The readers of foreign files, each with small valid files to begin from and the way to change those.

A target reads one file and uses what it says as nodes do. It may raise MedSteerError and nothing else.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors

from benchmarks.trust import _fuzz_mutate as mutate
from medsteer_core.checkpoints import peft_lora, pixart_config, pixart_state
from medsteer_core.errors import MedSteerError
from medsteer_core.extraction.sample_report import AUROC, recorded
from medsteer_core.judges import card as judge_json
from medsteer_core.judges import timm_network as timm_judge
from medsteer_core.pictures.summary import describe
from medsteer_core.pictures.vector_maps import classes_along, gap_map, separability_map, stability_map
from medsteer_core.scale import plan, yaml_file
from medsteer_core.steering.selection import select_sites
from medsteer_core.vectors import file as vector_file
from medsteer_core.vectors import reference_files, reference_vectors
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections
from medsteer_core.vectors.recipe import recipe

NAME = "transformer_blocks.0.attn1.to_q"
PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["to_q"], "bias": "none",
        "rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {r".*\.0\..*": 3}, "use_rslora": False}  # fmt: skip
CLASSIFIER = {"labels": ["polyps", "normal cecum"], "input_size": [32, 32], "mean": [0.5, 0.4, 0.3],
              "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "crop_pct": 0.9, "activation": "softmax",
              "architecture": "resnet10t", "none_of_these": None}  # fmt: skip
SEGMENTER = {"labels": ["background", "polyp"], "background": "background", "input_size": [64, 64], "head": "unet",
             "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "interpolation": "bilinear", "activation": "sigmoid",
             "threshold": 0.5, "diffuse": [], "findings_of": {"polyps": ["polyp"], "normal cecum": []}}  # fmt: skip
CONFIG = {"_class_name": "PixArtTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 6,
          "num_layers": 1, "in_channels": 4, "sample_size": 64, "patch_size": 2, "interpolation_scale": 1.0,
          "norm_eps": 1e-6, "activation_fn": "gelu-approximate", "caption_channels": 4,
          "_name_or_path": "PixArt-alpha/x"}  # fmt: skip
SIZES = pixart_state.Sizes(pixart_state.DIFFUSERS, 12, 1, 4, 8, 4, 2, False)
Mutator = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """One reader. ``share`` of all executions are its own; ``files(folder)`` gives its function of a file's bytes."""

    share: float
    seeds: Callable[[], list[bytes]]
    mutate: Mutator
    files: Callable[[Path], Callable[[bytes], None]]


def vectors() -> list[bytes]:
    """A vector of each version: extracted, imported, combined, with readers and with several directions."""
    prompts = {"present": {"text": "polyps", "contexts": ["a", "b"]}, "absent": {"text": "normal cecum"}}
    facts = {"prompts": prompts, "seed": 3, "samples": 4, "noise": "paired", "model": {"weights": "ab"},
             "separability": {"auroc": {"blocks.0.x": [0.9, 1.0], "blocks.1.x": [0.5, 0.6]}}}  # fmt: skip
    imported = {"estimator": "imported", "source": {"format": "x", "file": "v.npz"}, "seeds": [1], "unknown": ["gaps"]}
    overlap = {"parts": [0, 1], "mean": 0.1, "max": 0.2, "site": "blocks.0.x", "sigma": 1.0, "reported": True}
    parts = [{"hash": "ab", "provenance": facts}, {"hash": "cd", "provenance": imported}]
    combined = {"estimator": "combined", "combined": {"expression": "a + b", "parts": parts, "overlap": [overlap]}}
    affine = {**facts, "explained": 0.5, "explained_by_site": {"blocks.0.x": [0.5, None]}, "token_pairs": 9}
    made = [(facts, 1, False), (imported, 1, False), (combined, 2, False), (affine, 2, True)]
    return [_file_of(_vector(rank, readers, provenance)) for provenance, rank, readers in made]


def _vector(rank: int, readers: bool, provenance: Mapping[str, Any]) -> PathologyVector:
    def site() -> SiteDirections:
        directions = torch.linalg.qr(torch.randn(2, 4, rank)).Q.transpose(1, 2).contiguous()
        more = (torch.ones(2, rank, 4), torch.zeros(2, rank)) if readers else ()
        return SiteDirections(
            directions, torch.ones(2, rank), torch.zeros(2, 4), torch.zeros(2, 2, rank), torch.ones(2, 2), *more
        )

    return PathologyVector({f"blocks.{n}.x": site() for n in range(2)}, torch.tensor([4.0, 1.0]), provenance)


def _file_of(vector: PathologyVector) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return vector_file.save(vector, Path(folder) / "v.safetensors").read_bytes()


def vector_bytes(data: bytes, chance: random.Random) -> bytes:
    """A changed vector file, mostly with the right hash of its content: without it nothing else would be looked at."""
    changed = mutate.safetensors_file(data, chance)
    if chance.random() < 0.2:
        return changed
    try:
        length = int.from_bytes(changed[:8], "little")
        header = json.loads(changed[8 : 8 + length])
        about = header["__metadata__"]
        facts = json.loads(about["provenance"])
        tensors = {name: _tensor(entry, changed[8 + length :]) for name, entry in header.items() if name[:2] != "__"}
        sites = json.loads(about["sites"])
        fields = vector_file.FIELDS[about["version"]]
        made = {site: SiteDirections(**{name: tensors[f"{site}/{name}"] for name in fields}) for site in sites}
        vector = object.__new__(PathologyVector)
        for name, value in (("sites", made), ("sigmas", tensors["sigmas"]), ("provenance", facts)):
            object.__setattr__(vector, name, value)
        object.__setattr__(vector, "flow", bool(json.loads(about["flow"])))
        about["content_hash"] = vector.content_hash()
    except Exception:  # whatever is wrong with it; the reader under test says so
        return changed
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + changed[8 + length :]


def _tensor(entry: Mapping[str, Any], numbers: bytes) -> torch.Tensor:
    first, last = entry["data_offsets"]
    return torch.frombuffer(bytearray(numbers[first:last]), dtype=torch.float32).reshape(entry["shape"])


def _read_vector(folder: Path) -> Callable[[bytes], None]:
    write, path = _scratch(folder / "vector.safetensors")

    def read(data: bytes) -> None:
        write(data)
        vector = vector_file.load(path)
        for look in (describe, recipe, gap_map, separability_map, stability_map, classes_along):
            look(vector)
        vector.at(vector.site_names[0], 2.0)
        with suppress(MedSteerError):
            select_sites("auto", vector.site_names, recorded(vector, AUROC))

    return read


def _pickles() -> list[bytes]:
    rows = np.eye(4, dtype=np.float32)
    steps = {step: {"blocks": [rows[0], rows[1]]} for step in range(2)}
    return [pickle.dumps(steps, protocol=protocol) for protocol in range(2, 6)] + [pickle.dumps([1, "a", (2.5,), None])]


def _archives() -> list[bytes]:
    made = []
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save(
            stream, format=np.array(reference_files.NPZ_FORMAT), values=np.ones((2, 2, 4), np.float32),
            layer_ids=np.arange(2), positive_prompts=["polyps"], negative_prompts=["cecum"], seeds=[3],
        )  # fmt: skip
        made.append(stream.getvalue())
    return made


def _read_reference(read: Callable[[bytes, str], reference_files.ReferenceField]) -> Callable[[Path], Callable]:
    sites = {f"blocks.{n}.cross_attn.proj": 4 for n in range(2)}

    def one(data: bytes) -> None:
        field = read(data, "v")
        describe(reference_vectors.to_vector(field, sites, torch.tensor([4.0, 1.0]), "normal"))

    return lambda _folder: one


def _lora_weights() -> list[bytes]:
    form = "base_model.model.{}.lora_{}.weight"
    return [to_safetensors({form.format(NAME, "A"): torch.ones(2, 8), form.format(NAME, "B"): torch.ones(6, 2)})]


def _read_lora(fuzzed: str, other: str, content: bytes) -> Callable[[Path], Callable[[bytes], None]]:
    def files(folder: Path) -> Callable[[bytes], None]:
        (folder / other).write_bytes(content)
        write, _ = _scratch(folder / fuzzed)

        def read(data: bytes) -> None:
            write(data)
            lora = peft_lora.read(folder)
            lora.missing([NAME, "transformer_blocks.0.attn1.to_k", "proj_out"]), lora.ignored_options

        return read

    return files


def _read_judge(folder: Path) -> Callable[[bytes], None]:
    write, path = _scratch(folder / "judge.json")

    def read(data: bytes) -> None:
        write(data)
        try:
            judge_json.read_classifier(path)
        except MedSteerError:
            judge_json.read_segmenter(path, ("polyps", "normal cecum"))

    return read


def _read_plan(folder: Path) -> Callable[[bytes], None]:
    workflow = '{"1": {"class_type": "KSampler", "inputs": {"seed": 1}}}'
    (folder / "workflow.json").write_text(workflow, encoding="utf-8")

    def read(data: bytes) -> None:
        source = yaml_file.parse(data, "plan.yaml")
        if isinstance(source.values, dict) and "workflow" in source.values:
            source.values["workflow"] = "workflow.json"  # a plan's workflow is wherever its user says
        plan.plan_of(source, folder)

    return read


def _plans() -> list[bytes]:
    text = "workflow: w.json\noutput: pairs\nseeds: 1..20\nstrengths: [0.5, 1]\nset: {KSampler.steps: [4]}\n"
    whole = {"workflow": "w.json", "output": "s3://bucket/pairs", "seeds": [1, "5..9"], "chunk": 4,
             "prompts": ["a {concept}"], "limits": {"retries": 1, "timeout": 60},
             "pairs": [{"present": "polyps", "absent": "normal cecum", "set": {"KSampler.cfg": 4.0}}],
             "splits": {"validation": 0.1, "test": 0.2}}  # fmt: skip
    return [text.encode(), json.dumps(whole).encode()]


def _read_config(_folder: Path) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        config = pixart_config.parse_config(data.decode("utf-8", "replace"), "config.json")
        pixart_config.check_config(config, SIZES, "config.json", "x.safetensors")
        pixart_config.heads_of(SIZES, config, "x.safetensors")
        pixart_config.extent_of_config(config, SIZES)
        pixart_config.family_of(SIZES, config, "x.safetensors")

    return read


def _pixarts() -> list[bytes]:
    made = []
    for form in (pixart_state.DIFFUSERS, pixart_state.ORIGINAL):
        sizes = pixart_state.Sizes(form, 12, 1, 4, 8, 4, 2, False)
        state = {source: torch.ones(weight.source_shape) for weight in pixart_state.layout(sizes)
                 for source in weight.sources}  # fmt: skip
        state[pixart_state.POSITIONS[form]] = pixart_config.sine_grid(2, 1.0, 12)[None].float()
        made.append(to_safetensors(state))
    return made


def _read_weights(_folder: Path) -> Callable[[bytes], None]:
    """PixArt's weights, as Load DiT looks at them; and any judge's."""

    def read(data: bytes) -> None:
        state = timm_judge.tensors_of(data, "x.safetensors")
        found = pixart_state.find_pixart(state)
        if found is None:
            timm_judge.load_strictly(torch.nn.Linear(2, 2), state, "x.safetensors", "a line")
            return
        pixart_state.is_quantised(state, found[1], None)
        state = pixart_state.only_pixart(state, *found)
        sizes = pixart_state.sizes_of(state, found[0], "x.safetensors")
        pixart_config.heads_of(sizes, {"num_attention_heads": 2}, "x.safetensors")
        stored = state.get(pixart_state.POSITIONS[sizes.format])
        if stored is not None:
            pixart_config.extent_of_positions(stored, sizes.width, "x.safetensors")
        pixart_config.family_of(sizes, None, "x.safetensors")
        pixart_state.to_original(state, sizes, "x.safetensors")

    return read


def _scratch(path: Path) -> tuple[Callable[[bytes], None], Path]:
    """A way to fill one file without opening it anew, so that whatever opens a file for writing is the reader."""
    file = open(path, "wb", buffering=0)  # noqa: SIM115  (as long as the process lives)

    def write(data: bytes) -> None:
        file.seek(0)
        file.truncate()
        file.write(data)

    return write, path


def _json(*values: Any) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(value).encode() for value in values]


def _plain_weights() -> list[bytes]:
    return [to_safetensors({"weight": torch.ones(2, 2), "bias": torch.ones(2)}), struct.pack("<Q", 2) + b"{}"]


TARGETS: dict[str, Target] = {
    "vector .safetensors": Target(0.05, vectors, vector_bytes, _read_vector),
    "vector .pickle": Target(
        0.2, _pickles, mutate.pickle_file, _read_reference(reference_files.read_pickle)
    ),
    "vector .npz": Target(0.08, _archives, mutate.npz_file, _read_reference(reference_files.read_npz)),
    "LoRA config": Target(
        0.04, _json(PEFT, {**PEFT, "target_modules": r".*to_[qk]"}), mutate.json_file,
        _read_lora(peft_lora.CONFIG_FILE, peft_lora.WEIGHTS_FILE, _lora_weights()[0]),
    ),
    "LoRA weights": Target(
        0.05, _lora_weights, mutate.safetensors_file,
        _read_lora(peft_lora.WEIGHTS_FILE, peft_lora.CONFIG_FILE, json.dumps(PEFT).encode()),
    ),
    "judge .json": Target(0.04, _json(CLASSIFIER, SEGMENTER), mutate.json_file, _read_judge),
    "model config.json": Target(0.25, _json(CONFIG), mutate.json_file, _read_config),
    "plan .yaml": Target(0.01, _plans, mutate.json_file, _read_plan),
    "model weights": Target(
        0.28, lambda: _pixarts() + _plain_weights(), mutate.safetensors_file, _read_weights
    ),
}  # fmt: skip
