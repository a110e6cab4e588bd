"""Fitting a judge's classifier: AdamW on a cosine, balanced classes, the best epoch kept, resumed after a stop."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, WeightedRandomSampler

from ..errors import MedSteerError
from .data import Pictures


@dataclass(frozen=True)
class Recipe:
    """How a classifier is fitted. ``rate`` is AdamW's peak learning rate, reached after ``warmup`` of all steps;
    ``patience`` is how many epochs without a better validation are borne."""

    epochs: int = 30
    batch: int = 32
    rate: float = 5e-5
    weight_decay: float = 0.05
    warmup: float = 0.05
    smoothing: float = 0.1
    patience: int = 8
    seed: int = 0
    workers: int = 4
    device: str = "cpu"


@dataclass(frozen=True)
class Fitted:
    """The weights of the ``best`` epoch, and what every epoch was like."""

    state: dict[str, Tensor]
    best: int
    history: list[dict[str, float]]


def fit(
    network: nn.Module,
    train: Pictures,
    validation: Pictures,
    recipe: Recipe,
    checkpoint: Path,
    told: dict[str, Any],
    say: Callable[[str], None] = print,
) -> Fitted:
    """Train ``network`` and return its best epoch's weights, by the mean recall of the classes on ``validation``.

    After every epoch all is kept in ``checkpoint``; a run that was stopped goes on from there. ``told`` are settings
    that must be the checkpoint's too. The global random state stays as it is.
    """
    network.to(recipe.device)
    optimizer = torch.optim.AdamW(_decayed(network, recipe.weight_decay), lr=recipe.rate)
    kind, scaler = _precision(recipe.device)
    first, best, history = _resumed(checkpoint, told, network, optimizer, scaler)
    if first:
        say(f"resumed after epoch {first} of {recipe.epochs}")
    batches = max(1, len(train) // recipe.batch)
    for epoch in range(first, recipe.epochs):
        if best["epoch"] and epoch - best["epoch"] >= recipe.patience:
            say(f"no better validation for {recipe.patience} epochs: stopped")
            break
        begun = time.perf_counter()
        with _seeded(recipe.seed * 100_003 + epoch, recipe.device):
            loss = _epoch(network, train, recipe, epoch, batches, optimizer, scaler, kind)
        if not math.isfinite(loss):
            raise MedSteerError(f"The loss became {loss} in epoch {epoch + 1}. Use a lower --rate (now {recipe.rate}).")
        recall, missed = validated(network, validation, recipe)
        history.append({"epoch": epoch + 1, "loss": loss, "validation_loss": missed, "validation_recall": recall})
        if (recall, -missed) > (best["recall"], -best["loss"]):
            state = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
            best = {"epoch": epoch + 1, "recall": recall, "loss": missed, "state": state}
        kept = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        _save(checkpoint, {"epoch": epoch + 1, "told": told, "best": best, "history": history, **kept})
        seconds = time.perf_counter() - begun
        numbers = f"loss {loss:.3f}, mean recall in validation {recall:.3f}"
        say(f"epoch {epoch + 1}/{recipe.epochs}: {numbers}, {seconds:.1f} s")
    return Fitted(best["state"], best["epoch"], history)


def loader(pictures: Pictures, recipe: Recipe, **options: Any) -> DataLoader:
    """Batches of pictures, read by the recipe's workers."""
    pinned = recipe.device != "cpu"
    return DataLoader(pictures, recipe.batch, num_workers=recipe.workers, pin_memory=pinned, **options)


@torch.no_grad()
def validated(network: nn.Module, pictures: Pictures, recipe: Recipe) -> tuple[float, float]:
    """Mean recall of the classes and mean loss."""
    from torchmetrics.functional.classification import multiclass_recall

    network.eval()
    logits, classes = [], []
    # a generator of its own: a loader draws a seed for its workers
    for images, truth in loader(pictures, recipe, generator=torch.Generator()):
        logits.append(network(images.to(recipe.device)).float().cpu())
        classes.append(truth)
    scores, truth = torch.cat(logits), torch.cat(classes)
    recall = multiclass_recall(scores, truth, num_classes=scores.shape[1], average="macro")
    return recall.item(), F.cross_entropy(scores, truth).item()


def _epoch(
    network: nn.Module,
    train: Pictures,
    recipe: Recipe,
    epoch: int,
    batches: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    kind: torch.dtype | None,
) -> float:
    """One pass over as many images as there are, every class as often as any other; the mean loss."""
    network.train()
    counts = torch.bincount(torch.tensor(train.classes)).float()
    sampler = WeightedRandomSampler((1 / counts)[train.classes].tolist(), len(train))
    losses, device = [], torch.device(recipe.device).type
    whole = len(train) >= recipe.batch  # a last batch of one image would upset batch norms
    for number, (images, truth) in enumerate(loader(train, recipe, sampler=sampler, drop_last=whole)):
        done = (epoch * batches + number) / (recipe.epochs * batches)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * _cosine(done, recipe.warmup)
        images, truth = images.to(recipe.device, non_blocking=True), truth.to(recipe.device, non_blocking=True)
        with torch.autocast(device, dtype=kind, enabled=kind is not None):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), truth, label_smoothing=recipe.smoothing)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


def _cosine(done: float, warmup: float) -> float:
    """The learning rate at a share of all steps, 1 at its peak (Loshchilov and Hutter, 2017)."""
    if done < warmup:
        return max(done / warmup, 0.02)
    return max(0.01, 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))))


def _decayed(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases and norms do not."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _precision(device: str) -> tuple[torch.dtype | None, torch.amp.GradScaler]:
    """The kind of number that a GPU multiplies, with a scaler of gradients that float16 needs; None on the CPU."""
    if torch.device(device).type != "cuda":
        return None, torch.amp.GradScaler("cpu", enabled=False)
    kind = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return kind, torch.amp.GradScaler("cuda", enabled=kind is torch.float16)


@contextlib.contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """The random state of an epoch, so that a run that was stopped goes on as it would have."""
    chosen = torch.device(device)
    with torch.random.fork_rng(devices=[chosen] if chosen.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _resumed(
    checkpoint: Path, told: dict[str, Any], network: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any
) -> tuple[int, dict[str, Any], list[dict[str, float]]]:
    """The epochs done, the best of them and all, with the network as it was; a fresh start without a checkpoint."""
    if not checkpoint.exists():
        return 0, {"epoch": 0, "recall": -1.0, "loss": math.inf, "state": {}}, []
    advice = f"Go on with the settings it was begun with, choose another --output, or delete '{checkpoint}'."
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        other = sorted(name for name in told if state["told"].get(name) != told[name])
        if other:
            raise MedSteerError(f"'{checkpoint}' is of a run with another {', '.join(other)}. {advice}")
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        return state["epoch"], state["best"], state["history"]
    except MedSteerError:
        raise
    except Exception as error:  # a damaged file can fail in many ways
        words = " ".join(str(error).split())
        raise MedSteerError(f"'{checkpoint}' cannot be read ({words:.120}). {advice}") from error


def _save(path: Path, value: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(value, part)
    os.replace(part, path)
