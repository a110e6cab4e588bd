"""Step 2: train the PixArt and its text encoder on latents. v-prediction, Muon and AdamW, EMA, checkpoints, resume."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .. import diffusion, text
from ..phantom import CLASSES
from ..pixart_twin import PixArtConfig, PixArtTwin
from .files import load, save_atomic, shards

# The smallest finding is the hardest to learn: its class is shown this many times as often.
REPEATS = {"polyps": 2}
TEMPLATES = ("An endoscopic image of {}", "{}", "endoscopic image of {}", "{} image", "image, {}")


class Generator(nn.Module):
    """The text encoder and the PixArt as one trainable module."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.text = text.TextEncoder(config.caption_channels)
        self.model = PixArtTwin(config)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(x, t, self.text(ids, mask), mask)


def prompt_tokens(label: int, chooser: random.Random, drop: float = 0.1) -> list[int]:
    """Tokens of a prompt for a class: a random template in a random word order; empty with probability ``drop``."""
    if chooser.random() < drop:
        return text.tokenize("")
    start, *words = text.tokenize(chooser.choice(TEMPLATES).format(CLASSES[label]))
    if chooser.random() < 0.5:
        chooser.shuffle(words)
    return [start, *words]


def batches(folder: Path, size: int, seed: int, after: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches of (latents, labels); shards that appear meanwhile join at the next pass."""
    passes = after
    while True:
        files = shards(folder)
        if not files:
            raise FileNotFoundError(f"no latents in {folder}: run the `data` step first")
        parts = [load(path) for path in files]
        latents, labels = torch.cat([p["latents"] for p in parts]), torch.cat([p["labels"] for p in parts])
        times = torch.tensor([REPEATS.get(name, 1) for name in CLASSES])[labels.long()]
        rows_of_pass = torch.arange(len(labels)).repeat_interleave(times)
        order = rows_of_pass[torch.randperm(len(rows_of_pass), generator=torch.Generator().manual_seed(seed + passes))]
        for rows in order[: len(order) // size * size].view(-1, size):
            yield latents[rows].float(), labels[rows].long()
        passes += 1


def confounding_of(folder: Path) -> float:
    """How far the anatomy of a run's phantoms leans with their class."""
    return next((load(path).get("confounding", 0.0) for path in shards(folder)), 0.0)


def optimizers(model: Generator, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if "blocks." in n and n.endswith("weight") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then cosine decay to 2% of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


@torch.no_grad()
def average_in(averages: list[Tensor], current: list[Tensor], count: int | Tensor) -> None:
    """Exponential moving average of 0.999 that starts faster, so that the random start is soon forgotten."""
    torch._foreach_lerp_(averages, current, 1 - min(0.999, (1 + int(count)) / (10 + int(count))))


def run(folder: Path, steps: int, batch: int, rate: float, seed: int, device: str, config: PixArtConfig) -> None:
    """Train to ``steps``, saving a checkpoint every 500; a rerun resumes from the last one."""
    torch.manual_seed(seed)
    model = Generator(config).to(device).eval()
    ema = AveragedModel(model, multi_avg_fn=average_in)
    optims = optimizers(model, rate)
    path, first, phases = folder / "generator.pt", 0, []
    if path.exists():
        state = load(path)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optim, saved in zip(optims, state["optimizers"], strict=True):
            optim.load_state_dict(saved)
        first, phases = state["step"], state.get("phases", [])
    phases = [*phases, {"from_step": first, "confounding": confounding_of(folder)}]
    draw = torch.Generator().manual_seed(seed + first)
    chooser = random.Random(seed + first)
    print(
        f"generator: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, from step {first}", flush=True
    )
    started, mean_loss = time.time(), 0.0
    feed = batches(folder, batch, seed, first)
    compiled = torch.compile(model, dynamic=False) if device == "cuda" else model
    for step in range(first, steps):
        latents, labels = next(feed)
        ids, mask = text.pad([prompt_tokens(int(label), chooser) for label in labels])
        t = diffusion.sample_timesteps(batch, draw)
        x, target = diffusion.noised_and_target(latents, torch.randn(latents.shape, generator=draw), t)
        with torch.autocast(device, dtype=torch.bfloat16):
            v = compiled(x.to(device), t.to(device), ids.to(device), mask.to(device))
        loss = (v.float() - target.to(device)).square().mean()
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = learning_rate(step, steps, rate)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        ema.update_parameters(model)
        mean_loss += (loss.item() - mean_loss) / min(step - first + 1, 100)
        if (step + 1) % 100 == 0:
            pace = (time.time() - started) / (step + 1 - first)
            print(f"step {step + 1}/{steps} loss {mean_loss:.4f} {pace:.3f} s/step", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            states = [optim.state_dict() for optim in optims]
            saved = {"step": step + 1, "model": model.state_dict(), "ema": ema.state_dict(), "optimizers": states}
            save_atomic({**saved, "config": config.to_dict(), "phases": phases}, path)


def load_trained(folder: Path) -> tuple[Generator, dict[str, Any]]:
    """The averaged weights of a run's last checkpoint, and how far it was trained: ``steps`` and ``phases`` of data."""
    state = load(folder / "generator.pt")
    model = Generator(PixArtConfig(**state["config"]))
    weights = {k.removeprefix("module."): v for k, v in state["ema"].items() if k.startswith("module.")}
    model.load_state_dict(weights)
    return model.eval(), {"steps": state["step"], "phases": state.get("phases", [])}


@torch.no_grad()
def sample(model: Generator, prompts: list[str], noise: Tensor, cfg: float = 4.0, steps: int = 20) -> Tensor:
    """Latents for one prompt each from ``noise (batch, C, H, W)`` with classifier-free guidance (DDIM)."""
    ids, mask = text.pad([text.tokenize(p) for p in prompts] + [text.tokenize("")] * len(prompts))
    context = model.text(ids, mask)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        conditional, empty = model.model(x.repeat(2, 1, 1, 1), t.repeat(2), context, mask).chunk(2)
        return empty + cfg * (conditional - empty)

    return diffusion.ddim(guided, noise, steps)
