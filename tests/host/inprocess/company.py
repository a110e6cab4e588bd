"""What a steered model meets in people's graphs: a tiny model of some family beside each, through ComfyUI's own nodes.

Families and companies are covered in pairs: each company stands beside one family, and every family has company.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.samplers
import comfy.sd
import comfy.supported_models as supported
import families
import folder_paths
import pytest
import tiny
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_hooks import SetModelHooksOnCond
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from medsteer_pack.medsteer_core.checkpoints import peft_lora
from medsteer_pack.medsteer_core.host.loading import lora
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from safetensors.torch import save_file
from torch import Tensor, nn

import nodes as core

CPU = torch.device("cpu")


class _PixArt(families.Small):
    """`tiny.model` among the other families' models."""

    def model(self) -> ModelPatcher:
        return tiny.model()


PIXART = _PixArt(
    "PixArt (alpha, Sigma)", tiny.stock_model, families.numbered("blocks.{}.cross_attn.proj", 3), (1, 4, 4, 6), (6,) * 3
)


@dataclass(frozen=True, eq=False)
class Scene:
    """A model with its company, not steered, and what it is sampled with.

    ``texts`` are the conditionings by name; a guider's lists may hold several entries, each with a text of its own.
    ``seen`` says which conditionings the model is given at all.
    """

    small: families.Small
    model: ModelPatcher
    texts: dict[str, list]
    cfg: float = 3.0
    steps: int = 2
    seen: tuple[str, ...] = ("positive", "negative")
    guide: Callable[[ModelPatcher, Scene], comfy.samplers.CFGGuider] = field(default=lambda m, s: _cfg_guider(m, s))

    def run(self, model: ModelPatcher, images: Sequence[int] = (0,)) -> Tensor:
        """What SamplerCustomAdvanced gives for these images of a batch."""
        empty = self.small.empty(len(images))["samples"]
        schedule = sampling.schedule(model, self.steps, "euler", "normal")
        noise = sampling.noise_for(empty, 7, images)
        return self.guide(model, self).sample(
            noise, empty, schedule.sampler, schedule.sigmas, disable_pbar=True, seed=7
        )

    @contextmanager
    def spying(self) -> Iterator[list[tiny.Row]]:
        """`families.spying`, with the rows of a list's second entry under the list's name."""
        entries = {
            f"{name}-{index}": [entry] for name, entries in self.texts.items() for index, entry in enumerate(entries)
        }
        rows: list[tiny.Row] = []
        with families.spying(self.small, self.model, **entries) as found:
            yield rows
        rows += [replace(row, name=row.name.partition("-")[0]) for row in found]


def _cfg_guider(model: ModelPatcher, scene: Scene) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(scene.texts["positive"], scene.texts["negative"])
    guider.set_cfg(scene.cfg)
    return guider


def _dual_guider(model: ModelPatcher, scene: Scene) -> Guider_DualCFG:
    guider = Guider_DualCFG(model)
    guider.set_conds(**scene.texts)
    guider.set_cfg(scene.cfg, 2.0)
    return guider


# ComfyUI's rotary embeddings refuse float64, and so do the families that have them.
DOUBLE = ("PixArt (alpha, Sigma)", "HunyuanDiT", "Stable Diffusion 1.x, 2.x and XL")


def start(small: families.Small | str, double: bool, **changes) -> Scene:
    """A family's model, in float64 if ``double`` and the family can, and two texts."""
    small = families.ALL[small] if isinstance(small, str) else small
    model = small.model()
    if double and small.family in DOUBLE:
        model.model.diffusion_model.double().dtype = torch.float64
    return Scene(small, model, {"positive": small.cond(1), "negative": small.cond(2)}, **changes)


def larger(name: str, height: int = 8, width: int = 8) -> families.Small:
    """The family with latents of this size."""
    small = families.ALL[name]
    return replace(small, latent=(*small.latent[:-2], height, width))


