"""LPIPS of two images, where its weights are there: nothing is ever downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import needs

# torchvision's AlexNet of ImageNet, under the name that torchvision gives the file.
WEIGHTS = "alexnet-owt-7be5be79.pth"
LEAST_SIDE = 32  # below it AlexNet has no pixel left


@dataclass(frozen=True)
class Lpips:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) with AlexNet; ``weights`` is a hash of that network's file."""

    weights: str
    network: Callable[[Tensor, Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> float | None:
        """The distance of two images ``(3, H, W)`` in 0..1: 0 for equal ones; None for images too small for it."""
        if min(a.shape[-2:]) < LEAST_SIDE:
            return None
        return float(self.network(a[None].float(), b[None].float()))


def load_lpips() -> tuple[Lpips | None, str]:
    """LPIPS, or None and in words what is missing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    try:
        data = path.read_bytes()
        torch.load(path, map_location="cpu", weights_only=True)  # refuses a file that would run code
    except FileNotFoundError:
        return None, (
            f"LPIPS was not measured: AlexNet's weights are not on this machine. With internet, run once: python -c "
            f"\"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\" - or copy {WEIGHTS} into "
            "torch's folder hub/checkpoints."
        )
    except Exception as error:  # torch has an error of its own for each way in which a file can be wrong
        words = " ".join(str(error).split())
        return None, f"LPIPS was not measured: {WEIGHTS} is not a readable weights file ({words:.120}). Get it again."
    with needs("torchmetrics"):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="none", normalize=True)
    except ModuleNotFoundError:
        return None, "LPIPS was not measured: torchvision is not installed. Install it: pip install torchvision"
    except RuntimeError as error:
        words = " ".join(str(error).split())
        return None, f"LPIPS was not measured: {WEIGHTS} does not fit AlexNet ({words:.120}). Get it again."
    return Lpips(hashlib.sha256(data).hexdigest(), _measuring(metric.eval())), ""


def _measuring(metric) -> Callable[[Tensor, Tensor], Tensor]:
    def measure(a: Tensor, b: Tensor) -> Tensor:
        found = metric(a, b)
        metric.reset()  # it would keep every pair
        return found

    return measure
