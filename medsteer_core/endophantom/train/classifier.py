"""Step 4, first part: train classifier and segmenter on distorted renders, and the classifier on images that are no
endoscopy. Never on generated images."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..judges import LABELS, NONE, Classifier, Segmenter, resize
from .augment import distort, nonsense
from .data import render_batch
from .files import load, save_atomic

POOL_SEED = 8_000_000


def pool(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """``n`` renders at the judges' size: images uint8, masks uint8, class ids."""
    images, masks, labels = [], [], []
    for i in range(0, n, 64):
        image, mask, label = render_batch(64, seed + i)
        images.append((resize(image) * 255).round().byte())
        masks.append((F.adaptive_avg_pool2d(mask, images[-1].shape[-2:]) > 0.5).byte())
        labels.append(label)
    return torch.cat(images), torch.cat(masks), torch.cat(labels)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """One minus the soft Dice overlap, over the batch for each finding."""
    p = logits.sigmoid()
    overlap = 2 * (p * masks).sum((0, 2, 3)) + 1
    return (1 - overlap / ((p + masks).sum((0, 2, 3)) + 1)).mean()


def run(folder: Path, steps: int, batch: int = 48, renders: int = 10_240, seed: int = 5) -> None:
    """Train both judges to ``steps`` with a checkpoint every 250; a rerun resumes."""
    torch.manual_seed(seed)
    layout = torch.channels_last
    classifier, segmenter = Classifier().to(memory_format=layout), Segmenter().to(memory_format=layout)
    parameters = [*classifier.parameters(), *segmenter.parameters()]
    optim = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.02)
    path, first = folder / "judges.pt", 0
    if path.exists():
        state = load(path)
        classifier.load_state_dict(state["classifier"])
        segmenter.load_state_dict(state["segmenter"])
        optim.load_state_dict(state["optimizer"])
        first = state["step"]
    if first >= steps:
        return
    images, masks, labels = pool(renders, POOL_SEED)
    draw, started = torch.Generator().manual_seed(seed + first), time.time()
    none, marked = LABELS.index(NONE), batch // 2  # the segmenter costs more and sees half of a batch
    for step in range(first, steps):
        for group in optim.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * max(0.02, 1 - step / steps)
        rows = torch.randint(0, len(images), (batch,), generator=draw)
        image, mask, label = images[rows].float() / 255, masks[rows].float(), labels[rows]
        if step % 2:
            image, mask = image.flip(-1), mask.flip(-1)
        spoiled = nonsense(image[: batch // 6], draw)
        image = torch.cat([distort(image, draw), spoiled])
        label = torch.cat([label, torch.full((len(spoiled),), none)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores, found = classifier(image), segmenter(image[:marked])
        found, mask = found.float(), mask[:marked]
        segmentation = F.binary_cross_entropy_with_logits(found, mask) + 0.5 * dice_loss(found, mask)
        loss = F.cross_entropy(scores.float(), label, label_smoothing=0.02) + segmentation
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            nets = {"classifier": classifier.state_dict(), "segmenter": segmenter.state_dict()}
            save_atomic({"step": step + 1, **nets, "optimizer": optim.state_dict()}, path)
            pace = (time.time() - started) / (step + 1 - first)
            print(f"judges step {step + 1}/{steps} loss {loss.item():.3f} {pace:.2f} s/step", flush=True)