def adapter(model: ModelPatcher, names: str = "attn", rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """Random LoRA factors (up, down) by module name, for every linear layer whose name has ``names`` in it."""
    weights = model.model.diffusion_model.state_dict()
    layers = [key for key, weight in weights.items() if key.endswith(".weight") and weight.ndim == 2 and names in key]
    return {
        key.removesuffix(".weight"): (
            families.random(300 + place, weights[key].shape[0], rank) * 0.3,
            families.random(500 + place, rank, weights[key].shape[1]) * weights[key].shape[1] ** -0.5,
        )
        for place, key in enumerate(layers)
    }


def lora_file(model: ModelPatcher) -> dict[str, Tensor]:
    """The same as a LoRA file's tensors, the steered projections among its layers."""
    tensors = {}
    for name, (up, down) in adapter(model).items():
        tensors[f"diffusion_model.{name}.lora_up.weight"] = up
        tensors[f"diffusion_model.{name}.lora_down.weight"] = down
    assert tensors
    return tensors


# Companies


def core_lora(double: bool) -> Scene:
    scene = start("ltxv", double)
    return replace(scene, model=_with_lora(scene.model))


PEFT_LAYERS = ("attn1.to_q", "attn2.to_q", "attn2.to_out.0")


def load_peft_lora(double: bool) -> Scene:
    scene = start(PIXART, double)
    tensors = {
        f"base_model.model.transformer_blocks.{block}.{layer}.lora_{side}.weight": families.random(
            10 * block + place, *((2, tiny.WIDTH) if side == "A" else (tiny.WIDTH, 2))
        ) * 0.2
        for block in range(tiny.DEPTH) for place, layer in enumerate(PEFT_LAYERS) for side in "AB"
    }  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": list(PEFT_LAYERS)}
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patched:
        patched.setitem(folder_paths.folder_names_and_paths, "loras", ([root], {".safetensors"}))
        patched.delitem(folder_paths.filename_list_cache, "loras", raising=False)
        folder = Path(root) / "polyps"
        folder.mkdir()
        save_file(tensors, folder / peft_lora.WEIGHTS_FILE)
        (folder / peft_lora.CONFIG_FILE).write_text(json.dumps(config))
        return replace(scene, model=lora.apply_lora(scene.model, None, "polyps", 1.0, 1.0)[0])


def control_net() -> comfy.controlnet.ControlNet:
    """A tiny random ControlNet for the tiny SD1.5."""
    network = comfy.cldm.cldm.ControlNet(
        image_size=32, in_channels=4, model_channels=32, hint_channels=3, num_res_blocks=[1, 1], channel_mult=(1, 2),
        use_spatial_transformer=True, transformer_depth=[0, 1], transformer_depth_middle=1, context_dim=families.TEXT,
        num_heads=8, legacy=False, dtype=torch.float32,
    ).eval()  # fmt: skip
    families.fill(network)
    return comfy.controlnet.ControlNet(network, load_device=CPU)


def with_control(scene: Scene, hints: int = 1) -> Scene:
    images = families.random(70, hints, 32, 48, 3).sigmoid()
    apply = core.ControlNetApplyAdvanced().apply_controlnet
    positive, negative = apply(scene.texts["positive"], scene.texts["negative"], control_net(), images, 0.5, 0.0, 1.0)
    return replace(scene, texts={"positive": positive, "negative": negative})


def controlnet(double: bool) -> Scene:
    return with_control(start("sd15", double))


def areas(double: bool) -> Scene:
    """Two areas that overlap; ComfyUI copies them to the negative, identity and all."""
    scene, place = start("sdxl", double), core.ConditioningSetArea().append
    top = place(scene.texts["positive"], 48, 16, 0, 0, 1.0)[0]
    bottom = place(scene.small.cond(3), 32, 24, 16, 8, 1.0)[0]
    return replace(scene, texts={**scene.texts, "positive": top + bottom})


def masks(double: bool) -> Scene:
    scene, place = start("hunyuan_dit", double), core.ConditioningSetMask().append
    mask = torch.zeros(1, 4, 6)
    mask[..., :4] = 1
    left = place(scene.texts["positive"], mask, "default", 1.0)[0]
    right = place(scene.small.cond(3), mask.flip(-1), "mask bounds", 0.7)[0]
    return replace(scene, texts={**scene.texts, "positive": left + right})


def timesteps(double: bool) -> Scene:
    """Another positive text from the middle on."""
    scene, during = start("wan_t2v", double, steps=3), core.ConditioningSetTimestepRange().set_range
    early, late = during(scene.texts["positive"], 0.0, 0.4)[0], during(scene.small.cond(3), 0.4, 1.0)[0]
    return replace(scene, texts={**scene.texts, "positive": early + late})


def dual_cfg(double: bool) -> Scene:
    scene = start("kandinsky5", double, guide=_dual_guider, seen=("positive", "middle", "negative"))
    return replace(scene, texts={**scene.texts, "middle": scene.small.cond(3)})


def cfg_one(double: bool) -> Scene:
    return start("hunyuan_dit", double, cfg=1.0, seen=("positive",))


def perturbed_attention(double: bool) -> Scene:
    scene = start("sd15", double)
    return replace(scene, model=PerturbedAttentionGuidance.execute(scene.model, 2.0).result[0])


def self_attention(double: bool) -> Scene:
    scene = start(larger("sdxl"), double)  # it leaves latents of 4 and less alone
    return replace(scene, model=SelfAttentionGuidance.execute(scene.model, 0.7, 2.0).result[0])


# So high that both skip all they can. Lower, what is skipped depends on the mean over the batch, steered or not.
THRESHOLD = 1000.0


def add_easycache(model: ModelPatcher) -> ModelPatcher:
    return EasyCacheNode.execute(model, THRESHOLD, 0.0, 1.0, False).result[0]


def add_lazycache(model: ModelPatcher) -> ModelPatcher:
    return LazyCacheNode.execute(model, THRESHOLD, 0.0, 1.0, False).result[0]


def easycache(double: bool) -> Scene:
    scene = start("wan_t2v", double, steps=6)
    return replace(scene, model=add_easycache(scene.model))


def lazycache(double: bool) -> Scene:
    scene = start(PIXART, double, steps=6)
    return replace(scene, model=add_lazycache(scene.model))


def mahiro(double: bool) -> Scene:
    """Guidance that averages over all images of the batch."""
    scene = start(PIXART, double)
    return replace(scene, model=Mahiro.execute(scene.model).result[0])


def shift(double: bool) -> Scene:
    scene = start("wan_i2v", double)
    return replace(scene, model=ModelSamplingSD3().patch(scene.model, 5.0)[0])


def zero_snr(double: bool) -> Scene:
    scene = start("sd21", double)
    return replace(scene, model=ModelSamplingDiscrete().patch(scene.model, "v_prediction", True)[0])


def compiled(double: bool) -> Scene:
    """TorchCompileModel's own call, with the backend that traces as the others do and compiles no machine code."""
    scene = start(PIXART, double)
    model = scene.model.clone()
    set_torch_compile_wrapper(model=model, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    return replace(scene, model=model)


def fp8(double: bool) -> Scene:
    """Weights of eight bits, computed with in float32."""

    def build() -> nn.Module:
        config = supported.Kandinsky5(
            {**supported.Kandinsky5.unet_config, "visual_embed_dim": 132, **families.KANDINSKY}
        )
        config.set_inference_dtype(torch.float8_e4m3fn, torch.float32)
        return config.get_model({}, "")

    return start(replace(families.ALL["kandinsky5"], build=build), double)


def low_vram(double: bool) -> Scene:
    """No weight is on the device before its layer runs, and a LoRA is added to each as it comes."""
    scene = start("anima", double)
    return offloaded(replace(scene, model=_with_lora(scene.model)))


def _with_lora(model: ModelPatcher) -> ModelPatcher:
    return comfy.sd.load_lora_for_models(model, None, lora_file(model), 1.0, 0.0)[0]


def offloaded(scene: Scene) -> Scene:
    """The scene with its weights off the device until their layer runs."""
    model = scene.model.clone()

    def offload(patcher: ModelPatcher) -> None:
        patcher.unpatch_model(CPU)
        patcher.patch_model(CPU, lowvram_model_memory=1)

    model.add_callback(CallbacksMP.ON_PRE_RUN, offload)
    return replace(scene, model=model)


def hooks(double: bool) -> Scene:
    """A LoRA on the positive alone, so that each conditioning has calls of its own."""
    scene = start("cosmos", double)
    group = comfy.hooks.create_hook_lora(lora_file(scene.model), 1.0, 0.0)
    positive = SetModelHooksOnCond().attach_hook(scene.texts["positive"], group)[0]
    return replace(scene, texts={**scene.texts, "positive": positive})


ALL: dict[str, Callable[[bool], Scene]] = {
    "LoRA": core_lora, "PEFT LoRA": load_peft_lora, "ControlNet": controlnet, "areas": areas, "masks": masks,
    "timestep ranges": timesteps, "DualCFG": dual_cfg, "cfg 1": cfg_one, "PAG": perturbed_attention,
    "SAG": self_attention, "EasyCache": easycache, "LazyCache": lazycache, "Mahiro": mahiro, "shift": shift,
    "zero SNR": zero_snr, "torch.compile": compiled, "fp8": fp8, "low VRAM": low_vram, "hooks": hooks,
}  # fmt: skip
UNPAIRED = ("DualCFG",)  # Counterfactual Sampler has a guider of its own
CACHES = ("EasyCache", "LazyCache")  # what they skip depends on what they have seen, so half a run is another run
